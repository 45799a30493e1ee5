"""How counters count, and the same place in the data under another batch size.

A run's counter advances by one per micro-batch (MMEngine, OpenPCDet) or per optimizer update (DeepSpeed,
Hugging Face, Lightning). With `size` samples, `ranks` processes, `micro` samples per process and step, and
`accumulation` micro-batches per update:

    batches per epoch   ceil(ceil(size / ranks) / micro), or floor where the last, partial batch is dropped
    updates per epoch   ceil(batches / accumulation)   "flush": Trainer >= 4.52, Lightning, accelerate
                        floor(batches / accumulation)  "floor": older Trainers
                        batches / accumulation         "running": DeepSpeed and MMEngine count on over
                                                       the end of an epoch, so this need not be whole
                        floor(size / (micro * ranks * accumulation))
                                                       "drop": `ckpt train` drops the last global batch

Everything here is exact: whole numbers and fractions, never floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from msgspec import Struct

from ckpttools.errors import UsageError

Unit = Literal["micro", "update"]
Remainder = Literal["flush", "floor", "running", "drop"]


class Batch(Struct, frozen=True, kw_only=True):
    """`micro` samples per rank and forward pass; an update sums `accumulation` of them on every rank."""

    micro: int
    accumulation: int = 1
    ranks: int = 1

    @property
    def step(self) -> int:
        """Samples that all ranks together see in one micro-batch."""
        return self.micro * self.ranks

    @property
    def total(self) -> int:
        """The effective batch: samples per update."""
        return self.step * self.accumulation

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{self.total} = {self.micro} x {ranks} x {self.accumulation} accumulated"


class Data(Struct, frozen=True, kw_only=True):
    """A dataset of `size` samples; `drop_last` leaves out the loader's last, partial batch."""

    size: int
    drop_last: bool = False

    def batches(self, batch: Batch) -> int:
        """Micro-batches per epoch and rank. Raises UsageError where an epoch has none."""
        per_rank = -(-self.size // batch.ranks)
        count = per_rank // batch.micro if self.drop_last else -(-per_rank // batch.micro)
        if count < 1:
            raise UsageError(
                "epoch-empty",
                f"{self.size} samples hold no whole batch of {batch.micro} on {batch.ranks} ranks",
                why="the last, partial batch is dropped, and there is no other",
                hint="check --dataset-size and the batch, or leave out --drop-last",
            )
        return count


def updates(batches: int, accumulation: int, remainder: Remainder) -> Fraction:
    """Updates per epoch of `batches` micro-batches. Not for "drop", which is not a matter of these."""
    whole = Fraction(batches, accumulation)
    match remainder:
        case "flush":
            return Fraction(math.ceil(whole))
        case "floor":
            return Fraction(max(1, math.floor(whole)))
        case _:
            return whole


class Clock(Struct, frozen=True, kw_only=True):
    """A counter: the samples that one unit stands for, and the units of an epoch.

    `epoch` is None for a stream without epochs. `size` is what an epoch shows of the data: its last unit
    may hold fewer samples than the others. `repeats` is how often one unit is counted (accelerate steps a
    scheduler once per process).
    """

    samples: int
    epoch: Fraction | None = None
    size: int | None = None
    repeats: int = 1

    @classmethod
    def of(cls, batch: Batch, unit: Unit, data: Data | None, remainder: Remainder = "flush") -> Clock:
        """The clock of a run; without `data` it has no epochs."""
        samples = batch.step if unit == "micro" else batch.total
        if data is None:
            return cls(samples=samples)
        if remainder == "drop":
            whole = Data(size=data.size, drop_last=True).batches(Batch(micro=batch.total))
            return cls(samples=samples, epoch=Fraction(whole), size=whole * samples)
        batches = data.batches(batch)
        epoch = Fraction(batches) if unit == "micro" else updates(batches, batch.accumulation, remainder)
        seen = min(data.size, batches * batch.step) if data.drop_last else data.size
        return cls(samples=samples, epoch=epoch, size=seen)

    def samples_at(self, count: int) -> Fraction:
        """Samples seen after `count` units, with whole epochs counted as `size` each."""
        units = Fraction(count, self.repeats)
        if self.epoch is None or self.size is None:
            return units * self.samples
        epochs = math.floor(units / self.epoch)
        inside = min((units - epochs * self.epoch) * self.samples, Fraction(self.size))
        return epochs * self.size + inside


class Steps(Struct, frozen=True, kw_only=True):
    """One counter under two batch sizes: where a count and a length of the old run lie in the new one.

    `old_total` and `new_total` are the run's lengths in units, where they are known: the old end maps to the
    new one exactly. Inside an epoch positions are rounded down to `multiple` units: a count of micro-batches
    must not lie within an accumulation, whose gradients no checkpoint holds. With `across`, accumulations run
    over the ends of epochs.
    """

    old: Clock
    new: Clock
    old_total: int | None = None
    new_total: int | None = None
    multiple: int = 1
    across: bool = False

    @property
    def ratio(self) -> Fraction:
        """New units per old unit: by epochs where both clocks have them, else by samples."""
        if self.old.epoch is not None and self.new.epoch is not None:
            plain = self.new.epoch / self.old.epoch
        else:
            plain = Fraction(self.old.samples, self.new.samples)
        return plain * self.new.repeats / self.old.repeats

    @property
    def is_identity(self) -> bool:
        """Whether every count stays as it is."""
        return self.old == self.new and self.old_total == self.new_total and self.multiple == 1

    def position(self, count: int) -> int:
        """The count of the new run at the same place in the data.

        Whole epochs map to whole epochs. Inside an epoch it is the last count that has not gone past the
        old run's samples: no sample is left out, and fewer than one new unit's are seen again.
        """
        if count == self.old_total and self.new_total is not None:
            return self.new_total
        units = Fraction(count, self.old.repeats)
        if self.old.epoch is None or self.new.epoch is None:
            moved = Fraction(self._whole(units * self.old.samples / self.new.samples, 0))
        else:
            assert self.old.size is not None
            epochs = math.floor(units / self.old.epoch)
            seen = min((units - epochs * self.old.epoch) * self.old.samples, Fraction(self.old.size))
            inside = min(self.new.epoch, seen / self.new.samples)
            start = epochs * self.new.epoch
            if inside in (0, self.new.epoch):
                moved = Fraction(math.floor(start + inside))
            else:
                moved = Fraction(self._whole(start + inside, 0 if self.across else start))
                moved = max(moved, Fraction(math.floor(start)))
        found = int(moved * self.new.repeats)
        return found if self.new_total is None else min(found, self.new_total)

    def _whole(self, units: Fraction, start: Fraction | int) -> int:
        """The whole units done, in multiples counted from `start`."""
        if self.multiple == 1:
            return math.floor(units)
        return math.floor(start + (units - start) // self.multiple * self.multiple)

    def length(self, units: int | Fraction) -> Fraction:
        """A length (warmup, period, milestone) in units of the new run; unrounded."""
        if units == self.old_total and self.new_total is not None:
            return Fraction(self.new_total)
        return units * self.ratio

    def epochs(self, units: int | Fraction) -> Fraction | None:
        """A length of the old run in epochs."""
        return None if self.old.epoch is None else Fraction(units) / self.old.epoch / self.old.repeats


MAX_SIZE = 10**15


def check_sizes(options: Mapping[str, int | None], most: int = MAX_SIZE) -> None:
    """Raise UsageError for a size, by the option that gave it, that cannot be one. None is not given."""
    for option, value in options.items():
        if value is not None and not 1 <= value <= most:
            raise UsageError(
                "bad-usage",
                f"{option} {value} makes no sense",
                why="sizes are counted from 1",
                where=option,
                hint=f"give a whole number from 1 to {most:,}",
            )


def nearest(value: Fraction) -> int:
    """The nearest whole number; halves go up."""
    return math.floor(value + Fraction(1, 2))
