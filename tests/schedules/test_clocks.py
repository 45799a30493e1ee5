"""Counting: epochs as torch's own loaders count them, positions against a run that is played through."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from ckpttools.errors import UsageError
from ckpttools.schedules.batch import lengths, meaning, ways
from ckpttools.schedules.lengths import Batch, Clock, Data, Remainder, Steps, Unit, nearest

BATCHES = st.builds(Batch, micro=st.integers(1, 9), accumulation=st.integers(1, 4), ranks=st.integers(1, 4))
SIZES = st.integers(40, 400)
UNITS = st.sampled_from(["micro", "update"])
REMAINDERS = st.sampled_from(["flush", "running"])


@given(size=SIZES, batch=BATCHES, drop=st.booleans())
def test_an_epoch_has_the_batches_of_torchs_loader(size: int, batch: Batch, drop: bool) -> None:
    data = list(range(size))
    sampler: DistributedSampler[int] = DistributedSampler(data, num_replicas=batch.ranks, rank=0)  # type: ignore[arg-type]
    loader = DataLoader(data, batch_size=batch.micro, sampler=sampler, drop_last=drop)  # type: ignore[arg-type]
    assert Data(size=size, drop_last=drop).batches(batch) == len(loader)


def played(batch: Batch, unit: Unit, size: int, remainder: Remainder, epochs: int) -> list[int]:
    """The samples seen before each unit and at the end, by going through the epochs."""
    seen = [0]
    open_batches = 0
    per_rank = math.ceil(size / batch.ranks)
    per_epoch = math.ceil(per_rank / batch.micro)
    for epoch in range(epochs):
        for i in range(per_epoch):
            now = epoch * size + min((i + 1) * batch.step, size)
            open_batches += 1
            full = open_batches == batch.accumulation or (remainder == "flush" and i + 1 == per_epoch)
            if unit == "micro" or full:
                seen.append(now)
            if full:
                open_batches = 0
    return seen


@given(size=SIZES, old=BATCHES, new=BATCHES, unit=UNITS, epochs=st.integers(1, 4))
def test_a_position_is_the_last_one_that_has_seen_no_more(
    size: int, old: Batch, new: Batch, unit: Unit, epochs: int
) -> None:
    """Over a whole run of both: no sample is left out, fewer than one new unit's are seen again."""
    data = Data(size=size)
    before, after = (Clock.of(batch, unit, data) for batch in (old, new))
    steps = Steps(old=before, new=after)
    played_old, played_new = (played(b, unit, size, "flush", epochs) for b in (old, new))
    for count, seen in enumerate(played_old):
        assert before.samples_at(count) == seen
        position = steps.position(count)
        assert played_new[position] <= seen
        assert position + 1 == len(played_new) or played_new[position + 1] > seen
    whole = [n for n, seen in enumerate(played_old) if seen % size == 0]
    assert [played_new[steps.position(n)] for n in whole] == [played_old[n] for n in whole]


@given(size=SIZES, old=BATCHES, new=BATCHES, unit=UNITS, remainder=REMAINDERS, drop=st.booleans())
def test_positions_are_monotone_and_come_back(
    size: int, old: Batch, new: Batch, unit: Unit, remainder: Remainder, drop: bool
) -> None:
    data = Data(size=size, drop_last=drop)
    before, after = (Clock.of(batch, unit, data, remainder) for batch in (old, new))
    there, back = Steps(old=before, new=after), Steps(old=after, new=before)
    found = [there.position(n) for n in range(60)]
    assert found[0] == 0
    assert all(a <= b for a, b in pairwise(found))
    # back within a unit of the coarser clock; forward only over what a loader drops at the end of an epoch
    unit_again = max(1, -(-after.samples // before.samples))
    for count, position in enumerate(found):
        assert count - unit_again <= back.position(position) <= count + unit_again * drop


@given(size=SIZES, old=BATCHES, new=BATCHES, epochs=st.integers(1, 5), unit=UNITS)
def test_the_end_of_the_run_is_the_end_of_the_run(
    size: int, old: Batch, new: Batch, epochs: int, unit: Unit
) -> None:
    data = Data(size=size)
    before, after = (Clock.of(batch, unit, data) for batch in (old, new))
    totals = [int(epochs * clock.epoch) for clock in (before, after) if clock.epoch is not None]
    steps = Steps(old=before, new=after, old_total=totals[0], new_total=totals[1])
    assert steps.position(totals[0]) == totals[1]
    assert steps.length(totals[0]) == totals[1]
    assert all(steps.position(n) <= totals[1] for n in range(totals[0] + 1))


def test_the_ratio_of_batches_is_not_the_position() -> None:
    """50 samples, 4 or 8 at a time: 13 or 7 iterations an epoch, the last of each with two samples."""
    data = Data(size=50)
    steps = Steps(old=Clock.of(Batch(micro=4), "micro", data), new=Clock.of(Batch(micro=8), "micro", data))
    assert [steps.position(n) for n in (0, 13, 30, 78)] == [0, 7, 16, 42]
    assert steps.length(13) == 7 and steps.length(26) == 14


def test_updates_count_over_the_end_of_an_epoch_in_deepspeed() -> None:
    """39 micro-batches in three epochs make 19 updates of two, not 3 x 7."""
    clock = Clock.of(Batch(micro=4, accumulation=2), "update", Data(size=52), "running")
    assert clock.epoch == Fraction(13, 2)
    assert int(3 * Fraction(13, 2)) == 19


def test_a_stream_goes_by_samples() -> None:
    steps = Steps(old=Clock.of(Batch(micro=8), "update", None), new=Clock.of(Batch(micro=3), "update", None))
    assert [steps.position(n) for n in (0, 1, 3, 10)] == [0, 2, 8, 26]
    assert steps.length(3) == 8


def test_an_epoch_without_a_whole_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="no whole batch"):
        Data(size=3, drop_last=True).batches(Batch(micro=4))


def test_the_guides_numbers() -> None:
    """R21 and R22: 100,000 samples, 2 GPUs, 8 epochs."""
    data = Data(size=100_000, drop_last=True)
    run = lengths(Batch(micro=64, ranks=2, accumulation=2), data, 8)
    assert (run.batch.total, run.per_epoch, run.iterations, run.updates) == (256, 781, 6248, 3124)
    old, new = (lengths(Batch(micro=micro, ranks=2), data, 8) for micro in (128, 64))
    means = [meaning(1500, each) for each in (old, new)]
    assert [round(float(m.epochs), 2) for m in means] == [3.85, 1.92]
    assert [round(float(m.share or 0) * 100) for m in means] == [48, 24]


@given(old=BATCHES, micro=st.integers(1, 16))
def test_every_exact_way_keeps_the_batch(old: Batch, micro: int) -> None:
    found = ways(old, micro)
    assert found
    exact = [way for way in found if way.off == 0]
    assert all(way.batch.total == old.total and way.batch.micro == micro for way in exact)
    if old.total % micro == 0:
        assert exact and len(exact) == len(found)


@given(value=st.fractions(0, 1000))
def test_nearest_is_nearest(value: Fraction) -> None:
    assert abs(nearest(value) - value) <= Fraction(1, 2)
    assert torch.tensor(float(nearest(value))).item() == nearest(value)
