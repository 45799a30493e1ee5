"""Where the bytes of what a plan wrote come from: tensors of the result, traced back to those of the source.

The plan says of each byte of a file what it is copied or made from. Who reads the headers of the result, and
not the plan, knows where its tensors lie: where such a tensor was made from exactly the bytes of one of the
source, in their order, both have one value, and one digest.

That is so of bytes that were proved as they were copied: the source states a checksum of them (safetensors
have none), and they were read once alone, which is when they are held against it. Whatever else is made, by a
cast or from a view, is not traced.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate

from ckpttools.location import Location
from ckpttools.plan import Plan, reads
from ckpttools.tensors import ByteRange, Chunk, TensorRef, join_chunks, spans

Ranges = dict[Location, list[tuple[int, int]]]  # disjoint, in order


class Origins:
    """Of a plan whose files lie at `staged`."""

    def __init__(self, plan: Plan, staged: Location) -> None:
        self._files = {
            staged / file.path: (
                list(accumulate((segment.nbytes for segment in file.segments), initial=0)),
                file.segments,
            )
            for file in plan.files
        }
        checked, _ = _merged(check.source for check in plan.checks)
        segments = (segment for file in plan.files for segment in file.segments)
        _, again = _merged(span for segment in segments for chunk in reads(segment) for span in spans(chunk))
        self._sources = {path: (held, again.get(path, [])) for path, held in checked.items()}

    def of(self, ref: TensorRef) -> tuple[Chunk, ...] | None:
        """The proved bytes that a tensor of the result is a copy of; None where it is more, or other."""
        out: list[ByteRange] = []
        for chunk in ref.chunks:
            found = self._files.get(chunk.path) if isinstance(chunk, ByteRange) else None
            if not isinstance(chunk, ByteRange) or found is None:
                return None
            starts, segments = found
            i = bisect_right(starts, chunk.start) - 1
            while i < len(segments) and starts[i] < chunk.end:
                low, high = max(chunk.start, starts[i]) - starts[i], min(chunk.end, starts[i + 1]) - starts[i]
                segment = segments[i]
                if not isinstance(segment, ByteRange):
                    return None
                part = segment.cut(low, high - low)
                if part.nbytes and not self._proved(part):
                    return None
                out.append(part)
                i += 1
        return join_chunks(out)

    def _proved(self, part: ByteRange) -> bool:
        checked, again = self._sources.get(part.path, ([], []))
        held = _first(checked, part)
        if held is None or part.start < held[0] or held[1] < part.end:
            return False
        return _first(again, part) is None


def _merged(ranges: Iterable[ByteRange]) -> tuple[Ranges, Ranges]:
    """All of them, and what more than one of them holds."""
    by_path: Ranges = {}
    for each in ranges:
        by_path.setdefault(each.path, []).append((each.start, each.end))
    once: Ranges = {}
    again: Ranges = {}
    for path, found in by_path.items():
        for start, end in sorted(found):
            held = once.setdefault(path, [])
            if held and start < held[-1][1]:
                _add(again.setdefault(path, []), start, min(end, held[-1][1]))
            _add(held, start, end)
    return once, again


def _add(held: list[tuple[int, int]], start: int, end: int) -> None:
    """A range that begins in the last one, at its end or later."""
    if held and start <= held[-1][1]:
        held[-1] = (held[-1][0], max(held[-1][1], end))
    elif start < end:
        held.append((start, end))


def _first(held: list[tuple[int, int]], part: ByteRange) -> tuple[int, int] | None:
    """The first of the ranges of its file that overlaps a part."""
    i = bisect_right(held, part.start, key=_end)
    return held[i] if i < len(held) and held[i][0] < part.end else None


def _end(each: tuple[int, int]) -> int:
    return each[1]
