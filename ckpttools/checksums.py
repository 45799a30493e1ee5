"""CRC-32 (the checksum of zip archives) at memory speed, also of ranges whose pieces come in any order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from isal.isal_zlib import crc32 as _crc32
from isal.isal_zlib import crc32_combine as _crc32_combine


def crc32(data: bytes | bytearray | memoryview, seed: int = 0) -> int:
    """The CRC-32 of `data`, going on from `seed`, the CRC-32 of what precedes it. Releases the GIL."""
    return int(_crc32(data, seed))


def crc32_combine(a: int, b: int, nbytes_b: int) -> int:
    """The CRC-32 of A + B from those of A and of B, which is `nbytes_b` long."""
    return int(_crc32_combine(a, b, nbytes_b))


def of_crc32(crc: int) -> bytes:
    """The four bytes that have this CRC-32: there are no others."""
    state = crc ^ 0xFFFFFFFF
    for _ in range(32):
        state = (state ^ 0xEDB88320) << 1 | 1 if state >> 31 else state << 1
    return (state ^ 0xFFFFFFFF).to_bytes(4, "little")


Share = tuple[int, int]  # of a range's CRC-32, from how many of its bytes: they join by xor and sum


def joined(one: Share, other: Share) -> Share:
    """The share of both."""
    return one[0] ^ other[0], one[1] + other[1]


class RangeCrcs:
    """The CRC-32s of byte ranges (start, end) of one file, built from pieces that come in any order.

    crc(A + B) = shift(crc(A), len(B)) ^ crc(B): a piece's CRC, shifted by the bytes that follow it in the
    range, is its share of the range's CRC whatever the other pieces are. `left` counts the bytes that
    each range still lacks; each byte must be added once. Ranges may overlap. Not thread-safe.
    """

    __slots__ = ("_ends", "_made", "_starts", "_touched", "left", "values")

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.values = [0] * len(ranges)
        self.left = [end - start for start, end in ranges]
        self._starts = [start for start, _ in ranges]
        self._ends = [end for _, end in ranges]
        self._touched: set[int] = set()  # since `take`
        self._made: tuple[list[int], list[tuple[int, ...]]] | None = None

    def _places(self) -> tuple[list[int], list[tuple[int, ...]]]:
        """Where ranges begin and end, and who holds the bytes from each to the next: for who adds pieces."""
        if self._made is None:
            ranges = list(zip(self._starts, self._ends, strict=True))
            cuts = sorted({at for span in ranges for at in span})
            self._made = cuts, _owners(ranges, cuts)
        return self._made

    def cuts(self, start: int, end: int) -> list[int]:
        """The places inside `start` to `end` (both exclusive) where a piece must be cut."""
        cuts, _ = self._places()
        return cuts[bisect_right(cuts, start) : bisect_left(cuts, end)]

    def spans(self, start: int, end: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Bytes `start` to `end` cut where a range begins or ends, with the ranges that hold each span."""
        cuts, owners = self._places()
        for low, high in _pairs([start, *self.cuts(start, end), end]):
            at = bisect_right(cuts, low) - 1
            yield low, high, owners[at] if at >= 0 else ()

    def owners(self, at: int) -> tuple[int, ...]:
        """The ranges that hold a byte."""
        cuts, held = self._places()
        return held[bisect_right(cuts, at) - 1]

    def add(self, start: int, end: int, crc: int) -> None:
        """Account for a piece, one span of `spans`."""
        self.add_to(self.owners(start), start, end, crc)

    def add_to(self, owners: Sequence[int], start: int, end: int, crc: int) -> None:
        """The same for these ranges alone, all of which hold the piece."""
        for k in owners:
            behind = self._ends[k] - end
            self.values[k] ^= crc32_combine(crc, 0, behind) if behind else crc
            self.left[k] -= end - start
        self._touched.update(owners)

    def take_from(self, owners: Sequence[int], start: int, end: int, crc: int) -> None:
        """The opposite of `add_to`."""
        self.add_to(owners, start, end, crc)  # what is added twice cancels out
        for k in owners:
            self.left[k] += 2 * (end - start)

    @property
    def shares(self) -> list[Share]:
        """What the pieces so far came to, for each range."""
        sizes = zip(self._starts, self._ends, self.left, strict=True)
        return [(crc, end - start - left) for crc, (start, end, left) in zip(self.values, sizes, strict=True)]

    def take(self) -> dict[int, Share]:
        """The shares that are not empty, by range; from now on they do not count here."""
        out: dict[int, Share] = {}
        for k in sorted(self._touched):
            nbytes = self._ends[k] - self._starts[k] - self.left[k]
            if nbytes:
                out[k] = self.values[k], nbytes
                self.values[k], self.left[k] = 0, self.left[k] + nbytes
        self._touched.clear()
        return out

    def join(self, shares: Sequence[Share]) -> None:
        """Account for the pieces that another one of the same ranges was given."""
        for k, (crc, nbytes) in enumerate(shares):
            self.values[k] ^= crc
            self.left[k] -= nbytes
        self._touched.update(range(len(shares)))


def _owners(ranges: Sequence[tuple[int, int]], cuts: Sequence[int]) -> list[tuple[int, ...]]:
    """For each cut, the ranges that hold the bytes from it to the next cut."""
    opening = sorted(range(len(ranges)), key=lambda k: ranges[k][0])
    closing = sorted(range(len(ranges)), key=lambda k: ranges[k][1])
    active: dict[int, None] = {}
    owners = []
    i = j = 0
    for cut in cuts:  # among which each start and end is
        while i < len(opening) and ranges[opening[i]][0] == cut:
            active[opening[i]] = None
            i += 1
        while j < len(closing) and ranges[closing[j]][1] == cut:
            active.pop(closing[j], None)
            j += 1
        owners.append(tuple(active))
    return owners


def _pairs(points: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((low, high) for low, high in pairwise(points) if low < high)
