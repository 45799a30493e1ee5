"""What --force may replace: an output of ckpt, or a checkpoint; never something that is somebody's own.

    a regular file     that reads as the kind of file that is written there, or is empty
    a folder           that ckpt's manifest describes or that reads as one checkpoint, or is empty; and every
                       file in it is one that ckpt's manifest of an output lists, that the new output has
                       as well, or that has a name which frameworks give to parts of a checkpoint

A link, a device, a pipe, a file of another kind, a folder with one file more than that (notes, code, data, a
second checkpoint) is refused: nothing is removed that no framework would write again. So is what is pinned,
what lies in a pinned folder, and a folder with a pin in it.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ckpttools import manifest
from ckpttools.containers.safetensors import read_safetensors
from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError, UsageError, escape, some
from ckpttools.formats import FORMATS, locate, read
from ckpttools.formats.configs import CONFIG_FILES
from ckpttools.formats.locate import SIDE_FILES
from ckpttools.frameworks import POINTERS, STATED
from ckpttools.location import Location, Stored, below
from ckpttools.plan import Plan
from ckpttools.runs import pins
from ckpttools.siblings import MANIFEST, is_ours
from ckpttools.stores.disk import look
from ckpttools.stores.files import entries, is_file, is_folder, is_link, size_of
from ckpttools.stores.links import absolute, within

# by DeepSpeed, the HF Trainer, accelerate, MMEngine and bundles, beside what a format reads
BESIDE = {*POINTERS, "zero_to_fp32.py", "zero_to_torch.py", *STATED}
# with a configuration or a tokenizer and no weights: verl's, and the modules of sentence-transformers
CONFIG_FOLDERS = re.compile(r"huggingface|\d+_[A-Z]\w*")
# in which frameworks put parts of one checkpoint
PARTS = re.compile(
    r"global_step\d+|deepspeed|hf_model|pytorch_model(_fsdp)?(_\d+)?|optimizer(_\d+)?|checkpoint"
    rf"|actor|critic|reference|{CONFIG_FOLDERS.pattern}"
)
STATES = "zero"  # of universal checkpoints: a folder for each parameter
TOKENIZERS = {"tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model"}


def replaceable(dst: Location, plan: Plan) -> str:
    """What `plan` is going to replace, in words. Raises UsageError "not-replaced"."""
    if isinstance(dst, Path):  # nothing in a store is pinned
        refuse_pinned(dst)
    try:
        if isinstance(dst, Stored):
            return _folder(dst, plan) if is_folder(dst) else _file(dst, plan)
        mode = look(dst).st_mode
        if stat.S_ISREG(mode):
            return _file(dst, plan)
        if stat.S_ISDIR(mode):
            return _folder(dst, plan)
    except OSError as error:
        raise _refused(dst, f"it cannot be looked at: {escape(error.strerror)}") from None
    raise _refused(dst, "a symbolic link" if stat.S_ISLNK(mode) else "neither a regular file nor a folder")


def refuse_pinned(dst: Path) -> None:
    """Raises UsageError where somebody keeps what is there, or something in it."""
    pin = pins.above(dst, Path(absolute(dst).anchor))
    inside = next(pins.inside(dst), None) if pin is None and is_folder(dst) else None
    kept = pin.path if pin is not None else inside
    if kept is not None:
        raise UsageError(
            "pinned",
            f"it is {pin}" if pin is not None else f"what is in it is pinned: {escape(kept.name)}",
            where=dst,
            why="a pinned checkpoint is neither replaced nor removed",
            hint=f"choose another destination, or give it free first: ckpt unpin {escape(kept, 4000)}",
        )


def _file(dst: Location, plan: Plan) -> str:
    size = _size(dst)
    if not plan.is_single_file:
        raise _refused(dst, "a file, where a folder is to be written")
    if size:
        try:
            (read_safetensors if dst.name.endswith(".safetensors") else read_torch_file)(dst)
        except CkptError as error:
            raise _refused(
                dst, f"it does not read as a file of the kind that is written ({error.message})"
            ) from None
    return f"{escape(dst)}, a file of {size} bytes"


def _folder(dst: Location, plan: Plan) -> str:
    try:
        files = list(_files(dst))
    except CkptError as error:
        raise _refused(dst, f"it cannot be looked at: {error.message}") from None
    if not files:
        return f"{escape(dst)}, an empty folder"
    if plan.is_single_file:
        raise _refused(dst, "a folder, where a file is to be written")
    begun = _sent(dst)
    files = [each for each in files if begun is None or each[0] not in begun]
    kinds = [{path.parent for path, _ in files if each.is_weights(path.name)} for each in FORMATS]
    for places in (*kinds, _places(dst, files)):
        if len(places) > 1:
            raise _refused(dst, f"it holds several checkpoints: {', '.join(sorted(map(escape, places)))}")
    listed = _listed(files)
    if not listed and begun is None:
        _reads(dst)
    own = _own(dst, files, listed | {dst / file.path for file in plan.files})
    if own:
        names = some([below(path, dst) for path in own], 3)
        raise _refused(dst, f"it holds what no checkpoint needs: {names}")
    nbytes = sum(_size(path) for path, _ in files)
    return f"{escape(dst)}, a folder with {len(files)} files, {nbytes} bytes"


def _sent(dst: Location) -> set[Stored] | None:
    """What an unfinished upload has put there: its own command would replace it, too."""
    if not isinstance(dst, Stored):
        return None
    from ckpttools.execute.marker import sent

    return sent(dst)


def holding(folder: Location) -> set[Location]:
    """The folder, and those within that have weights or state of their own: parts of one checkpoint that
    frameworks put into folders of known names lie where the rest of it does.
    """
    return _places(folder, list(_files(folder)))


def _places(folder: Location, files: list[tuple[Location, bool]]) -> set[Location]:
    found = set()
    for path in (path for path, _ in files if _is_part(path)):
        place = path.parent
        states = [above for above in path.parents if above.name == STATES and folder in above.parents]
        if states and not _is_weights(path):
            place = states[-1].parent
        while place != folder and PARTS.fullmatch(place.name):
            place = place.parent
        found.add(place)
    return found


def somebodys(folder: Location) -> list[Location]:
    """What lies in a checkpoint's folder that no framework would write again."""
    files = list(_files(folder))
    return _own(folder, files, _listed(files))


def _own(folder: Location, files: list[tuple[Location, bool]], known: set[Location]) -> list[Location]:
    weights = [path for path, _ in files if _is_weights(path)]
    # frameworks write beside weights, above them, and in few folders else; a name alone says less elsewhere
    places = {folder, *(place for path in weights for place in path.parents)}

    def is_theirs(path: Location) -> bool:
        there = path.parent in places or CONFIG_FOLDERS.fullmatch(path.parent.name) is not None
        return is_ours(path.name) or _is_part(path) or (there and _is_beside(path.name))

    return [path for path, is_plain in files if not is_plain or (path not in known and not is_theirs(path))]


def _is_part(path: Location) -> bool:
    return any(format.names_it(path) for format in FORMATS)


def _is_weights(path: Location) -> bool:
    return any(format.is_weights(path.name) for format in FORMATS)


def _files(folder: Location) -> Iterator[tuple[Location, bool]]:
    """Everything below a folder that is no folder; whether it is a regular file."""
    for entry in entries(folder):
        path, is_plain = folder / entry.name, not is_link(entry)
        if is_plain and is_folder(entry):
            yield from _files(path)
        else:
            yield path, is_plain and is_file(entry)


def _listed(files: list[tuple[Location, bool]]) -> set[Location]:
    """What the manifests among the files say that ckpt made."""
    found: set[Location] = set()
    for path, is_plain in files:
        if is_plain and path.name == MANIFEST:
            try:
                found |= {path.parent / name for name in manifest.outputs(path)}
            except CkptError:
                continue
    return found


def _reads(dst: Location) -> None:
    """Raises UsageError where the folder does not read as one checkpoint."""
    try:
        source = locate(dst)
        with within(dst):
            read(source)
    except CkptError as error:
        raise _refused(dst, f"neither written by ckpt nor one checkpoint ({error.message})") from None


def _size(path: Location) -> int:
    return size_of(path) if isinstance(path, Stored) else look(path).st_size


def _is_beside(name: str) -> bool:
    """Whether a framework gives such a name to what it writes beside weights."""
    known = any(names.fullmatch(name) for names in (SIDE_FILES, CONFIG_FILES))
    return name in BESIDE or (known and (not name.endswith(".model") or name in TOKENIZERS))


def _refused(dst: Location, what: str) -> UsageError:
    return UsageError(
        "not-replaced",
        f"--force does not replace this: {what}",
        where=dst,
        why="only an output of ckpt or a whole checkpoint is replaced; what is there would be lost",
        hint="choose another destination, or move away what is there",
    )
