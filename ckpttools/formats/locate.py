"""What a path given by a user leads to: which checkpoint, in which format, and what lies around it.

A path may be a file; a folder with a `latest` file (DeepSpeed, HF Trainer, Lightning, accelerate); a tag
folder (`global_step500/`, MMEngine's `iter_1500.pth/`, which has no `latest`); a bundle with `deepspeed/`
and `hf_model/`; a torch distributed checkpoint; an HF folder. A run folder that holds several checkpoints is
refused with their list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpttools.containers.torch_file import is_torch_file
from ckpttools.errors import CkptError, Unsupported, UsageError, escape
from ckpttools.formats.dcp.names import is_dcp_file, looks_like_dcp, refuse_rank_files
from ckpttools.formats.hf import SHARD, looks_like_hf
from ckpttools.formats.zero.names import OPTIM, looks_like_zero
from ckpttools.formats.zero3.names import MODEL as STAGE3_MODEL
from ckpttools.formats.zero3.names import looks_like_zero3
from ckpttools.siblings import is_copy, is_ours
from ckpttools.stores.files import entries, is_file, is_folder, opened, plain_name, small_text
from ckpttools.stores.links import refuse_outside, within
from ckpttools.suggest import did_you_mean

LATEST = "latest"
SHOWN = 10  # of several checkpoints
BUNDLE = "deepspeed"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
# torch files beside a checkpoint that are no checkpoint themselves
SIDE_FILES = re.compile(
    r"(optimizer|scheduler|scaler|rng_state.*|random_states.*|training_args|sampler|dl_state_dict|"
    r"custom_checkpoint.*)(_\d+)?\.(pt|pth|bin|pkl)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint found. `root` is what belongs to it as a whole: the folder given, or `target` itself."""

    format: str  # a key of formats.FORMATS
    target: Path  # the tag folder, the file, or the HF folder
    root: Path
    how: str  # why this one, for people
    key: str | None = None  # under which the weights lie, where the user says so

    def __post_init__(self) -> None:
        if self.key is not None and self.format != "pt":
            raise UsageError(
                "bad-usage",
                "--key says where the weights lie in a single file of torch.save",
                where=self.target,
                hint="leave it off",
            )

    @property
    def inner(self) -> str:
        """The target's path below the root, with `/`; "" where they are the same."""
        return "" if self.root == self.target else self.target.relative_to(self.root).as_posix()


class Several(UsageError):
    """A path means more than one checkpoint: `found`, shown by `names` in the same order."""

    def __init__(self, path: Path, found: Sequence[Path], names: Sequence[str], hint: str) -> None:
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


def locate(path: Path, tag: str | None = None) -> Source:
    """Find the one checkpoint that a path means. Raises CkptError with a list where it is not one."""
    _look_up(path)
    with within(path):
        if path.is_dir():
            return _folder(path, tag)
        if tag is not None:
            raise UsageError(
                "bad-usage", "--tag needs a folder", where=path, hint="leave --tag out for a file"
            )
        return _file(path)


def _look_up(path: Path) -> None:
    """Raise UsageError where a path leads to nothing, or may not be followed."""
    try:
        path.stat()
        return
    except PermissionError:
        id, problem = "no-permission", "a folder above it may not be entered"
    except FileNotFoundError:
        id, problem = "not-found", "there is no such file or folder"
    except (OSError, ValueError) as error:  # a name that is too long, a NUL in it, links in circles
        id, problem = "not-readable", f"the path cannot be looked up: {escape(error)}"
    if id != "no-permission" and path.name and _is_link(path):
        id, problem = "not-found", "a symbolic link that leads nowhere"
    raise UsageError(id, problem, where=path, hint="check the path, and who may enter its folders")


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def _file(path: Path) -> Source:
    if path.name.endswith(".safetensors"):
        return Source(format="hf", target=path, root=path, how="a safetensors file")
    if OPTIM.fullmatch(path.name) or STAGE3_MODEL.fullmatch(path.name):
        what = "optimizer" if OPTIM.fullmatch(path.name) else "model"
        raise Unsupported(
            "one-shard",
            f"one rank's {what} file, not a whole checkpoint",
            where=path,
            why="each rank holds only its partition",
            hint=f"name the folder: {escape(path.parent)}",
        )
    if is_dcp_file(path.name):
        return Source(format="dcp", target=path.parent, root=path.parent, how="the folder of this part")
    if path.name.endswith(".index.json"):
        return Source(format="hf", target=path.parent, root=path.parent, how="the folder of this index")
    if is_torch_file(path):
        return Source(format="pt", target=path, root=path, how="a torch file")
    raise UsageError(
        "not-a-checkpoint",
        "the file is not a checkpoint of a known format",
        where=path,
        why="it starts neither like a torch file nor like a safetensors file",
        hint="known: .pt, .pth, .ckpt, .bin of torch.save; .safetensors; DeepSpeed and HF folders",
    )


def _folder(path: Path, tag: str | None) -> Source:
    if tag is not None:
        target = path / plain_name(tag, path)
        if not target.is_dir():
            hint = did_you_mean(tag, _tag_names(path)) or _tags(path)
            raise UsageError("tag-missing", f"there is no tag {escape(tag)}", where=path, hint=hint)
        refuse_outside(target)
        return Source(format=_stage(target), target=target, root=path, how=f"tag {escape(tag)}, as asked for")
    names = [entry.name for entry in entries(path)]
    if not names:
        raise CkptError(
            "empty-folder",
            "the folder is empty",
            where=path,
            why="a save that was killed before its first file leaves such folders",
            hint="use an older checkpoint",
        )
    _refuse_known(path, names)  # a universal checkpoint holds a ZeRO model file too
    if looks_like_dcp(path):
        return Source(format="dcp", target=path, root=path, how="a torch distributed checkpoint")
    refuse_rank_files(path, names)
    if looks_like_zero(path):
        return Source(format=_stage(path), target=path, root=path, how="a DeepSpeed tag folder")
    if LATEST in names:
        return _latest(path)
    if BUNDLE in names and (path / BUNDLE).is_dir():
        refuse_outside(path / BUNDLE)
        inner = _folder(path / BUNDLE, None)
        return replace(inner, root=path, how=f"{BUNDLE}/ of this bundle; {inner.how}")
    _refuse_headless(path, names)
    if looks_like_hf(path):
        return Source(format="hf", target=path, root=path, how="a Hugging Face folder")
    missing = next((name for name in ("config.json", "adapter_config.json") if name in names), None)
    if missing is not None and not checkpoints(path):
        raise CkptError(
            "no-weights",
            f"{missing} is here, but no model weights",
            where=path,
            why="the folder is a Hugging Face model without its weights, or they were not copied",
            hint="copy model.safetensors (or its shards and index) from where the folder was saved",
        )
    return _only_one(path)


def _stage(folder: Path) -> str:
    """Which of DeepSpeed's layouts a tag folder has: stage 3's, or that of stages 1 and 2."""
    return "zero3" if looks_like_zero3(folder) else "zero"


def _latest(path: Path) -> Source:
    text = small_text(path / LATEST, 256).strip()
    tag = plain_name(text, path / LATEST)
    target = path / tag
    if not target.is_dir():
        raise CkptError(
            "latest-dangling",
            f"latest names {escape(tag)}, which is not there",
            where=path / LATEST,
            why="DeepSpeed would fail to resume from this folder",
            hint=_tags(path),
        )
    refuse_outside(target)
    if not looks_like_zero(target):
        raise CkptError(
            "latest-dangling",
            f"latest names {escape(tag)}, which holds no DeepSpeed files",
            where=target,
            why="the save did not finish, or its files were moved",
            hint=_tags(path, but=tag),
        )
    return Source(format=_stage(target), target=target, root=path, how=f"latest names {escape(tag)}")


def _tags(path: Path, but: str = "") -> str:
    found = [name for name in _tag_names(path) if name != but]
    if not found:
        return "no other checkpoint is in this folder: copy it again from where it was saved"
    shown = ", ".join(map(escape, sorted(found, key=_by_number)[-8:]))
    return f"the folder holds {shown}: name one with --tag"


def _tag_names(path: Path) -> list[str]:
    return [e.name for e in entries(path) if is_folder(e) and looks_like_zero(path / e.name)]


def _refuse_known(path: Path, names: list[str]) -> None:
    """Formats that are recognised and not read yet."""
    if "zero" in names and (path / "zero").is_dir():
        raise Unsupported(
            "layout-unsupported",
            "a DeepSpeed universal checkpoint, which is recognised but not read yet",
            where=path,
            hint="use the ZeRO folder that it was made from",
            layout="universal",
        )


def _refuse_headless(path: Path, names: list[str]) -> None:
    """Parts of a checkpoint whose head is gone: shards without index, a Trainer's ZeRO without `latest`."""
    shards = [name for name in names if SHARD.fullmatch(name)]
    if shards and not any(name.endswith(".index.json") for name in names):
        raise CkptError(
            "index-missing",
            f"{len(shards)} shards of a model, and no index",
            where=path,
            why="the index says which tensors there are: without it nobody knows whether shards are missing",
            hint="copy the *.index.json from where the folder was saved",
        )
    tags = [name for name in names if re.fullmatch(r"global_step\d+", name) and (path / name).is_dir()]
    if tags and "trainer_state.json" in names:
        raise CkptError(
            "latest-missing",
            f"{tags[-1]}/ is here, but no `latest` that names it",
            where=path,
            why="the Trainer would not find its DeepSpeed state and could not resume",
            hint=f"if the save was finished, write {tags[-1]} into the file latest, or use --tag {tags[-1]}",
        )


def _only_one(path: Path) -> Source:
    """The single checkpoint of a run folder; several are refused with their list."""
    found = checkpoints(path)
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


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints directly in a run folder, oldest number first; ckpt's own copies only if alone."""
    found: list[Path] = []
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
    return sorted(own or found, key=lambda p: _by_number(p.name))


def holds_one(folder: Path) -> bool:
    """Whether a folder is itself a checkpoint, by the names in it. Raises CkptError."""
    inside = {entry.name for entry in entries(folder)}
    known = (looks_like_zero, looks_like_dcp, looks_like_hf)
    return LATEST in inside or BUNDLE in inside or any(looks(folder) for looks in known)


def _by_number(name: str) -> tuple[list[int], str]:
    """Sort by the numbers in a name: epoch_10 after epoch_9."""
    return [int(n) for n in re.findall(r"\d+", name)[:4]], name
