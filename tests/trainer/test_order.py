"""Which samples an update sees: pure arithmetic, whatever the ranks, the batch size and the interruptions."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpttools.errors import UsageError
from ckpttools.trainer.config import Batch
from ckpttools.trainer.order import Order
from ckpttools.trainer.split import Split, split


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_micro_batches_are_the_same_for_every_number_of_ranks(
    micro: int, accumulation: int, world: int
) -> None:
    ids = list(range(micro * accumulation * world))
    one = Split(micro=micro, accumulation=accumulation * world, world=1).micro_batches(ids, 0)
    shared = Split(micro=micro, accumulation=accumulation, world=world)
    many = [batch for rank in range(world) for batch in shared.micro_batches(ids, rank)]
    assert sorted(many) == sorted(one)
    assert sorted(i for batch in many for i in batch) == ids


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 30))
def test_an_epoch_shows_every_sample_once_and_resumes_anywhere(
    n: int, size: int, seed: int, stop: int
) -> None:
    order = Order(dataset_size=n, global_batch_size=size, seed=seed)
    assert sorted(order.permutation(3)) == list(range(n))
    whole = list(order.batches(3))
    assert len(whole) == order.updates_per_epoch
    assert len({i for batch in whole for i in batch}) == len(whole) * size
    before = list(islice(order.batches(3), stop))
    assert before + list(order.batches(3, consumed=len(before) * size)) == whole


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 8))
def test_a_changed_batch_size_goes_on_at_the_next_sample(old: int, new: int, updates: int) -> None:
    ids = Order(dataset_size=100, global_batch_size=old, seed=1).permutation(0)
    later = Order(dataset_size=100, global_batch_size=new, seed=1).batches(0, consumed=old * updates)
    seen = [i for batch in later for i in batch]
    assert seen == ids[old * updates :][: len(seen)]
    assert 100 - old * updates - len(seen) < new


def test_epochs_and_seeds_differ_and_the_sequence_never_changes() -> None:
    order = Order(dataset_size=8, global_batch_size=4, seed=7)
    assert order.permutation(0) != order.permutation(1)
    assert order.permutation(0) != Order(dataset_size=8, global_batch_size=4, seed=8).permutation(0)
    assert order.permutation(0) == GOLDEN  # a checkpoint of today resumes with any later version


GOLDEN = [1, 2, 6, 4, 3, 5, 0, 7]


@pytest.mark.parametrize(
    ("batch", "world", "want"),
    [
        (Batch(global_batch_size=32, micro_batch_size=4), 2, (4, 4)),
        (Batch(global_batch_size=32, micro_batch_size=4), 4, (4, 2)),
        (Batch(global_batch_size=32, gradient_accumulation_steps=2), 4, (4, 2)),
        (Batch(global_batch_size=32), 8, (4, 1)),
        (Batch(global_batch_size=32, micro_batch_size=4, gradient_accumulation_steps=8), 1, (4, 8)),
    ],
)
def test_what_the_config_leaves_open_is_derived(batch: Batch, world: int, want: tuple[int, int]) -> None:
    result = split(batch, world)
    assert (result.micro, result.accumulation) == want


@pytest.mark.parametrize(
    ("batch", "world", "hint"),
    [
        (Batch(global_batch_size=32, micro_batch_size=3), 2, "1, 2, 4, 8, 16"),
        (Batch(global_batch_size=32, micro_batch_size=64), 1, "1, 2, 4, 8, 16, 32"),
        (Batch(global_batch_size=32), 3, "one of these numbers of ranks: 1, 2, 4, 8, 16, 32"),
        (Batch(global_batch_size=32, micro_batch_size=4, gradient_accumulation_steps=4), 4, "1, 2, 4, 8"),
        (Batch(global_batch_size=8, micro_batch_size=4, gradient_accumulation_steps=4), 1, "1, 2, 4, 8"),
    ],
)
def test_a_global_batch_that_cannot_be_made_is_refused(batch: Batch, world: int, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        split(batch, world)
    assert caught.value.id == "train-batch"
    assert hint in caught.value.hint
