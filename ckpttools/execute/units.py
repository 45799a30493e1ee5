"""From segments to units of work: consecutive bytes of one output file, written by one call."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ckpttools.checksums import RangeCrcs, crc32
from ckpttools.execute import system
from ckpttools.execute.claims import Claim, SourceChecks
from ckpttools.passes.ranges import Cutter
from ckpttools.passes.threads import by_turns
from ckpttools.plan import Literal, OutputFile, Part, Sealed, Segment, reads
from ckpttools.stores.direct import SMALLEST_FILE
from ckpttools.tensors import ByteRange, Cast, Mean, Strided, Term, Tiles
from ckpttools.values import BLOCK_NBYTES

_PLAIN = (ByteRange, Sealed, Literal)  # bytes that are written as they are
UNIT = 1024 * 1024  # the fastest of 256 KiB to 4 MiB: a buffer that is still in the cache for its CRC
_GATHER = 4 * UNIT  # views are copied in larger parts: the runs that they read get longer with the part
_SLACK = 64  # bytes: an element or a checksum may reach over the end of a unit
_NOTHING = crc32(bytes(4))  # where a checksum belongs
_SHORT = 64 * 1024  # pieces up to this length are read together with their neighbours in the source
LONGEST = UNIT + _GATHER + _SLACK


class StagedFile:
    """An output file while it is written at `path`; `left` bytes are still missing. `direct`: past the page
    cache, until its file system refuses.

    Range 0 of `crcs` is the whole file, then follow the spans of segments of which `Sealed` ones hold the
    checksum: `spans` says which one. `holes` are those that are still to be filled in: offset and range.
    """

    def __init__(self, plan: OutputFile, folder: Path) -> None:
        self.plan, self.path = plan, folder / plan.path
        self.left = plan.nbytes
        self.direct = plan.nbytes >= SMALLEST_FILE
        starts = [*accumulate((segment.nbytes for segment in plan.segments), initial=0)]
        self.spans: dict[tuple[int, int], int] = {}
        for segment in plan.segments:
            if isinstance(segment, Sealed):
                for _, first, last in segment.holes:
                    self.spans.setdefault((first, last), len(self.spans) + 1)
        self.crcs = RangeCrcs([(0, starts[-1]), *((starts[i], starts[j]) for i, j in self.spans)])
        self.holes: list[tuple[int, int]] = []

    def all_holes(self) -> list[tuple[int, int]]:
        """Every place of a checksum, and its range."""
        out, start = [], 0
        for segment in self.plan.segments:
            if isinstance(segment, Sealed):
                out += [(start + at, self.spans[first, last]) for at, first, last in segment.holes]
            start += segment.nbytes
        return out

    def finish(self, fd: int) -> None:
        """All other bytes are written: fill in the checksums and flush."""
        for at, k in self.holes:
            data = self.crcs.values[k].to_bytes(4, "little")
            system.write(fd, memoryview(data), at)
            self.crcs.add_to((0,), at, at + 4, crc32(data))
        self.holes = []
        system.fsync(fd)


Sum = tuple[tuple[int, ...], int, int, int]  # of a piece: ranges, start and end in the file, CRC-32


class Piece(NamedTuple):
    """A segment or a part of one, and which source checksums the bytes that it reads serve. Those of plain
    copies belong to the unit's runs.
    """

    segment: Segment
    claims: tuple[Claim, ...]


class Run(NamedTuple):
    """Bytes of a source that are read at once, and the pieces that they are, one after the other: where each
    begins in the unit, and its length.
    """

    source: ByteRange
    copies: list[tuple[int, int]]
    claims: tuple[Claim, ...]


class Unit(NamedTuple):
    """The pieces, one after the other, from byte `start` of the file; at most `LONGEST` bytes. `runs` hold
    what of them is copied as it is.
    """

    file: StagedFile
    start: int
    nbytes: int
    pieces: list[Piece]
    runs: list[Run]

    def holes(self) -> list[tuple[int, int]]:
        """The places of checksums in it, in the file, and the range of each."""
        out, start = [], self.start
        for segment, _ in self.pieces:
            if isinstance(segment, Sealed):
                spans = self.file.spans
                out += [(start + at, spans[first, last]) for at, first, last in segment.holes]
            start += segment.nbytes
        return out

    def sums(self, view: memoryview, known: Mapping[int, int]) -> list[Sum]:
        """The CRC-32 of each piece that is in a checksum of the file, from the unit's bytes; those of some,
        by where they begin in the unit, are `known`.
        """
        if not self.file.spans:
            return []
        out: list[Sum] = []
        at, start, owners_of = 0, self.start, self.file.crcs.owners
        for segment, _ in self.pieces:
            nbytes = segment.nbytes
            if not isinstance(segment, Sealed) and (owners := owners_of(start + at)[1:]):
                crc = known[at] if at in known else crc32(view[at : at + nbytes])
                out.append((owners, start + at, start + at + nbytes, crc))
            at += nbytes
        return out

    def add_whole(self, crc: int, holes: Iterable[tuple[int, int]]) -> None:
        """To the account of the file: the CRC-32 of the unit with zeros in `holes`, which come later."""
        crcs = self.file.crcs
        crcs.add_to((0,), self.start, self.start + self.nbytes, crc)
        for at, _ in holes:
            crcs.take_from((0,), at, at + 4, _NOTHING)


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
    copies: list[tuple[ByteRange, int]] = []
    start = at = 0
    for segment in file.plan.segments:
        is_one = isinstance(segment, _PLAIN) and _ends_in_unit(at, segment.nbytes)
        for part in (segment,) if is_one else _parts(segment, at):
            if at // UNIT > start // UNIT:
                yield Unit(file, start, at - start, pieces, _runs(copies, checks))
                pieces, copies, start = [], [], at
            claims: tuple[Claim, ...] = ()
            if isinstance(part, ByteRange):
                copies.append((part, at - start))
            elif not isinstance(part, _PLAIN):
                claims = checks.claims(reads(part))
            pieces.append(Piece(part, claims))
            at += part.nbytes
    yield Unit(file, start, at - start, pieces, _runs(copies, checks))


def _runs(copies: list[tuple[ByteRange, int]], checks: SourceChecks) -> list[Run]:
    """What is copied as it is, by where it lies in the sources: short neighbours become one."""
    out: list[Run] = []
    copies.sort(key=lambda copy: (id(copy[0].path), copy[0].start))
    path, first, end = None, 0, 0
    places: list[tuple[int, int]] = []
    for source, at in copies:
        nbytes = source.nbytes
        joins = source.path is path and source.start == end and nbytes <= _SHORT and places[-1][1] <= _SHORT
        if not joins or end + nbytes - first > BLOCK_NBYTES:
            if path is not None:
                out.append(_run(ByteRange(path, first, end - first), places, checks))
            path, first, places = source.path, source.start, []
            end = first
        places.append((at, nbytes))
        end += nbytes
    if path is not None:
        out.append(_run(ByteRange(path, first, end - first), places, checks))
    return out


def _run(source: ByteRange, copies: list[tuple[int, int]], checks: SourceChecks) -> Run:
    return Run(source, copies, checks.claims((source,)))


def _ends_in_unit(at: int, nbytes: int) -> bool:
    """Whether bytes that begin at `at` of their file are one piece."""
    return nbytes > 0 and at // UNIT == (at + nbytes - 1) // UNIT


def _parts(segment: Segment, at: int) -> Iterator[Segment]:
    """The segment, which begins at byte `at` of its file, cut at multiples of `UNIT`, but for views."""
    if isinstance(segment, Sealed):
        yield from _sealed(segment, at)
        return
    done, nbytes = 0, segment.nbytes
    cutter = Cutter(reads(segment))
    cutters = [Cutter(term.chunks) for term in segment.terms] if isinstance(segment, Mean) else []
    while done < nbytes:
        room = min(UNIT - (at + done) % UNIT, nbytes - done)
        match segment:
            case Cast(_, source, target):
                numel = max(min(room // target.itemsize, BLOCK_NBYTES // source.itemsize), 1)
                part: Segment = Cast(cutter.take(numel * source.itemsize), source, target)
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


def _sealed(segment: Sealed, at: int) -> Iterator[Sealed]:
    """The same of one with checksums, none of which is cut."""
    data, holes = segment.data, segment.holes
    done = k = 0
    while done < len(data):
        end = min(done + UNIT - (at + done) % UNIT, len(data))
        j = bisect_left(holes, (end - 3, 0, 0), k)  # the first that does not end there
        if j < len(holes) and holes[j][0] < end:
            end, j = holes[j][0] + 4, j + 1
        yield Sealed(data[done:end], tuple((hole - done, first, last) for hole, first, last in holes[k:j]))
        done, k = end, j
