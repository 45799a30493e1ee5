"""The files and folders of a torch distributed checkpoint, and which of them a path leads to."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckpttools.errors import Unsupported
from ckpttools.formats.format import Folder, Found
from ckpttools.location import Location
from ckpttools.stores.files import entries, is_folder

NAME = ".metadata"
DATA = re.compile(r"__(\d+)_(\d+)\.distcp")
SUFFIX = ".distcp"
MODEL_FOLDER, OPTIMIZER_FOLDER = "pytorch_model_fsdp_0", "optimizer_0"  # accelerate, HF Trainer
# of HuggingFaceStorageWriter: the rank from 1, the number of the file and how many the rank has
SHARD = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
# accelerate with use_dcp=False: one torch file of DTensors for each rank
RANK_FILE = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+_rank\d+\.bin")


def is_dcp_file(name: str) -> bool:
    """Whether a file is a part of a distributed checkpoint, which is a folder."""
    return name == NAME or name.endswith(SUFFIX)


def names_it(name: str) -> bool:
    """Whether torch or accelerate itself gives a file that name."""
    return name == NAME or any(known.fullmatch(name) for known in (DATA, SHARD, RANK_FILE))


def holds(folder: Folder) -> bool:
    """Whether a folder holds a distributed checkpoint, the two that accelerate makes of one, or its files of
    single ranks.
    """
    return _holds_parts(folder) or any(map(RANK_FILE.fullmatch, folder.files))


def _holds_parts(folder: Folder) -> bool:
    if any(is_dcp_file(name) or SHARD.fullmatch(name) for name in folder.files):
        return True
    inner = (name for name in (MODEL_FOLDER, OPTIMIZER_FOLDER) if name in folder.folders)
    return any(_is_part(folder.path / name) for name in inner)


def recognise(folder: Folder) -> Found | None:
    """Raises Unsupported for what accelerate writes with use_dcp=False."""
    if _holds_parts(folder):
        return Found(folder.path, "a torch distributed checkpoint")
    _refuse_rank_files(folder.path, folder.names)
    return None


def recognise_file(path: Location) -> Found | None:
    return Found(path.parent, "the folder of this part") if is_dcp_file(path.name) else None


def _is_part(folder: Location) -> bool:
    return any(is_dcp_file(entry.name) for entry in entries(folder))


def parts(folder: Location) -> tuple[Location, ...]:
    """The folders with a .metadata of their own: the folder itself, or accelerate's model and optimizer."""
    if _is_part(folder):
        return (folder,)
    inner = [folder / name for name in (MODEL_FOLDER, OPTIMIZER_FOLDER)]
    return tuple(path for path in inner if is_folder(path) and _is_part(path))


def has_shards(folder: Location) -> bool:
    """Whether a folder holds the safetensors shards of HuggingFaceStorageWriter."""
    return any(SHARD.fullmatch(entry.name) for entry in entries(folder))


def _refuse_rank_files(folder: Location, names: Iterable[str]) -> None:
    if any(RANK_FILE.fullmatch(name) for name in names):
        raise Unsupported(
            "layout-unsupported",
            "FSDP shards of accelerate, one file for each rank, which are recognised but not read",
            where=folder,
            why="their tensors are pickled DTensors: which part of a weight each holds is known to the "
            "process group that saved them",
            hint="save with fsdp_state_dict_type SHARDED_STATE_DICT (a distributed checkpoint) or "
            "FULL_STATE_DICT",
        )
