"""Which bytes: sequences of chunks that are cut, ranges that are read once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise

from ckpttools.location import Location
from ckpttools.tensors import ByteRange, Source, Zeros


class Cutter:
    """Cuts a sequence of chunks from front to back, in time linear in their number."""

    def __init__(self, chunks: Iterable[Source]) -> None:
        self._rest = iter(chunks)
        self._chunk: Source = Zeros(0)

    def take(self, nbytes: int) -> tuple[Source, ...]:
        """The next `nbytes` bytes, fewer at the end."""
        out: list[Source] = []
        while nbytes:
            if not self._chunk.nbytes:
                following = next(self._rest, None)
                if following is None:
                    break
                self._chunk = following
                continue
            here = min(nbytes, self._chunk.nbytes)
            out.append(self._chunk.cut(0, here))
            self._chunk = self._chunk.cut(here, self._chunk.nbytes - here)
            nbytes -= here
        return tuple(out)


class Claims:
    """Which bytes some task reads already: each is to be read once."""

    def __init__(self) -> None:
        self._spans: dict[Location, list[tuple[int, int]]] = {}  # disjoint, sorted
        self._last: tuple[Location | None, list[tuple[int, int]]] = None, []  # that `covers` looked at

    def claim(self, whole: ByteRange) -> list[ByteRange]:
        """The parts of a range that nobody has claimed, claimed from now on."""
        if not whole.nbytes:
            return []
        spans = self._spans.setdefault(whole.path, [])
        at, end = whole.start, whole.end
        i = _first(spans, at)
        free: list[ByteRange] = []
        j = i
        while j < len(spans) and spans[j][0] <= end:  # those that touch it become one with it
            if spans[j][0] > at:
                free.append(ByteRange(whole.path, at, spans[j][0] - at))
            at = max(at, spans[j][1])
            j += 1
        if at < end:
            free.append(ByteRange(whole.path, at, end - at))
        low = min(whole.start, spans[i][0]) if j > i else whole.start
        high = max(end, spans[j - 1][1]) if j > i else end
        spans[i:j] = [(low, high)]
        return free

    def covers(self, whole: ByteRange) -> bool:
        """Whether every byte of a range has been claimed."""
        path, start, nbytes = whole
        if path is not self._last[0]:  # it takes longer to hash a path than to find a range
            self._last = path, self._spans.setdefault(path, [])
        spans = self._last[1]
        i = _first(spans, start)
        return not nbytes or (i < len(spans) and spans[i][0] <= start and start + nbytes <= spans[i][1])

    def claim_all(self, ranges: list[ByteRange]) -> bool:
        """Claim all of these ranges if every one is free, of each other too."""
        ordered = sorted(ranges, key=lambda source: (str(source.path), source.start))
        meet = any(a.path == b.path and a.end > b.start for a, b in pairwise(ordered))
        if meet or any(self._is_taken(source) for source in ranges):
            return False
        for source in ranges:
            self.claim(source)
        return True

    def _is_taken(self, whole: ByteRange) -> bool:
        spans = self._spans.get(whole.path, [])
        i = _first(spans, whole.start)
        i += i < len(spans) and spans[i][1] <= whole.start  # it only touches
        return i < len(spans) and spans[i][0] < whole.end


def _first(spans: list[tuple[int, int]], at: int) -> int:
    """The number of the first span that reaches to `at` or begins after it."""
    i = bisect_left(spans, (at,))
    return i - 1 if i and spans[i - 1][1] >= at else i
