"""A part of a checkpoint's bytes: `2/7` the second of seven parts, `5%` as much of them taken at random.

Seven runs with 1/7 to 7/7 read every byte. Headers, and the files against each other, are checked whole.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TypeVar

from msgspec import Struct

from ckpttools.errors import UsageError
from ckpttools.location import Location
from ckpttools.passes.tasks import Task, sources
from ckpttools.plan import SourceCheck
from ckpttools.tensors import ByteRange

T = TypeVar("T")
MOST = 1_000_000  # parts


class Subset(Struct, frozen=True):
    """The `number`th of `parts`, or a `share` of the bytes."""

    text: str
    number: int = 1
    parts: int = 1
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Subset:
        """Raises UsageError for what is neither N/T nor P%."""
        part = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text.strip())
        if part and 1 <= int(part[1]) <= int(part[2]) <= MOST:
            return cls(part[0], int(part[1]), int(part[2]))
        percent = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", text.strip())
        if percent and 0 < float(percent[1]) <= 100:
            return cls(percent[0], share=float(percent[1]) / 100)
        raise UsageError(
            "bad-usage",
            f"{text!r} is no part of a whole",
            where="--subset",
            why=f"a part is a share from 0 to 100 %, or one of 1 to {MOST:,} equal parts",
            hint="write it as 5% or 2/7 (the second of seven)",
        )

    def of(
        self, tasks: Sequence[Task], checks: Sequence[SourceCheck]
    ) -> tuple[list[Task], tuple[SourceCheck, ...]]:
        """The records whose checksums are to be verified, with every task that reads in them; of what has
        no checksum, as large a share of the tasks.
        """
        chosen = self.take(checks, [check.source.nbytes for check in checks])
        inside, covered = _Ranges([c.source for c in chosen]), _Ranges([c.source for c in checks])
        free = [task for task in tasks if not any(map(covered.meets, sources(task)))]
        taken = {id(task) for task in self.take(free, [task.nbytes for task in free])}
        kept = [task for task in tasks if id(task) in taken or any(map(inside.meets, sources(task)))]
        return kept, tuple(chosen)

    def take(self, items: Sequence[T], nbytes: Sequence[int]) -> list[T]:
        """This part of the items, by number or by their sizes."""
        if self.share is None:
            return list(items[self.number - 1 :: self.parts])
        left = self.share * sum(nbytes)
        taken: set[int] = set()
        for i in random.sample(range(len(items)), len(items)):
            if left <= 0:
                break
            taken.add(i)
            left -= nbytes[i]
        return [item for i, item in enumerate(items) if i in taken]


class _Ranges:
    """Disjoint ranges of several files."""

    def __init__(self, ranges: Sequence[ByteRange]) -> None:
        self._starts: dict[Location, list[int]] = {}
        self._ends: dict[Location, list[int]] = {}
        for source in sorted(ranges, key=lambda r: r.start):
            self._starts.setdefault(source.path, []).append(source.start)
            self._ends.setdefault(source.path, []).append(source.end)

    def meets(self, source: ByteRange) -> bool:
        starts, ends = self._starts.get(source.path, []), self._ends.get(source.path, [])
        return bisect_right(ends, source.start) < bisect_left(starts, source.end)
