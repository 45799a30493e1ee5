"""Where the bytes of what a plan wrote come from: tensors of the result, traced back to those of the source.

The plan says of each byte of a file what it is copied or made from. Who reads the headers of the result, and
not the plan, knows where its tensors lie: where such a tensor was made from exactly the bytes of one of the
source, in their order, both have one value, and one digest.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from ckpttools.location import Location
from ckpttools.plan import Crc32, Plan, Segment
from ckpttools.tensors import ByteRange, Cast, Chunk, Mean, Strided, TensorRef, Tiles, join_chunks


class Origins:
    """Of a plan whose files lie at `staged`."""

    def __init__(self, plan: Plan, staged: Location) -> None:
        self._files = {staged / file.path: file for file in plan.files}
        self._starts = {
            path: list(accumulate((segment.nbytes for segment in file.segments), initial=0))
            for path, file in self._files.items()
        }

    def of(self, ref: TensorRef) -> tuple[Chunk, ...] | None:
        """What a tensor of the result was made from; None where the plan alone does not tell."""
        out: list[Chunk] = []
        for chunk in ref.chunks:
            if not isinstance(chunk, ByteRange) or chunk.path not in self._files:
                return None
            starts, segments = self._starts[chunk.path], self._files[chunk.path].segments
            i = bisect_right(starts, chunk.start) - 1
            while i < len(segments) and starts[i] < chunk.end:
                low, high = max(chunk.start, starts[i]) - starts[i], min(chunk.end, starts[i + 1]) - starts[i]
                part = _cut(segments[i], low, high)
                if part is None:
                    return None
                out.append(part)
                i += 1
        return join_chunks(out)


def _cut(segment: Segment, low: int, high: int) -> Chunk | None:
    """Bytes `low` to `high` of a segment; None for a checksum, and where an element would be cut."""
    match segment:
        case Crc32():
            return None
        case Cast(target=dtype) | Mean(target=dtype):
            item = dtype.itemsize
        case Strided(itemsize=item) | Tiles(itemsize=item):
            pass
        case _:
            item = 1
    return None if low % item or high % item else segment.cut(low, high - low)
