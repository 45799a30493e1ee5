"""The changes of batch that every family is tried on: old and new clocks, and the lengths of both runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import pytest

from ckpttools.schedules.lengths import Batch, Clock, Data, Remainder, Steps, Unit

# samples of an epoch: one that every batch divides, one that none does; the long ones for the heavy sweep
SMALL, LARGE = (72, 79), (480, 487)
BY_SIZE = pytest.mark.parametrize(
    "sizes", [pytest.param(SMALL, id="short"), pytest.param(LARGE, id="long", marks=pytest.mark.heavy)]
)
RATIOS = [Fraction(*r) for r in ((1, 4), (1, 3), (1, 2), (2, 3), (1, 1), (3, 2), (2, 1), (3, 1), (4, 1))]


@dataclass(frozen=True, slots=True)
class Change:
    """A change of batch; `old` and `new` are units per epoch."""

    name: str
    steps: Steps
    old: int
    new: int

    def unit(self, per_epoch: int) -> Callable[[float], int]:
        """Epochs -> units, as a user computes them."""
        return lambda epochs: round(epochs * per_epoch)

    def places(self) -> Iterator[int]:
        """Counts at the start, in the warmup, at and around epoch ends, in the middle, and at the end."""
        total = self.steps.old_total
        assert total is not None
        n = self.old
        yield from sorted({0, 1, n // 2, n, n + 1, 2 * n - 1, 3 * n + n // 3, 5 * n, total - 1, total})


def change(
    name: str,
    old: Batch,
    new: Batch,
    size: int,
    epochs: int,
    unit: Unit = "update",
    remainder: Remainder = "flush",
) -> Change:
    a, b = Clock.of(old, unit, Data(size=size), remainder), Clock.of(new, unit, Data(size=size), remainder)
    assert a.epoch is not None and b.epoch is not None
    steps = Steps(old=a, new=b, old_total=int(a.epoch * epochs), new_total=int(b.epoch * epochs))
    return Change(name, steps, int(a.epoch), int(b.epoch))


def changes(epochs: int, sizes: tuple[int, int], unit: Unit = "update") -> list[Change]:
    """All ratios, with epochs that divide and that do not, and changes of accumulation and ranks."""
    out = []
    for ratio in RATIOS:
        for size in sizes:
            new = Batch(micro=int(12 * ratio))
            out.append(change(f"x{ratio} of {size}", Batch(micro=12), new, size, epochs, unit))
    for size in sizes:
        plain, summed = Batch(micro=4, ranks=2), Batch(micro=4, ranks=2, accumulation=3)
        out.append(change(f"accumulation 1 to 3 of {size}", plain, summed, size, epochs, unit))
        out.append(change(f"accumulation 3 to 1 of {size}", summed, plain, size, epochs, unit))
        wide = Batch(micro=4, ranks=5)
        out.append(change(f"2 ranks to 5 of {size}", plain, wide, size, epochs, unit))
        out.append(change(f"5 ranks to 2, micro-batches of {size}", wide, plain, size, epochs, "micro"))
    return out
