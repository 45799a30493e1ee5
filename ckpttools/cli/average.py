"""ckpt average: the mean of the weights of several checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpttools.cli.options import (
    DRY_RUN,
    FOLLOW,
    FORCE,
    JSON,
    NO_PROGRESS,
    PATH,
    QUIET,
    SPREAD,
    TAGS,
    WORKERS,
    parse_size,
    write,
)  # fmt: skip


def _numbers(context: click.Context, param: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers: write 1,2,1", context, param) from None


@click.command("average")
@click.argument("sources", metavar="SRC...", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", "dst", type=PATH, metavar="DST", required=True, help="A folder, or one file.")
@click.option(
    "--weights",
    callback=_numbers,
    metavar="1,2,...",
    help="How much each SRC counts; all the same by default.",
)
@click.option(
    "--last", type=click.IntRange(min=2), metavar="K", help="The newest K checkpoints of the run SRC."
)
@click.option("--dtype", metavar="DTYPE", help="Write fp32, bf16 or fp16, rounded once from the sums.")
@click.option("--format", "form", type=click.Choice(["safetensors", "pt"]), help="By the suffix of DST.")
@click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="The largest file of a folder."
)
@TAGS
@FOLLOW
@DRY_RUN
@FORCE
@JSON
@QUIET
@SPREAD
@WORKERS
@NO_PROGRESS
def command(sources: tuple[Path, ...], max_shard_size: str, **options: Any) -> None:
    """Write the mean of the weights of several checkpoints of one model to DST.

    Of each its best copy is taken (fp32 master weights where there are any), whatever its layout. Sums are in
    float64 and rounded once; integers, counters and the configuration are those of the last SRC. Checkpoints
    whose names or shapes differ are refused. Each is read once, in flat memory.

        ckpt average run/checkpoint-10 run/checkpoint-20 -o mean
    """
    from ckpttools.operations.average import average

    write(average, *sources, max_shard_size=parse_size(max_shard_size), **options)
