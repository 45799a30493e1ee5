"""Which files make up a ZeRO-1/2 tag folder, by name."""

from __future__ import annotations

from msgspec import Struct

from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats import rank_files, tags
from ckpttools.formats.format import Folder, Found, Inner
from ckpttools.formats.rank_files import OPTIM, STAGE3_MODEL, TagFolder
from ckpttools.location import Location


class ZeroFiles(Struct, frozen=True, kw_only=True):
    """The files of one tag folder. `optim` is by rank, in numeric order."""

    folder: Location
    model: Location
    optim: dict[int, Location]
    prefix: str  # "bf16_" or ""
    old_name: bool  # without the underscore before `optim_states` (DeepSpeed up to 0.3.13)
    others: tuple[Location, ...]  # regular files that ZeRO does not name, the manifest aside

    def optim_name(self, rank: int) -> str:
        """The name of a rank's optimizer file, in the style of this folder."""
        return rank_files.optim_name(rank, self.prefix, old=self.old_name)


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
    found = TagFolder(folder)
    if found.stage3:
        raise Unsupported(
            "layout-unsupported",
            "a ZeRO-3 file in a folder of ZeRO-1 or 2",
            where=folder,
            why=f"its parameters are partitioned one by one ({next(iter(found.stage3.values())).name})",
            layout="zero3",
            hint="move the files of the other run out of the folder",
        )
    if not found.models:
        raise CkptError(
            "model-missing",
            "there is no mp_rank_00_model_states.pt",
            where=folder,
            why="the weights, the shapes of all parameters and the counters are in that file",
            hint="copy it from the node that ran rank 0",
        )
    if not found.optim:
        raise Unsupported(
            "no-optimizer-shards",
            "there are no *_optim_states.pt files",
            where=folder,
            why="either the optimizer shards were not copied, or this was saved with ZeRO stage 0",
            hint=f"the weights alone can be read: ckpt extract {escape(found.models[0])} --weights-only",
            layout="zero0",
        )
    prefix, old_name = found.style
    return ZeroFiles(
        folder=folder,
        model=found.models[0],
        optim=found.optim,
        prefix=prefix,
        old_name=old_name,
        others=tuple(found.others),
    )
