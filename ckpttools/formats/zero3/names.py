"""Which files make up a ZeRO-3 tag folder, by name. The model files never have a prefix."""

from __future__ import annotations

from msgspec import Struct

from ckpttools.errors import CkptError
from ckpttools.formats.format import Folder
from ckpttools.formats.rank_files import STAGE3_MODEL, TagFolder
from ckpttools.location import Location


class Zero3Files(Struct, frozen=True, kw_only=True):
    """The files of one tag folder, by rank in numeric order."""

    folder: Location
    model: dict[int, Location]
    optim: dict[int, Location]
    prefix: str  # "bf16_" or ""
    others: tuple[Location, ...]  # regular files that ZeRO does not name, the manifest aside


def model_name(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def holds(folder: Folder) -> bool:
    """Whether the folder directly holds a model file of ZeRO-3."""
    return any(STAGE3_MODEL.fullmatch(name) for name in folder.names)


def find(folder: Location) -> Zero3Files:
    """Sort a tag folder's files. Raises Unsupported for layouts that are not plain ZeRO-3."""
    found = TagFolder(folder)
    if found.models:
        raise CkptError(
            "shard-mixed",
            f"{found.models[0].name} is of ZeRO stage 1 or 2, the others are of stage 3",
            where=folder,
            why="they come from several saves, and which one is meant is not known",
            hint="keep the files of one save and move the others out of the folder",
        )
    if not found.stage3 or not found.optim:
        lacking = "*_optim_states.pt" if found.stage3 else "*_model_states.pt"
        raise CkptError(
            "shard-missing",
            f"there are no {lacking} files",
            where=folder,
            why="in ZeRO-3 every rank writes both, and the weights are in the optimizer files",
            hint="copy them from the nodes that ran the ranks",
        )
    return Zero3Files(
        folder=folder,
        model=found.stage3,
        optim=found.optim,
        prefix=found.style[0],
        others=tuple(found.others),
    )
