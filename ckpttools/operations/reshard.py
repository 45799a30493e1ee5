"""Native ZeRO to native ZeRO for another number of ranks."""

from __future__ import annotations

from pathlib import Path

from ckpttools.checks import check_before_use
from ckpttools.formats import zero
from ckpttools.formats.surroundings import with_surroundings
from ckpttools.operations import advice
from ckpttools.operations.source import find
from ckpttools.operations.writing import Writing, Written, carry_out
from ckpttools.siblings import default_dst
from ckpttools.transforms.reshard import reshard as resharded


def reshard(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    world_size: int,
    tag: str | None = None,
    how: Writing | None = None,
) -> Written:
    """Move a ZeRO-1 or ZeRO-2 checkpoint to `world_size` ranks: weights, optimizer state, counters kept.

    >>> made = reshard("fixtures/trainer/z2_bf16_2", out / "four", world_size=4)
    >>> made.destination.name, len([file for file in made.plan.files if "optim" in file.path])
    ('four', 4)
    """
    src = Path(src)
    source = find(src, tag)
    checkpoint = check_before_use(source)
    layout = resharded(checkpoint, world_size)
    changed = layout.dp_degree != checkpoint.layout.dp_degree
    plan = with_surroundings(source, zero.plan(checkpoint, layout), ranks_change=changed)
    dst = Path(dst) if dst is not None else default_dst(src, f"ws{world_size}")
    steps = advice.resume(source, checkpoint, dst, world_size)
    return carry_out(src, dst, plan, how or Writing(), label="reshard", next=steps)
