"""ckpt copy: a whole checkpoint to another place."""

from __future__ import annotations

from typing import Any

import click

from ckpttools.cli.options import (
    DRY_RUN,
    FOLLOW,
    FORCE,
    JSON,
    NO_PROGRESS,
    PLACE,
    QUIET,
    SRC,
    STATS,
    TAG,
    WORKERS,
    write,
)  # fmt: skip
from ckpttools.location import Location


@click.command("copy")
@SRC
@click.argument("dst", type=PLACE)
@TAG
@FOLLOW
@DRY_RUN
@FORCE
@JSON
@QUIET
@WORKERS
@STATS
@NO_PROGRESS
def command(src: Location, dst: Location, **options: Any) -> None:
    """Copy every file of a checkpoint, verified on the way; DST appears when it is whole.

    The headers of SRC are checked first, every checksum that its files state while they are read, and what
    was written is read back. SRC and DST may lie in stores (s3://bucket/run). After an interrupt the same
    command goes on from where it was: until then DST.ckpt-spread, or DST/ckpt-unfinished.json in a store,
    says what is finished.
    """
    from ckpttools.operations.copy import copy

    write(copy, src, dst, **options)
