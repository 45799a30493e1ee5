"""Which files make up a ZeRO tag folder, by name.

The number after `pp_rank` is the data-parallel rank, not padded: rank 10 sorts before rank 2 as text, so
ranks are always compared as numbers. `bf16_zero_pp_rank_0_optim_states.pt` without `mp_rank` appears only
in third-party documents; it is read and never written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats import tags
from ckpttools.formats.format import Folder, Found, Inner
from ckpttools.location import Location
from ckpttools.siblings import MANIFEST
from ckpttools.stores.files import entries, is_file

OPTIM = re.compile(
    r"(?P<prefix>bf16_|fp16_)?zero_pp_rank_(?P<dp>\d{1,6})(?P<mp>_mp_rank_\d{2,6})?(?P<bar>_?)optim_states\.pt"
)
MODEL = re.compile(r"mp_rank_(\d{2,6})_model_states\.pt")
STAGE3_MODEL = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
EXPERT = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim.*")
LAYER = re.compile(r"layer_\d+-model(_\d+-model)?_states\.pt")
PART = re.compile(r".*_states\.pt-\d+\.\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroFiles:
    """The files of one tag folder. `optim` is by rank, in numeric order."""

    folder: Location
    model: Location
    optim: dict[int, Location]
    prefix: str  # "bf16_" or ""
    old_name: bool  # without the underscore before `optim_states` (DeepSpeed up to 0.3.13)
    others: tuple[Location, ...]  # regular files that ZeRO does not name, the manifest aside

    def optim_name(self, rank: int) -> str:
        """The name of a rank's optimizer file, in the style of this folder."""
        return f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00{'' if self.old_name else '_'}optim_states.pt"


def recognise(folder: Folder) -> Found | Inner | None:
    return tags.recognise(folder, tags.holds_states) or tags.last_word(folder)


def recognise_file(path: Location) -> None:
    """Raises Unsupported for one rank's file."""
    if match := OPTIM.fullmatch(path.name) or STAGE3_MODEL.fullmatch(path.name):
        raise Unsupported(
            "one-shard",
            f"one rank's {'optimizer' if match.re is OPTIM else 'model'} file, not a whole checkpoint",
            where=path,
            why="each rank holds only its partition",
            hint=f"name the folder: {escape(path.parent)}",
        )


def find(folder: Location) -> ZeroFiles:
    """Sort a tag folder's files. Raises Unsupported for layouts that are not plain ZeRO-1/2."""
    models: list[Location] = []
    optim: dict[int, Location] = {}
    styles: set[tuple[str, bool]] = set()
    others: list[Location] = []
    listed = entries(folder)
    for entry in listed:
        refuse_other_layouts(folder, entry.name)
    for entry in listed:
        path = folder / entry.name
        if match := OPTIM.fullmatch(entry.name):
            if match["mp"] not in (None, "_mp_rank_00"):
                raise tensor_parallel(folder)
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
            styles.add((match["prefix"] or "", not match["bar"]))
        elif MODEL.fullmatch(entry.name):
            models.append(path)
        elif is_file(entry) and entry.name != MANIFEST:
            others.append(path)
    if len(models) > 1:
        raise tensor_parallel(folder)
    if not models:
        raise CkptError(
            "model-missing",
            "there is no mp_rank_00_model_states.pt",
            where=folder,
            why="the weights, the shapes of all parameters and the counters are in that file",
            hint="copy it from the node that ran rank 0",
        )
    if not optim:
        raise Unsupported(
            "no-optimizer-shards",
            "there are no *_optim_states.pt files",
            where=folder,
            why="either the optimizer shards were not copied, or this was saved with ZeRO stage 0",
            hint=f"the weights alone can be read: ckpt extract {escape(models[0])} --weights-only",
            layout="zero0",
        )
    if len(styles) > 1:
        raise CkptError(
            "shard-mixed",
            "the optimizer files are named in several styles",
            where=folder,
            why="they come from several saves: DeepSpeed names them by the engine's dtype",
            hint="keep the files of one save and move the others out of the folder",
        )
    ((prefix, old_name),) = styles
    return ZeroFiles(
        folder=folder,
        model=models[0],
        optim=dict(sorted(optim.items())),
        prefix=prefix,
        old_name=old_name,
        others=tuple(others),
    )


def refuse_other_layouts(folder: Location, name: str) -> None:
    """Raise Unsupported where a file's name shows ZeRO-3, pipeline, expert or split files."""
    if STAGE3_MODEL.fullmatch(name):
        kind, layout, need = "ZeRO-3", "zero3", "its parameters are partitioned one by one over the ranks"
    elif EXPERT.fullmatch(name):
        kind, layout, need = (
            "mixture-of-experts",
            "moe",
            "expert weights lie on expert-parallel ranks",
        )
    elif LAYER.fullmatch(name):
        kind, layout, need = (
            "pipeline-parallel",
            "pipeline",
            "each layer has files, and module is empty",
        )
    elif PART.fullmatch(name):
        kind, layout, need = "FAST-writer", "deepspeed", "each torch file is split over several writers"
    else:
        return
    raise Unsupported(
        "layout-unsupported",
        f"a {kind} checkpoint, which is recognised but not read yet",
        where=folder,
        why=f"{need} ({name})",
        hint="save with ZeRO stage 1 or 2, or consolidate it with DeepSpeed's own zero_to_fp32.py",
        layout=layout,
    )


def tensor_parallel(folder: Location) -> CkptError:
    return Unsupported(
        "layout-unsupported",
        "a tensor-parallel checkpoint (several mp_rank files), which is recognised but not read yet",
        where=folder,
        why="each mp rank holds a slice of every weight; joining them needs the model's parallel layout",
        hint="merge it with the training framework that sliced it",
        layout="tensor-parallel",
    )
