"""The pass: every file front to back, once, by a few threads, and what happens to each block on the way.

A unit is up to 1 MiB of one file. Its bytes are read into a thread's buffer and go from there to every sink
that wants them: the CRC-32s that sources state (in any order), the looks at values (`looks`), and the xxh3
digests of files and tensors (`hashes`), which take the units of a file in order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct, field

from ckpttools.checksums import RangeCrcs, crc32
from ckpttools.location import Location
from ckpttools.passes import threads
from ckpttools.passes.hashes import FileHash, Ranges, Sink, Sinks
from ckpttools.passes.looks import Look, Meetings, Side, look, look_at_view, side_by_side
from ckpttools.passes.read import Reader
from ckpttools.passes.tasks import (
    BadChecksum,
    Compare,
    Joined,
    Moments,
    Pair,
    Plain,
    Result,
    Scan,
    ScanView,
    Task,
    Twins,
    itemsizes,
    plain,
    sides,
)
from ckpttools.plan import SourceCheck
from ckpttools.progress import Progress
from ckpttools.stores.direct import BLOCK, aligned
from ckpttools.stores.files import size_of
from ckpttools.stores.links import refuse_outside
from ckpttools.tensors import ByteRange
from ckpttools.values import BLOCK_NBYTES

_GAP = 4096  # bytes between two ranges that are read with them: the headers of small records


class Digest(NamedTuple):
    """xxh3_128, hexadecimal, of a file of `size` bytes and of the tensors in it."""

    size: int
    digest: str
    tensors: dict[str, str]


class Passed(Struct, frozen=True, kw_only=True):
    """What a pass found, in no particular order, and the digests that it was asked for."""

    results: list[Result] = field(default_factory=list)
    digests: dict[Location, Digest] = field(default_factory=dict)


def run(
    tasks: Iterable[Task] = (),
    checks: Iterable[SourceCheck] = (),
    *,
    hashes: Mapping[Location, Ranges] | None = None,
    sinks: Sinks | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> Passed:
    """Carry out the tasks, hold what is read against `checks` (all of whose bytes are read), and take the
    digests of the files in `hashes` and of ranges in them, whose bytes `sinks` are given, too.

    The ranges of all tasks but views and twins that are not `apart` must be disjoint; each byte is read once,
    those of the others and of blocks that differ from their partners once more. Raises CkptError where a file
    cannot be read to its end, or leads out of the checkpoint.
    """
    return _Pass(list(tasks), list(checks), hashes or {}, progress, sinks or {}).run(threads.count(workers))


class _Unit(NamedTuple):
    source: ByteRange
    skipped: int  # bytes of it that nobody asked for
    looks: list[tuple[ByteRange, Look]]


class _Span(NamedTuple):
    """A range with one meaning, which is cut only between elements: after each `step` bytes."""

    source: ByteRange
    what: Scan | Side
    step: int


class _Turns:
    """A file whose digests are taken: its units come one after the other."""

    def __init__(self, path: Location, ranges: Ranges, sinks: Sequence[Sink]) -> None:
        self.hash = FileHash(size_of(path), ranges, sinks)
        self.changed = threading.Condition()


class _Pass:
    def __init__(
        self,
        tasks: list[Task],
        checks: list[SourceCheck],
        hashes: Mapping[Location, Ranges],
        progress: Progress | None,
        sinks: Sinks,
    ) -> None:
        self.progress = progress
        self.lock = threading.Lock()
        self.failed = False
        self.results: list[Result] = []
        self.meetings = Meetings()
        self.again: list[Pair] = [task for task in tasks if isinstance(task, Twins) and not task.apart]
        self.views = [task for task in tasks if isinstance(task, ScanView)]
        self.joined = {id(task.whole): task for task in tasks if isinstance(task, Joined)}
        self.odd: dict[int, Joined] = {}  # of those, what must be looked at one by one
        self.checks: dict[Location, list[SourceCheck]] = {}
        for check in checks:
            self.checks.setdefault(check.source.path, []).append(check)
        self.crcs = {
            path: RangeCrcs([(c.source.start, c.source.end) for c in found])
            for path, found in self.checks.items()
        }
        spans: dict[Location, list[_Span]] = {path: [] for path in hashes}
        for number, task in enumerate(tasks):
            for span in _spans(plain(task), number):
                spans.setdefault(span.source.path, []).append(span)
        for path in {*spans, *(view.source.path for view in self.views)}:
            refuse_outside(path)
        self.turns = {path: _Turns(path, ranges, sinks.get(path, ())) for path, ranges in hashes.items()}
        self.spans = spans

    def run(self, workers: int) -> Passed:
        units = threads.by_turns(self.units_of(path) for path in list(self.spans))
        threads.in_threads(workers, self.work, units)
        threads.in_threads(workers, self.look_again, self.again)
        threads.in_threads(workers, self.look_at_views, self.views)
        self.results += self.bad_checksums()
        if self.odd:
            one_by_one: list[Task] = [task for joined in self.odd.values() for task in joined.tasks]
            self.results += _Pass(one_by_one, [], {}, None, {}).run(workers).results
        digests = {path: Digest(t.hash.size, *t.hash.digests()) for path, t in self.turns.items()}
        return Passed(results=self.results, digests=digests)

    def units_of(self, path: Location) -> Iterator[_Unit]:
        """Bytes of one file that lie together or nearly so, at most a block of them."""
        start = end = skipped = 0
        looks: list[tuple[ByteRange, Look]] = []
        turns = self.turns.get(path)
        for source, what in _pieces(path, self.spans.pop(path), turns.hash.size if turns else 0):
            if source.start - end > _GAP or source.end - start > BLOCK_NBYTES:
                if end > start:
                    yield _Unit(ByteRange(path, start, end - start), skipped, looks)
                start, end, skipped, looks = source.start, source.start, 0, []
            skipped += source.start - end
            end = source.end
            if what is not None:
                looks.append((source, what))
        if end > start:
            yield _Unit(ByteRange(path, start, end - start), skipped, looks)

    def work(self, units: Iterable[_Unit]) -> None:
        buffer = aligned(BLOCK_NBYTES + BLOCK)
        try:
            with Reader() as reader:
                for unit in units:
                    at = unit.source.start % BLOCK  # as on disk: elements are aligned as well as there
                    block = buffer[at : at + unit.source.nbytes]
                    reader.read(block, unit.source.path, unit.source.start)
                    self.pass_on(unit, block)
        except BaseException:
            self.failed = True  # whoever waits for this thread's unit must not
            raise

    def pass_on(self, unit: _Unit, block: memoryview) -> None:
        """Give a unit's bytes to all that want them."""
        source = unit.source
        crcs = self.crcs.get(source.path)
        sums = []
        if crcs is not None:
            for low, high, owners in crcs.spans(source.start, source.end):
                if owners:
                    sums.append((low, high, crc32(block[low - source.start : high - source.start])))
        seen = [
            (what, part.nbytes, *look(what, part, block[part.start - source.start : part.end - source.start]))
            for part, what in unit.looks
        ]
        with self.lock:
            for low, high, crc in sums:
                assert crcs is not None
                crcs.add(low, high, crc)
            for what, nbytes, found, left in seen:
                self.note(what, found)
                if isinstance(what, Side):
                    numel = nbytes // itemsizes(what.pair)[what.side]
                    self.note(what, self.meetings.add(what, left, numel))
            if self.progress is not None:
                self.progress.update(source.nbytes - unit.skipped)
        if turns := self.turns.get(source.path):
            self.hash(turns, source, block)

    def note(self, what: Look, outcomes: Iterable[Result | Pair]) -> None:
        """What a look has shown, or that it must be told by another."""
        task = what.pair if isinstance(what, Side) else what
        joined = self.joined.get(id(task))
        for outcome in outcomes:
            if joined is not None:
                self.odd[id(task)] = joined
            elif isinstance(outcome, Compare | Twins | Moments):
                self.again.append(outcome)
            else:
                self.results.append(outcome)

    def hash(self, turns: _Turns, source: ByteRange, block: memoryview) -> None:
        """Wait for the unit's turn: those before it are with other threads, or done."""
        with turns.changed:
            while turns.hash.at != source.start and not self.failed:
                turns.changed.wait(0.1)
        if turns.hash.at == source.start:
            turns.hash.update(block)
            with turns.changed:
                turns.changed.notify_all()

    def look_again(self, pairs: Iterable[Pair]) -> None:
        buffer = memoryview(bytearray(2 * BLOCK_NBYTES))
        with Reader() as reader:
            for pair in pairs:
                found = list(side_by_side(pair, reader, buffer))
                with self.lock:
                    self.results += found

    def look_at_views(self, views: Iterable[ScanView]) -> None:
        buffer = memoryview(bytearray(BLOCK_NBYTES))
        with Reader() as reader:
            for view in views:
                found = list(look_at_view(view, reader, buffer))
                with self.lock:
                    self.results += found
                    if self.progress is not None:
                        self.progress.update(view.nbytes)

    def bad_checksums(self) -> Iterator[Result]:
        for path, found in self.checks.items():
            crcs = self.crcs[path]
            for i, check in enumerate(found):
                assert crcs.left[i] == 0, "every byte of a record is read"
                if crcs.values[i] != check.crc32:
                    yield BadChecksum(check=check)


def _spans(task: Plain, number: int) -> Iterator[_Span]:
    match task:
        case Scan(source=source):
            yield _Span(source, task, BLOCK_NBYTES)
        case Twins(apart=False) | ScanView():
            pass
        case pair:
            items = itemsizes(pair)
            step = BLOCK_NBYTES // max(items)
            for side, source in enumerate(sides(pair)):
                yield _Span(source, Side(pair, number, side, 0), step * items[side])


def _pieces(path: Location, spans: list[_Span], size: int) -> Iterator[tuple[ByteRange, Look | None]]:
    """The spans of a file in order, cut to blocks; up to `size`, also what lies between them."""
    at = 0
    for source, what, step in sorted(spans, key=lambda span: span.source.start):
        if source.start < at:
            raise ValueError(f"two tasks read byte {source.start} of {path}")
        if size:
            yield from _rest(path, at, source.start)
        at = source.end
        for start in range(0, source.nbytes, step):
            part = source.cut(start, min(step, source.nbytes - start))
            if isinstance(what, Side):
                first = start // itemsizes(what.pair)[what.side]
                yield part, Side(what.pair, what.number, what.side, first)
            else:
                yield part, what
    yield from _rest(path, at, size)


def _rest(path: Location, start: int, end: int) -> Iterator[tuple[ByteRange, None]]:
    for at in range(start, end, BLOCK_NBYTES):
        yield ByteRange(path, at, min(BLOCK_NBYTES, end - at)), None
