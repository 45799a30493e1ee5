"""ckpt copy: a whole checkpoint to another place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import (
    DRY_RUN,
    FOLLOW,
    FORCE,
    JSON,
    NO_PROGRESS,
    PATH,
    QUIET,
    SRC,
    TAG,
    WORKERS,
    how,
)  # fmt: skip


@click.command("copy")
@SRC
@click.argument("dst", type=PATH)
@TAG
@FOLLOW
@DRY_RUN
@FORCE
@JSON
@QUIET
@WORKERS
@NO_PROGRESS
def command(src: Path, dst: Path, tag: str | None, **options: Any) -> None:
    """Copy every file of a checkpoint, verified on the way; DST appears when it is whole.

    The headers of SRC are checked first, every checksum that its files state while they are read, and what
    was written is read back. SRC may lie in a store (s3://bucket/run). After an interrupt the same command
    goes on from where it was: until then DST.ckpt-spread holds what is finished.
    """
    from ckpttools.operations.copy import copy

    render.written(copy(src, dst, tag=tag, how=how(options)), options)
