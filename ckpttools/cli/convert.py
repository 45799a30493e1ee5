"""ckpt convert: one format into another, with the optimizer."""

from __future__ import annotations

from typing import Any

import click

from ckpttools.cli.options import DIGEST, HF_CONFIG, KEY, PATH, PLACE, SRC, write, writing
from ckpttools.errors import UsageError, escape
from ckpttools.location import Location


@click.command("convert")
@SRC
@click.argument("dst", type=PLACE)
@click.option(
    "--to",
    required=True,
    metavar="FORMAT",
    help="pt (one file), zero0, zero1, zero2, zero3, universal (DeepSpeed folders), dcp (torch distributed), "
    "hf (weights).",
)
@click.option("--world-size", type=int, metavar="N", help="The ranks to write for: zero1, zero2, zero3, dcp.")
@click.option(
    "--mesh",
    metavar="DPxTP",
    help="2x4: 2 data-parallel times 4 tensor-parallel ranks, instead of --world-size: dcp.",
)
@click.option("--dtype", metavar="DTYPE", help="Of the weights: bf16, fp16, fp32. Masters stay fp32.")
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Only parameters whose name matches (repeatable)."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="No parameters whose name matches.")
@click.option(
    "--rename",
    multiple=True,
    metavar="PATTERN=NEW",
    help="Replace a regular expression in every name (repeatable, in order).",
)
@click.option("--reset-optimizer", is_flag=True, help="Leave the optimizer's state out; keep its settings.")
@click.option(
    "--optimizer-class",
    metavar="NAME",
    help="The class that will load the groups: AdamW, SGD, Muon, FusedAdam, DeepSpeedCPUAdam ...",
)
@click.option(
    "--like",
    type=PATH,
    metavar="CHECKPOINT",
    help="Of the run that will load it: its names, parameter order, groups, settings and dtype.",
)
@click.option(
    "--dcp-layout",
    type=click.Choice(["nested", "flat", "titan", "accelerate"]),
    help="How a distributed checkpoint names its state; nested by default.",
)
@HF_CONFIG
@KEY
@DIGEST
@writing
def command(src: Location, dst: Location, rename: tuple[str, ...], **options: Any) -> None:
    """Write SRC in another format at DST: weights, optimizer state, schedule and counters.

    Where the format keeps one copy of a weight it gets the fp32 master. What it cannot hold is named. New
    DeepSpeed folders are plain: no round-robin order, no alignment.
    """
    from ckpttools.operations.convert import convert

    write(convert, src, dst, rename=[_rule(text) for text in rename], **options)


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, new = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            "bad-usage",
            f"'{escape(text)}' is no renaming",
            where="--rename",
            why="it has no = between what is sought and what takes its place",
            hint=r"a regular expression, = and its replacement: --rename '^model\.='",
        )
    return pattern, new
