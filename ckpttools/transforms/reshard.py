"""Reshard: the same training state, partitioned over another number of data-parallel ranks."""

from __future__ import annotations

from dataclasses import replace

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.errors import Unsupported, UsageError

MAX_RANKS = 65_536


def reshard(checkpoint: Checkpoint, dp_degree: int) -> Layout:
    """The checkpoint's layout for `dp_degree` ranks. Partitioning itself belongs to the format's writer.

    Raises UsageError for a rank count that makes no sense, Unsupported for formats without ranks.
    """
    if not 1 <= dp_degree <= MAX_RANKS:
        raise UsageError(
            "bad-usage",
            f"a world size of {dp_degree} makes no sense",
            where=checkpoint.path,
            hint=f"give a whole number from 1 to {MAX_RANKS:,}",
        )
    if not checkpoint.layout.format.startswith("zero"):
        raise Unsupported(
            "not-zero",
            f"a {checkpoint.layout.format} checkpoint is not partitioned over ranks",
            where=checkpoint.path,
            why="any number of ranks can load it as it is",
            hint="reshard is for DeepSpeed ZeRO folders",
        )
    return replace(checkpoint.layout, dp_degree=dp_degree)
