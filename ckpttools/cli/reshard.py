"""ckpt reshard: native ZeRO to native ZeRO for another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpttools.cli.options import DST, SRC, writing
from ckpttools.cli.write import Writing, write
from ckpttools.siblings import default_dst


@click.command("reshard")
@SRC
@DST
@click.option(
    "--world-size",
    type=int,
    required=True,
    metavar="N",
    help="The number of data-parallel ranks to write for.",
)
@writing
def command(src: Path, dst: Path | None, world_size: int, tag: str | None, **options: Any) -> None:
    """Move a ZeRO-1 or ZeRO-2 checkpoint to N ranks: weights, optimizer state and counters kept.

    Unmodified DeepSpeed resumes from the result on N ranks. SRC is never changed; DST (by default wsN-of-SRC
    beside it) appears when it is complete. SRC may be a folder with a `latest` file, a tag folder, an HF
    Trainer, Lightning or accelerate folder.
    """
    from ckpttools.checks import check_before_use
    from ckpttools.formats import locate, zero
    from ckpttools.formats.surroundings import with_surroundings
    from ckpttools.transforms.reshard import reshard

    source = locate(src, tag)
    checkpoint = check_before_use(source)
    resharded = reshard(checkpoint, world_size)
    plan = with_surroundings(
        source, zero.plan(resharded), ranks_change=world_size != checkpoint.layout.dp_degree
    )
    dst = dst or default_dst(src, f"ws{world_size}")
    write(plan, Writing(src=src, dst=dst, **options), "reshard")
