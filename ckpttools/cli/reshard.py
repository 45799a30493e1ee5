"""ckpt reshard: ZeRO and distributed checkpoints for another number of ranks."""

from __future__ import annotations

from typing import Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import DIGEST, DST, SRC, how, writing
from ckpttools.location import Location


@click.command("reshard")
@SRC
@DST
@click.option(
    "--world-size",
    type=int,
    metavar="N",
    help="The number of data-parallel ranks to write for.",
)
@click.option(
    "--mesh",
    metavar="DPxTP",
    help="2x4: 2 data-parallel times 4 tensor-parallel ranks; of distributed checkpoints.",
)
@DIGEST
@writing
def command(
    src: Location,
    dst: Location | None,
    world_size: int | None,
    mesh: str | None,
    digest: bool | None,
    tag: str | None,
    **options: Any,
) -> None:
    """Move a ZeRO or a distributed checkpoint to N ranks: weights, optimizer state and counters kept.

    Unmodified DeepSpeed resumes from the result on N ranks. SRC is never changed; DST (by default wsN-of-SRC
    beside it) appears when it is complete. SRC may be a folder with a `latest` file, a tag folder, an HF
    Trainer, Lightning or accelerate folder.
    """
    from ckpttools.operations.reshard import reshard

    written = reshard(src, dst, world_size=world_size, mesh=mesh, tag=tag, digest=digest, how=how(options))
    render.written(written, options)
