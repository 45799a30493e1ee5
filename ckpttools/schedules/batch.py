"""Batch arithmetic for people: what a batch makes of a dataset, what an iteration number means, and how
to keep an effective batch when the batch per GPU must change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from msgspec import Struct

from ckpttools.schedules.lengths import Batch, Data

MAX_RANKS = 4096
MOST = 12  # ways that are shown


class Lengths(Struct, frozen=True, kw_only=True):
    """What a run comes to: `iterations` are micro-batches per rank, `updates` whole accumulations of them, or
    those of each epoch with a last one of fewer.
    """

    batch: Batch
    per_epoch: int
    iterations: int | None
    updates: int | None


def lengths(batch: Batch, data: Data, epochs: float | None, *, flush: bool = False) -> Lengths:
    """`flush`: each epoch ends with an update. Raises UsageError where an epoch has no whole batch and
    partial ones are dropped.
    """
    per_epoch = data.batches(batch)
    iterations = None if epochs is None else math.ceil(per_epoch * epochs)
    updates = None if iterations is None else iterations // batch.accumulation
    if flush and iterations is not None:
        whole, rest = divmod(iterations, per_epoch)
        updates = whole * -(-per_epoch // batch.accumulation) + -(-rest // batch.accumulation)
    return Lengths(batch=batch, per_epoch=per_epoch, iterations=iterations, updates=updates)


class Meaning(Struct, frozen=True, kw_only=True):
    """Where an iteration number lies in a run: epochs done, the share of the run, samples seen."""

    iteration: int
    epochs: Fraction
    share: Fraction | None
    samples: int


def meaning(iteration: int, run: Lengths) -> Meaning:
    """What `iteration` micro-batches are in a run."""
    return Meaning(
        iteration=iteration,
        epochs=Fraction(iteration, run.per_epoch),
        share=None if run.iterations is None else Fraction(iteration, run.iterations),
        samples=iteration * run.batch.step,
    )


class Way(Struct, frozen=True, kw_only=True):
    """One way to come to an effective batch; `off` is by how much it misses it, as a share of it."""

    batch: Batch
    changes: str
    off: Fraction


def ways(old: Batch, micro: int, gpus: int | None = None) -> list[Way]:
    """Batches with `micro` samples per GPU that make the old effective batch: by accumulation, GPUs, or both.

    `gpus` fixes the number of GPUs. Exact ones come first, with the fewest GPUs changed; where there are
    none, the nearest.
    """
    exact = list(_ways(old, micro, gpus, exact=True))
    found = exact or list(_ways(old, micro, gpus, exact=False))
    found.sort(key=lambda w: (abs(w.off), w.batch.ranks != old.ranks, _distance(w.batch.ranks, old.ranks)))
    return found[:MOST]


def _distance(a: int, b: int) -> Fraction:
    return max(Fraction(a, b), Fraction(b, a))


def _ways(old: Batch, micro: int, gpus: int | None, *, exact: bool) -> Iterator[Way]:
    share = Fraction(old.total, micro)  # GPUs x accumulation
    most = min(MAX_RANKS, max(int(share), 1), 8 * old.ranks)
    for ranks in (gpus,) if gpus is not None else range(1, most + 1):
        best = max(1, round(share / ranks))
        if exact and best * ranks != share:
            continue
        batch = Batch(micro=micro, accumulation=best, ranks=ranks)
        same_ranks, same_accumulation = ranks == old.ranks, best == old.accumulation
        changes = {
            (True, True): "the batch per GPU only",
            (True, False): "accumulation",
            (False, True): "GPUs",
            (False, False): "GPUs and accumulation",
        }[same_ranks, same_accumulation]
        yield Way(batch=batch, changes=changes, off=Fraction(batch.total - old.total, old.total))
