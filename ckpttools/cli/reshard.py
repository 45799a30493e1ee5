"""ckpt reshard: ZeRO and distributed checkpoints for another number of ranks."""

from __future__ import annotations

from typing import Any

import click

from ckpttools.cli.options import DIGEST, DST, SRC, number, write, writing
from ckpttools.location import Location


@click.command("reshard")
@SRC
@DST
@number("--world-size", help="The number of data-parallel ranks to write for.")
@click.option(
    "--mesh",
    metavar="DPxTP",
    help="2x4: 2 data-parallel times 4 tensor-parallel ranks; of distributed checkpoints.",
)
@DIGEST
@writing
def command(src: Location, dst: Location | None, **options: Any) -> None:
    """Move a ZeRO or a distributed checkpoint to N ranks: weights, optimizer state and counters kept.

    Unmodified DeepSpeed resumes from the result on N ranks. SRC is never changed; DST (by default wsN-of-SRC
    beside it) appears when it is complete. SRC may be a folder with a `latest` file, a tag folder, an HF
    Trainer, Lightning or accelerate folder.
    """
    from ckpttools.operations.reshard import reshard

    write(reshard, src, dst, **options)
