"""Reshard: the same training state, partitioned over another number of data-parallel ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.containers.fields import MAX_RANKS
from ckpttools.errors import Unsupported, UsageError, escape
from ckpttools.location import Location

DATALOADER = "dataloader"  # torchtitan: {dp_rank_R: the position of rank R}
_RANK = re.compile(r"dp_rank_(\d+)")


def reshard(checkpoint: Checkpoint, dp_degree: int, mesh: Sequence[int] = ()) -> Layout:
    """The checkpoint's layout for `dp_degree` ranks, or for a `mesh` of them. Partitioning itself belongs to
    the format's writer.

    Raises UsageError for ranks that make no sense, Unsupported for formats without ranks.
    """
    check_ranks(dp_degree, checkpoint.path)
    if not checkpoint.layout.ranked:
        raise Unsupported(
            "not-zero",
            f"a {checkpoint.layout.format} checkpoint is not partitioned over ranks",
            where=checkpoint.path,
            why="any number of ranks can load it as it is",
            hint="reshard is for DeepSpeed ZeRO folders and distributed checkpoints",
        )
    if mesh and checkpoint.layout.zero_stage is not None:
        raise Unsupported(
            "mesh-unsupported",
            f"a {checkpoint.layout.format} folder is cut over data-parallel ranks alone",
            where=checkpoint.path,
            why="ZeRO has no second dimension of ranks",
            hint=f"--world-size {mesh[0]}; a mesh is for distributed checkpoints (--to dcp)",
        )
    return replace(checkpoint.layout, dp_degree=dp_degree, mesh=tuple(mesh))


def check_ranks(ranks: int, where: str | Location = "") -> None:
    """Raises UsageError for a number of ranks that makes no sense."""
    if not 1 <= ranks <= MAX_RANKS:
        raise UsageError(
            "bad-usage",
            f"a world size of {ranks} makes no sense",
            where=where,
            why="it is the number of processes that will load the result",
            hint=f"give a whole number from 1 to {MAX_RANKS:,}",
        )


def ranks_of(world_size: int | None, mesh: str | None) -> tuple[int | None, tuple[int, ...]]:
    """The number of ranks and their mesh ("2x4") as people give them. Raises UsageError."""
    if mesh is None:
        return world_size, ()
    sizes = re.fullmatch(r"(\d{1,6})[x×*,](\d{1,6})", mesh.strip())
    if sizes is None or 0 in map(int, sizes.groups()):
        raise UsageError(
            "bad-usage",
            f"'{escape(mesh)}' is no mesh",
            where="--mesh",
            why="a mesh is two numbers of ranks with an x between",
            hint="2x4: 2 data-parallel times 4 tensor-parallel ranks",
        )
    found = int(sizes[1]), int(sizes[2])
    check_ranks(math.prod(found), "--mesh")
    if world_size not in (None, math.prod(found)):
        raise UsageError(
            "bad-usage",
            f"a mesh of {escape(mesh)} has {math.prod(found)} ranks, not {world_size}",
            where="--mesh",
            why="the number of ranks is the product of the mesh",
            hint="leave out --world-size",
        )
    return math.prod(found), found


def without_positions(checkpoint: Checkpoint, dp_degree: int) -> tuple[Checkpoint, tuple[str, ...]]:
    """Without what data loaders of single ranks saved, where there are other ranks now; notes that say so."""
    held = checkpoint.client.get(DATALOADER)
    keys = held if isinstance(held, Mapping) else {}
    ranks = {int(found[1]) for key in keys if (found := _RANK.fullmatch(str(key)))}
    if not ranks or ranks == set(range(dp_degree)):
        return checkpoint, ()
    client = {key: value for key, value in checkpoint.client.items() if key != DATALOADER}
    note = (
        f"'{DATALOADER}' is not carried: it holds the positions of {len(ranks)} single ranks; torchtitan "
        f"goes on without it with --checkpoint.exclude_from_loading {DATALOADER}"
    )
    return replace(checkpoint, client=client), (note,)
