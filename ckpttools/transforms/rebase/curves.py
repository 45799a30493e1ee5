"""The learning rate over samples, to be drawn: before a rebase, after it, and without one."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ckpttools.schedules import Program
from ckpttools.schedules.lengths import Clock, Steps

Moved = tuple[Program, Program, Steps]  # a schedule before and after, and how its counts map


class Curve(Struct, frozen=True, kw_only=True):
    """A learning rate per unit, of the first parameter group, and the samples seen before each."""

    samples: tuple[float, ...]
    lr: tuple[float, ...]


def curves(programs: Sequence[Moved], limit: int = 20_000) -> tuple[Curve, Curve, Curve] | None:
    """Before, after, and without a rebase, for the first schedule that can be replayed; else None."""
    for old, new, steps in programs:
        if not (old.known and new.known):
            continue
        old_total, new_total = old.length() or steps.old_total, new.length() or steps.new_total
        if not old_total or not new_total:
            continue
        left = max(0, new_total - new.count)
        after = _curve(new.curve(new_total), steps.new, 0, limit)
        before = _curve(old.curve(old_total), steps.old, 0, limit)
        ahead = _curve(old.ahead(left), steps.new, new.count, limit)
        return before, after, ahead
    return None


def _curve(values: Sequence[float], clock: Clock, start: int, limit: int) -> Curve:
    """Values from `start` units on; every n-th of more than `limit`."""
    chosen = range(0, len(values), max(1, len(values) // limit))
    return Curve(
        samples=tuple(float(clock.samples_at(start + i)) for i in chosen),
        lr=tuple(values[i] for i in chosen),
    )
