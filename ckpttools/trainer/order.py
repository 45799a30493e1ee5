"""The order of samples: a permutation per epoch, cut into global batches; nothing depends on the ranks.

A position is (epoch, samples consumed in it). Resuming is starting the same sequence at a position, so
no sample is seen twice or skipped, whatever changed in the number of ranks or in the batch size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from msgspec import Struct


class Order(Struct, frozen=True, kw_only=True):
    """The samples of a data set in training order; an epoch's last incomplete batch is dropped."""

    dataset_size: int
    global_batch_size: int
    seed: int

    @property
    def updates_per_epoch(self) -> int:
        return self.dataset_size // self.global_batch_size

    def permutation(self, epoch: int) -> list[int]:
        """All sample ids, in the order of one epoch (counted from 0).

        Sorting by `random()` rather than `shuffle()`: Python promises the same `random()` sequence for
        a seed in every later version, and does not promise that for the other methods.
        """
        generator = random.Random(self.seed << 32 | epoch)
        keys = [generator.random() for _ in range(self.dataset_size)]
        return sorted(range(self.dataset_size), key=keys.__getitem__)

    def batches(self, epoch: int, consumed: int = 0) -> Iterator[list[int]]:
        """The global batches of an epoch that remain after `consumed` samples of it."""
        ids = self.permutation(epoch)
        for start in range(consumed, self.dataset_size - self.global_batch_size + 1, self.global_batch_size):
            yield ids[start : start + self.global_batch_size]
