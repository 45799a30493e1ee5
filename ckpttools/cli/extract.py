"""ckpt extract: weights only."""

from __future__ import annotations

from typing import Any

import click

from ckpttools.cli.options import DST, HF_CONFIG, KEY, SRC, parse_size, write, writing
from ckpttools.errors import UsageError
from ckpttools.location import Location


@click.command("extract")
@SRC
@DST
@click.option(
    "--weights-only",
    is_flag=True,
    expose_value=False,
    help="Weights and buffers, no optimizer state (always so here).",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "pt"]),
    help="safetensors (the default) or torch files.",
)
@click.option("--safe-serialization", is_flag=True, help="The same as --format safetensors.")
@click.option(
    "--dtype", metavar="DTYPE", help="Cast every floating point tensor: fp32, bf16, fp16, float32 ..."
)
@click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="The largest file of a folder."
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Only tensors whose name matches (repeatable)."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors whose name matches (repeatable).")
@click.option(
    "--source",
    "copy",
    type=click.Choice(["master", "model"]),
    help="fp32 master weights (the default where there are any) or the weights as trained with.",
)
@click.option(
    "--exclude-frozen-parameters",
    "exclude_frozen",
    is_flag=True,
    help="Leave out parameters that were not trained.",
)
@HF_CONFIG
@click.option(
    "--strip-prefix", default="", metavar="PREFIX", help="Remove this prefix from names that have it."
)
@KEY
@writing
def command(
    src: Location,
    dst: Location | None,
    form: Any,
    safe_serialization: bool,
    max_shard_size: str,
    **options: Any,
) -> None:
    """Write the weights of SRC, for inference or for other tools.

    DST may be a folder, which transformers loads, or one file (.safetensors, .pt, .bin ...). By default it is
    weights-of-SRC beside it. fp32 master weights are taken where they exist: they are what DeepSpeed's own
    zero_to_fp32 gives.
    """
    from ckpttools.operations.extract import extract

    if safe_serialization and form == "pt":
        raise UsageError(
            "bad-usage",
            "--safe-serialization and --format pt contradict each other",
            where="--format",
            why="safe serialization is safetensors, and .pt is a pickle",
            hint="leave one of them out",
        )
    form = "safetensors" if safe_serialization else form
    write(extract, src, dst, form=form, max_shard_size=parse_size(max_shard_size), **options)
