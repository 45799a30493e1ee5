"""From segments to units of work: consecutive bytes of one output file, written by one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ckpttools.checksums import RangeCrcs, crc32
from ckpttools.execute import system
from ckpttools.execute.claims import Claim, SourceChecks
from ckpttools.passes.ranges import Cutter
from ckpttools.passes.threads import by_turns
from ckpttools.plan import Crc32, Literal, OutputFile, Part, Segment, reads
from ckpttools.stores.direct import SMALLEST_FILE
from ckpttools.tensors import ByteRange, Cast, Mean, Strided, Term, Tiles
from ckpttools.values import BLOCK_NBYTES

UNIT = 1024 * 1024  # the fastest of 256 KiB to 4 MiB: a buffer that is still in the cache for its CRC
_GATHER = 4 * UNIT  # views are copied in larger parts: the runs that they read get longer with the part
_SLACK = 64  # bytes: an element or a checksum may reach over the end of a unit
LONGEST = UNIT + _GATHER + _SLACK


class StagedFile:
    """An output file while it is written at `path`; `left` bytes are still missing. `direct`: past the page
    cache, until its file system refuses.

    Range 0 of `crcs` is the whole file, then follow those that `Crc32` segments cover: `crc_ranges` says of
    the offset of each which one. `holes` are the offsets of those that are still to be filled in.
    """

    def __init__(self, plan: OutputFile, folder: Path) -> None:
        self.plan, self.path = plan, folder / plan.path
        self.left = plan.nbytes
        self.direct = plan.nbytes >= SMALLEST_FILE
        starts = [0]
        for segment in plan.segments:
            starts.append(starts[-1] + segment.nbytes)
        spans: dict[tuple[int, int], int] = {}
        self.crc_ranges = {
            at: spans.setdefault((starts[s.first], starts[s.last]), len(spans) + 1)
            for at, s in zip(starts, plan.segments, strict=False)
            if isinstance(s, Crc32)
        }
        self.crcs = RangeCrcs([(0, starts[-1]), *spans])
        self.holes: list[int] = []

    def crc_at(self, at: int) -> bytes | None:
        """The `Crc32` segment at byte `at`, if all that it covers was added."""
        k = self.crc_ranges[at]
        return None if self.crcs.left[k] else self.crcs.values[k].to_bytes(4, "little")

    def finish(self, fd: int) -> None:
        """All other bytes are written: fill in the checksums and flush."""
        for at in self.holes:
            data = self.crcs.values[self.crc_ranges[at]].to_bytes(4, "little")
            system.write(fd, memoryview(data), at)
            self.crcs.add_to((0,), at, at + 4, crc32(data))
        self.holes = []
        system.fsync(fd)


class Piece(NamedTuple):
    """A segment or a part of one, and which source checksums the bytes that it reads serve."""

    segment: Segment
    claims: tuple[Claim, ...]


class Unit(NamedTuple):
    """The pieces, one after the other, from byte `start` of the file; at most `LONGEST` bytes."""

    file: StagedFile
    start: int
    nbytes: int
    pieces: list[Piece]


def of_part(files: Sequence[StagedFile], checks: SourceChecks, part: Part) -> Iterator[Unit]:
    """The units that begin in the part. Every writer goes through all units of the plan in the same order, so
    that all agree on who claims a source byte for its checksum.
    """
    starts = dict(zip(files, accumulate((file.plan.nbytes for file in files), initial=0), strict=False))
    for unit in by_turns(_units(file, checks) for file in files):
        if part.start <= starts[unit.file] + unit.start < part.end:
            yield unit


def in_order(files: Sequence[StagedFile], checks: SourceChecks, nbytes: int) -> Iterator[tuple[int, Unit]]:
    """All units of the plan, one file after another, each with the number of its stretch of `nbytes`."""
    at = 0
    for file in files:
        for unit in _units(file, checks):
            yield (at + unit.start) // nbytes, unit
        at += file.plan.nbytes


def _units(file: StagedFile, checks: SourceChecks) -> Iterator[Unit]:
    """The whole file in order, cut at multiples of `UNIT` (an element is never cut)."""
    pieces: list[Piece] = []
    start = at = 0
    for segment in file.plan.segments:
        for part in _parts(segment, at):
            if at // UNIT > start // UNIT:
                yield Unit(file, start, at - start, pieces)
                pieces, start = [], at
            claims = () if isinstance(part, Crc32 | Literal) else checks.claims(reads(part))
            pieces.append(Piece(part, claims))
            at += part.nbytes
    yield Unit(file, start, at - start, pieces)


def _parts(segment: Segment, at: int) -> Iterator[Segment]:
    """The segment, which begins at byte `at` of its file, cut at multiples of `UNIT`, but for views."""
    done, nbytes = 0, segment.nbytes
    if isinstance(segment, Crc32 | Literal | ByteRange) and at // UNIT == (at + nbytes - 1) // UNIT:
        if nbytes:
            yield segment
        return
    cutter = Cutter(reads(segment))
    cutters = [Cutter(term.chunks) for term in segment.terms] if isinstance(segment, Mean) else []
    while done < nbytes:
        room = min(UNIT - (at + done) % UNIT, nbytes - done)
        match segment:
            case Crc32():
                part: Segment = segment
            case Cast(_, source, target):
                numel = max(min(room // target.itemsize, BLOCK_NBYTES // source.itemsize), 1)
                part = Cast(cutter.take(numel * source.itemsize), source, target)
            case Mean(terms, target):
                each = BLOCK_NBYTES // sum(term.dtype.itemsize for term in terms)
                numel = max(min(room // target.itemsize, each), 1)
                cut = (
                    Term(one.take(numel * term.dtype.itemsize), term.dtype, term.weight)
                    for one, term in zip(cutters, terms, strict=True)
                )
                part = Mean(tuple(cut), target)
            case Strided(itemsize=itemsize) | Tiles(itemsize=itemsize):
                part = segment.cut(done, max(min(_GATHER, nbytes - done) // itemsize, 1) * itemsize)
            case _:
                part = segment.cut(done, room)
        yield part
        done += part.nbytes
