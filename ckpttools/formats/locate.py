"""What a path given by a user leads to: which checkpoint, in which format, and what lies around it.

A path may be a file, the folder of a checkpoint, one that points to it or wraps it, or a run folder; each
format says which of them it knows. A run folder that holds several checkpoints is refused with their list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec.structs import replace

from ckpttools.errors import CkptError, Unsupported, UsageError, escape
from ckpttools.formats import pipelines
from ckpttools.formats.format import Folder, Found, Inner, Source, unfinished
from ckpttools.formats.table import FORMATS
from ckpttools.formats.tags import LATEST, is_bundle, is_rest, named_tags, tags
from ckpttools.location import Location, Stored
from ckpttools.numbered import by_number
from ckpttools.siblings import UNFINISHED, is_copy, is_ours
from ckpttools.stores.files import (
    entries,
    exists,
    is_file,
    is_folder,
    is_link,
    opened,
    stat,
)
from ckpttools.stores.links import plain_name, refuse_outside, within
from ckpttools.suggest import did_you_mean

SHOWN = 10  # of several checkpoints
_ABOVE = 2  # folders between the one that is uploaded and what is in it
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
# torch files beside a checkpoint that are no checkpoint themselves
SIDE_FILES = re.compile(
    r"(optimizer|scheduler|scaler|rng_state.*|random_states.*|training_args|sampler|dl_state_dict|"
    r"custom_checkpoint.*)(_\d+)?\.(pt|pth|bin|pkl)"
)


class Several(UsageError):
    """A path means more than one checkpoint: `found`, shown by `names` in the same order."""

    def __init__(self, path: Location, found: Sequence[Location], names: Sequence[str], hint: str) -> None:
        shown = [f"  {name}" for name in names[:SHOWN]]
        more = [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        super().__init__(
            "several-checkpoints",
            f"the folder holds {len(found)} checkpoints",
            where=path,
            why="\n".join(("which one is meant?", *shown, *more)),
            hint=hint,
        )
        self.found = found


def locate(path: Location, tag: str | None = None) -> Source:
    """Find the one checkpoint that a path means. Raises CkptError with a list where it is not one."""
    _look_up(path)
    if isinstance(path, Stored):  # what lies in it is not finished either
        for folder in path.parents[:_ABOVE]:
            if exists(folder / UNFINISHED):
                raise unfinished(folder)
    with within(path):
        if is_folder(path):
            return _folder(path) if tag is None else _tagged(Folder.of(path), tag)
        if tag is not None:
            raise UsageError(
                "bad-usage",
                "--tag needs a folder",
                where=path,
                why="a tag is a folder below DeepSpeed's save folder, and this is a file",
                hint="leave --tag out for a file",
            )
        return _file(path)


def _look_up(path: Location) -> None:
    """Raise UsageError where a path leads to nothing, or may not be followed."""
    try:
        stat(path)
        return
    except PermissionError:
        id, problem = "no-permission", "a folder above it may not be entered"
    except FileNotFoundError:
        id, problem = "not-found", "there is no such file or folder"
    except (OSError, ValueError) as error:  # a name that is too long, a NUL in it, links in circles
        id, problem = "not-readable", f"the path cannot be looked up: {escape(error)}"
    if id != "no-permission" and path.name and is_link(path):
        id, problem = "not-found", "a symbolic link that leads nowhere"
    why = "there is nothing to read; a path that is not absolute starts at the current folder"
    why = "" if id == "no-permission" else why
    raise UsageError(id, problem, where=path, why=why, hint="check the path, and who may enter its folders")


def _file(path: Location) -> Source:
    for format in FORMATS:
        if found := format.recognise_file(path):
            return Source(format=format, target=found.target, root=found.target, how=found.how)
    raise UsageError(
        "not-a-checkpoint",
        "the file is not a checkpoint of a known format",
        where=path,
        why="it starts neither like a torch file nor like a safetensors file",
        hint="known: .pt, .pth, .ckpt, .bin of torch.save; .safetensors; DeepSpeed and HF folders",
    )


def _tagged(folder: Folder, tag: str) -> Source:
    name = plain_name(tag, folder.path)
    if name not in folder.folders:
        hint = did_you_mean(tag, tags(folder)) or named_tags(folder)
        raise UsageError(
            "tag-missing",
            f"there is no tag {escape(tag)}",
            where=folder.path,
            why="a tag is a folder in it, as save_checkpoint named it",
            hint=hint,
        )
    inner, formats = folder.inside(name), [format for format in FORMATS if format.tagged]
    # what is of none of them is read as the most general one, which says what is missing
    format = next((format for format in formats if format.holds(inner)), formats[-1])
    return Source(format=format, target=inner.path, root=folder.path, how=f"tag {escape(tag)}, as asked for")


def _folder(path: Location) -> Source:
    folder = Folder.of(path)
    if not folder.names:
        raise CkptError(
            "empty-folder",
            "the folder is empty",
            where=path,
            why="a save that was killed before its first file leaves such folders",
            hint="use an older checkpoint",
        )
    for format in FORMATS:
        match format.recognise(folder):
            case Found(target, how):
                return Source(format=format, target=target, root=path, how=how)
            case Inner(name, how):
                refuse_outside(path / name)
                inner = _folder(path / name)
                return replace(inner, root=path, how=f"{how}; {inner.how}")
    found = [*checkpoints(path), *_in_parts(folder)]
    for _, lost in lost_parts(folder) if len(found) < 2 else ():
        raise lost
    for format in () if found else FORMATS:
        if (error := format.lacking(folder)) is not None:
            raise error
    return _only_one(path, found)


def _in_parts(folder: Folder) -> list[Location]:
    """The parts of a pipeline whose weights are called otherwise than a checkpoint's."""
    parts = (folder.path / name for name in pipelines.components(folder) if name in folder.folders)
    return [part for part in parts if not holds_one(part) and checkpoints(part)]


def lost_parts(folder: Folder) -> list[tuple[Location, CkptError]]:
    """What a pipeline lists and does not have: a folder, or the weights beside a model's configuration."""
    lost: list[tuple[Location, CkptError]] = []
    for name in pipelines.components(folder):
        part = folder.path / name
        try:
            refuse_outside(part)
        except CkptError as error:
            lost.append((part, error))
            continue
        if name not in folder.folders:
            lost.append((part, pipelines.missing(part, "is not there")))
        elif is_file(part / "config.json") and not (holds_one(part) or checkpoints(part)):
            refusals = (format.lacking(folder.inside(name)) for format in FORMATS)
            other = next((error for error in refusals if isinstance(error, Unsupported)), None)
            what = "has a configuration and no weights that are read"
            lost.append((part, other or pipelines.missing(part, what)))
    return lost


def _only_one(path: Location, found: Sequence[Location]) -> Source:
    """The single checkpoint of a run folder; several are refused with their list."""
    if len(found) == 1:
        inner = locate(found[0])
        return replace(inner, how=f"the only checkpoint in {escape(path)}; {inner.how}")
    if found:
        names = [escape(child.name) for child in reversed(found)]
        raise Several(path, found[::-1], names, "name one of them; ckpt latest says which is the newest")
    for entry in entries(path):
        refuse_outside(path / entry.name)
    raise UsageError(
        "not-a-checkpoint",
        "the folder holds no checkpoint of a known format",
        where=path,
        why="neither DeepSpeed, Hugging Face nor torch files were found directly in it",
        hint="name the checkpoint itself: a tag folder, a checkpoint-N folder or a file",
    )


def checkpoints(path: Location) -> list[Location]:
    """The checkpoints directly in a run folder, oldest number first; ckpt's own copies only if alone."""
    found: list[Location] = []
    for entry in entries(path):
        child = path / entry.name
        try:
            refuse_outside(child)
            if is_ours(entry.name):
                continue
            if is_folder(entry):
                if holds_one(child):
                    found.append(child)
            elif is_file(entry) and entry.name.endswith((*TORCH_SUFFIXES, ".safetensors")):
                if SIDE_FILES.fullmatch(entry.name):
                    continue
                with opened(child) as file:
                    if file.size > 8:
                        found.append(child)
        except CkptError:
            continue  # what cannot be listed or opened is no candidate
    own = [path for path in found if not is_copy(path.name)]
    return sorted(own or found, key=lambda p: by_number(p.name))


def holds_one(path: Location) -> bool:
    """Whether a folder is itself a checkpoint, by the names in it. Raises CkptError."""
    folder = Folder.of(path)
    wrapped = LATEST in folder.names or is_bundle(folder) or is_rest(folder)
    return wrapped or any(format.holds(folder) for format in FORMATS)
