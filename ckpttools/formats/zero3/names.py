"""Which files make up a ZeRO-3 tag folder, by name.

The number after `pp_rank` is the data-parallel rank, not padded. The model file never has a prefix, the
optimizer file has `bf16_` where the engine runs in bf16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckpttools.errors import CkptError, Unsupported
from ckpttools.formats.format import Folder
from ckpttools.location import Location
from ckpttools.siblings import MANIFEST
from ckpttools.stores.files import entries, is_file

MODEL = re.compile(r"zero_pp_rank_(?P<dp>\d{1,6})_mp_rank_(?P<mp>\d{2,6})_model_states\.pt")
OPTIM = re.compile(
    r"(?P<prefix>bf16_|fp16_)?zero_pp_rank_(?P<dp>\d{1,6})_mp_rank_(?P<mp>\d{2,6})_optim_states\.pt"
)
OTHER_STAGE = re.compile(r"mp_rank_\d{2,6}_model_states\.pt")
EXPERT = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim.*")
PART = re.compile(r".*_states\.pt-\d+\.\d+")
SWAPPED = "offloaded_tensors"  # NVMe offload: the masters and moments are in files of the swapper


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero3Files:
    """The files of one tag folder, by rank in numeric order."""

    folder: Location
    model: dict[int, Location]
    optim: dict[int, Location]
    prefix: str  # "bf16_" or ""
    others: tuple[Location, ...]  # regular files that ZeRO does not name, the manifest aside


def model_name(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def optim_name(rank: int, prefix: str) -> str:
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def holds(folder: Folder) -> bool:
    """Whether the folder directly holds a model file of ZeRO-3."""
    return any(MODEL.fullmatch(name) for name in folder.names)


def find(folder: Location) -> Zero3Files:
    """Sort a tag folder's files. Raises Unsupported for layouts that are not plain ZeRO-3."""
    model: dict[int, Location] = {}
    optim: dict[int, Location] = {}
    prefixes: set[str] = set()
    others: list[Location] = []
    for entry in entries(folder):
        path = folder / entry.name
        _refuse_other_layouts(folder, entry.name)
        if match := MODEL.fullmatch(entry.name):
            _plain(folder, match["mp"])
            model[int(match["dp"])] = path
        elif match := OPTIM.fullmatch(entry.name):
            _plain(folder, match["mp"])
            rank = int(match["dp"])
            if rank in optim:
                raise CkptError(
                    "shard-duplicate",
                    f"two files hold the optimizer states of dp rank {rank}",
                    where=folder,
                    why=f"{optim[rank].name} and {entry.name} cannot both be right",
                    hint="move the one that does not belong to this save out of the folder",
                )
            optim[rank] = path
            prefixes.add(match["prefix"] or "")
        elif OTHER_STAGE.fullmatch(entry.name):
            raise CkptError(
                "shard-mixed",
                f"{entry.name} is of ZeRO stage 1 or 2, the others are of stage 3",
                where=folder,
                why="they come from several saves, and which one is meant is not known",
                hint="keep the files of one save and move the others out of the folder",
            )
        elif is_file(entry) and entry.name != MANIFEST:
            others.append(path)
    if not model or not optim:
        lacking = "*_optim_states.pt" if model else "*_model_states.pt"
        raise CkptError(
            "shard-missing",
            f"there are no {lacking} files",
            where=folder,
            why="in ZeRO-3 every rank writes both, and the weights are in the optimizer files",
            hint="copy them from the nodes that ran the ranks",
        )
    if len(prefixes) > 1:
        raise CkptError(
            "shard-mixed",
            "the optimizer files are named in several styles",
            where=folder,
            why="they come from several saves: DeepSpeed names them by the engine's dtype",
            hint="keep the files of one save and move the others out of the folder",
        )
    return Zero3Files(
        folder=folder,
        model=dict(sorted(model.items())),
        optim=dict(sorted(optim.items())),
        prefix=prefixes.pop(),
        others=tuple(others),
    )


def _plain(folder: Location, mp: str) -> None:
    if mp != "00":
        raise Unsupported(
            "layout-unsupported",
            "a tensor-parallel checkpoint (several mp_rank files), which is recognised but not read yet",
            where=folder,
            why="each mp rank holds a slice of every weight; joining them needs the model's parallel layout",
            hint="merge it with the training framework that sliced it",
            layout="tensor-parallel",
        )


def _refuse_other_layouts(folder: Location, name: str) -> None:
    if EXPERT.fullmatch(name):
        kind, need = "mixture-of-experts", "expert weights are spread over expert-parallel ranks"
    elif PART.fullmatch(name):
        kind, need = "FAST-writer", "each torch file is split over several writers"
    elif name == SWAPPED:
        kind, need = "NVMe offload", "masters and moments are in the swapper's own files"
    else:
        return
    raise Unsupported(
        "layout-unsupported",
        f"a ZeRO-3 {kind} checkpoint, which is recognised but not read yet",
        where=folder,
        why=f"{need} ({name})",
        hint="consolidate it with DeepSpeed's own zero_to_fp32.py",
        layout="zero3",
    )
