"""The pass over the bytes: every byte of every record read once, in parallel, in a fixed amount of memory.

A byte passes its record's checksum and, where it belongs to a tensor, the scan for NaN and Inf; where a
master weight has a 16-bit (or fp32) copy in the model file, both are read side by side and compared.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ckpttools.checksums import RangeCrcs, crc32
from ckpttools.passes.read import Reader
from ckpttools.plan import SourceCheck
from ckpttools.progress import Progress
from ckpttools.stores.links import refuse_outside
from ckpttools.tensors import FLOAT32, ByteRange, DType, TensorRef
from ckpttools.values import (
    BLOCK_NBYTES,
    holes,
    negatives,
    nonfinite,
    numpy_array,
    ordinary,
    same_after_cast,
    wild,
)

UNIT_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A range to be read; with a dtype, its elements are looked at. `name` says what it is a part of.

    `squares` are running means of squares, which cannot be negative.
    """

    source: ByteRange
    dtype: DType | None
    name: str
    squares: bool = False

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Master weights (fp32) and the same elements of the model file, in `dtype`."""

    master: ByteRange
    model: ByteRange
    dtype: DType
    name: str
    first: int  # index of the first element within the parameter

    @property
    def nbytes(self) -> int:
        return self.master.nbytes + self.model.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Twins:
    """Two copies of the same tensor, which must be equal byte for byte.

    `counted` says for each whether its bytes are read here for the first time: only then they count
    towards checksums.
    """

    one: ByteRange
    other: ByteRange
    name: str
    twin: str
    counted: tuple[bool, bool] = (True, True)

    @property
    def nbytes(self) -> int:
        return self.one.nbytes + self.other.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """The same elements of Adam's exp_avg and exp_avg_sq: a mean of gradients and a mean of their squares."""

    mean: ByteRange
    square: ByteRange
    dtype: DType
    name: str

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.square.nbytes


Task = Scan | Compare | Twins | Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """NaN or Inf in a block of a tensor; `byte` is where the first one lies in the file."""

    path: Path
    byte: int
    name: str
    nan: int
    inf: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Negative:
    """Squares below zero."""

    path: Path
    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wild:
    """Finite values beyond any sense."""

    path: Path
    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """Zeros in a mean of squares where the mean itself is not zero."""

    path: Path
    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlike:
    """Two copies of the same tensor that differ."""

    path: Path
    name: str
    twin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A model weight that is not its master weight, rounded. `element` counts within the parameter."""

    master: Path
    model: Path
    name: str
    element: int
    dtype: DType


@dataclass(frozen=True, slots=True, kw_only=True)
class BadChecksum:
    check: SourceCheck


Result = NonFinite | Wild | Negative | Hole | Mismatch | Unlike | BadChecksum


def pair(name: str, master: TensorRef, model: TensorRef) -> Iterator[Compare]:
    """The comparisons that hold a parameter's master weights against its model weights."""
    if master.dtype is not FLOAT32 or not model.dtype.is_float:
        return
    for here, there, first in _side_by_side(master, model):
        yield Compare(master=here, model=there, dtype=model.dtype, name=name, first=first)


def moments(name: str, mean: TensorRef, square: TensorRef) -> Iterator[Moments]:
    """The comparisons of a parameter's two moments. float16 squares may underflow: they are not compared."""
    if mean.dtype is square.dtype and mean.dtype.name in ("float32", "bfloat16", "float64"):
        for here, there, _ in _side_by_side(mean, square):
            yield Moments(mean=here, square=there, dtype=mean.dtype, name=name)


def _side_by_side(one: TensorRef, other: TensorRef) -> Iterator[tuple[ByteRange, ByteRange, int]]:
    """The same elements of two tensors in pieces that are one range in each, and each piece's first."""
    if one.numel != other.numel:
        return
    if not all(isinstance(chunk, ByteRange) for chunk in (*one.chunks, *other.chunks)):
        return
    cuts = {0, one.numel}
    for ref in (one, other):
        at = 0
        for chunk in ref.chunks:
            at += chunk.nbytes // ref.dtype.itemsize
            cuts.add(at)
    for low, high in pairwise(sorted(cuts)):
        (here,) = one.flat(low, high - low).chunks
        (there,) = other.flat(low, high - low).chunks
        assert isinstance(here, ByteRange) and isinstance(there, ByteRange)
        yield here, there, low


class Claims:
    """Which bytes some task reads already: each is to be read once."""

    def __init__(self) -> None:
        self._spans: dict[Path, list[tuple[int, int]]] = {}  # disjoint, sorted

    def claim(self, whole: ByteRange) -> list[ByteRange]:
        """The parts of a range that nobody has claimed, claimed from now on."""
        spans = self._spans.setdefault(whole.path, [])
        at, end = whole.start, whole.start + whole.nbytes
        i = bisect_right(spans, (at, at))
        if i and spans[i - 1][1] > at:
            i -= 1
        free: list[ByteRange] = []
        j = i
        while j < len(spans) and spans[j][0] < end:
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

    def claim_all(self, ranges: list[ByteRange]) -> bool:
        """Claim all of these ranges if every one is free."""
        if any(self._is_taken(source) for source in ranges):
            return False
        for source in ranges:
            self.claim(source)
        return True

    def _is_taken(self, whole: ByteRange) -> bool:
        spans = self._spans.get(whole.path, [])
        i = bisect_right(spans, (whole.start, whole.start))
        before = i > 0 and spans[i - 1][1] > whole.start
        return before or (i < len(spans) and spans[i][0] < whole.start + whole.nbytes)


def run(
    tasks: list[Task], checks: tuple[SourceCheck, ...], workers: int, progress: Progress | None
) -> list[Result]:
    """Carry out the tasks; returns what is wrong, in no particular order.

    Raises CkptError where a file cannot be read to its end, or leads out of the checkpoint.
    """
    for path in {source.path for task in tasks for source in _sources(task)}:
        refuse_outside(path)
    return _Pass(checks, progress).run(tasks, workers or min(os.cpu_count() or 1, 8))


class _Pass:
    """Threads take units from a shared iterator; results and checksums are gathered under a lock."""

    def __init__(self, checks: tuple[SourceCheck, ...], progress: Progress | None) -> None:
        self.progress = progress
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.results: list[Result] = []
        self.failure: BaseException | None = None
        self.checks: dict[Path, list[SourceCheck]] = {}
        for check in checks:
            self.checks.setdefault(check.source.path, []).append(check)
        self.crcs = {
            path: RangeCrcs([(c.source.start, c.source.start + c.source.nbytes) for c in found])
            for path, found in self.checks.items()
        }

    def run(self, tasks: list[Task], workers: int) -> list[Result]:
        units = _units(tasks)
        threads = [threading.Thread(target=self.work, args=(units,), daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)  # an endless join would not notice Ctrl-C
        finally:
            self.stop.set()
        if self.failure is not None:
            raise self.failure
        self.results += self.bad_checksums()
        return self.results

    def work(self, units: Iterator[Task]) -> None:
        try:
            with Reader() as reader:
                buffer = memoryview(bytearray(2 * BLOCK_NBYTES))
                while not self.stop.is_set():
                    with self.lock:
                        unit = next(units, None)
                    if unit is None:
                        return
                    found, sums = _process(unit, reader, buffer)
                    self.gather(found, sums)
        except BaseException as error:
            self.failure = self.failure or error
            self.stop.set()

    def gather(self, found: list[Result], sums: list[tuple[ByteRange, int]]) -> None:
        with self.lock:
            self.results += found
            for source, crc in sums:
                if source.path in self.crcs:
                    self.crcs[source.path].add(source.start, source.start + source.nbytes, crc)
                if self.progress is not None:
                    self.progress.update(source.nbytes)

    def bad_checksums(self) -> Iterator[Result]:
        for path, found in self.checks.items():
            crcs = self.crcs[path]
            for i, check in enumerate(found):
                assert crcs.left[i] == 0, "every byte of a record is read"
                if crcs.values[i] != check.crc32:
                    yield BadChecksum(check=check)


def _sources(task: Task) -> tuple[ByteRange, ...]:
    match task:
        case Scan(source=source):
            return (source,)
        case Compare(master=one, model=other) | Twins(one=one, other=other):
            return one, other
        case Moments(mean=one, square=other):
            return one, other


def _units(tasks: Iterable[Task]) -> Iterator[Task]:
    """The tasks in pieces of at most UNIT_NBYTES."""
    for task in tasks:
        match task:
            case Scan(source=source):
                for at in range(0, source.nbytes, UNIT_NBYTES):
                    part = source.cut(at, min(UNIT_NBYTES, source.nbytes - at))
                    yield replace(task, source=part)
            case Twins(one=one, other=other):
                for at in range(0, one.nbytes, UNIT_NBYTES):
                    n = min(UNIT_NBYTES, one.nbytes - at)
                    yield replace(task, one=one.cut(at, n), other=other.cut(at, n))
            case Moments(mean=mean, square=square):
                for at in range(0, mean.nbytes, UNIT_NBYTES):
                    n = min(UNIT_NBYTES, mean.nbytes - at)
                    yield replace(task, mean=mean.cut(at, n), square=square.cut(at, n))
            case Compare(master=master, model=model, dtype=dtype, name=name, first=first):
                numel, step = master.nbytes // 4, UNIT_NBYTES // 4
                for at in range(0, numel, step):
                    n = min(step, numel - at)
                    yield Compare(
                        master=master.cut(at * 4, n * 4),
                        model=model.cut(at * dtype.itemsize, n * dtype.itemsize),
                        dtype=dtype,
                        name=name,
                        first=first + at,
                    )


def _process(
    unit: Task, reader: Reader, buffer: memoryview
) -> tuple[list[Result], list[tuple[ByteRange, int]]]:
    match unit:
        case Scan():
            return _scan(unit, reader, buffer)
        case Compare():
            return _compare(unit, reader, buffer)
        case Twins():
            return _twins(unit, reader, buffer)
        case Moments():
            return _moments(unit, reader, buffer)


def _scan(unit: Scan, reader: Reader, buffer: memoryview) -> tuple[list[Result], list[tuple[ByteRange, int]]]:
    source, crc = unit.source, 0
    found: list[Result] = []
    for at in range(0, source.nbytes, BLOCK_NBYTES):
        block = buffer[: min(BLOCK_NBYTES, source.nbytes - at)]
        reader.read(block, source.path, source.start + at)
        crc = crc32(block, crc)
        if unit.dtype is not None:
            found += _odd_values(block, unit.dtype, source, at, unit.name, squares=unit.squares)
    return found, [(source, crc)]


def _odd_values(
    block: memoryview, dtype: DType, source: ByteRange, at: int, name: str, *, squares: bool = False
) -> list[Result]:
    """Elements that no tensor should hold, in the block that begins at byte `at` of `source`."""
    values = numpy_array(block, dtype)
    if ordinary(values, dtype, squares=squares):
        return []
    found: list[Result] = []
    if count := wild(values, dtype):
        found.append(Wild(path=source.path, name=name, count=count))
    nan, inf = nonfinite(values, dtype)
    if nan or inf:
        item = dtype.itemsize
        first = next(
            i
            for i in range(0, len(block), item)
            if any(nonfinite(numpy_array(block[i : i + item], dtype), dtype))
        )
        found.append(NonFinite(path=source.path, byte=source.start + at + first, name=name, nan=nan, inf=inf))
    if squares and (count := negatives(values)):
        found.append(Negative(path=source.path, name=name, count=count))
    return found


def _side_blocks(
    one: ByteRange,
    other: ByteRange,
    items: tuple[int, int],
    reader: Reader,
    buffer: memoryview,
    sums: list[int],
) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Two ranges of equally many elements of `items` bytes, block by block: the first element of each block,
    and both blocks, until the next ones are asked for. Their checksums go on in `sums`.
    """
    numel, step = one.nbytes // items[0], BLOCK_NBYTES // max(items)
    for first in range(0, numel, step):
        n = min(step, numel - first)
        here = buffer[: n * items[0]]
        there = buffer[BLOCK_NBYTES : BLOCK_NBYTES + n * items[1]]
        reader.read(here, one.path, one.start + first * items[0])
        reader.read(there, other.path, other.start + first * items[1])
        sums[:] = crc32(here, sums[0]), crc32(there, sums[1])
        yield first, here, there


def _compare(
    unit: Compare, reader: Reader, buffer: memoryview
) -> tuple[list[Result], list[tuple[ByteRange, int]]]:
    master, model, item = unit.master, unit.model, unit.dtype.itemsize
    sums = [0, 0]
    found: list[Result] = []
    for at, here, there in _side_blocks(master, model, (4, item), reader, buffer, sums):
        found += _odd_values(here, FLOAT32, master, at * 4, unit.name)
        found += _odd_values(there, unit.dtype, model, at * item, unit.name)
        different = same_after_cast(numpy_array(here, FLOAT32), numpy_array(there, unit.dtype), unit.dtype)
        if different is not None:
            found.append(
                Mismatch(
                    master=master.path,
                    model=model.path,
                    name=unit.name,
                    element=unit.first + at + different,
                    dtype=unit.dtype,
                )
            )
    return found, [(master, sums[0]), (model, sums[1])]


def _twins(
    unit: Twins, reader: Reader, buffer: memoryview
) -> tuple[list[Result], list[tuple[ByteRange, int]]]:
    one, other, sums = unit.one, unit.other, [0, 0]
    found: list[Result] = []
    for _, here, there in _side_blocks(one, other, (1, 1), reader, buffer, sums):
        if here != there:
            found.append(Unlike(path=one.path, name=unit.name, twin=unit.twin))
    pairs = zip((one, other), sums, unit.counted, strict=True)
    return found, [(source, crc) for source, crc, counts in pairs if counts]


def _moments(
    unit: Moments, reader: Reader, buffer: memoryview
) -> tuple[list[Result], list[tuple[ByteRange, int]]]:
    mean, square, dtype, sums = unit.mean, unit.square, unit.dtype, [0, 0]
    names = (f"{unit.name} (exp_avg)", f"{unit.name} (exp_avg_sq)")
    found: list[Result] = []
    for first, here, there in _side_blocks(mean, square, (dtype.itemsize,) * 2, reader, buffer, sums):
        at = first * dtype.itemsize
        found += _odd_values(here, dtype, mean, at, names[0])
        found += _odd_values(there, dtype, square, at, names[1], squares=True)
        if count := holes(numpy_array(here, dtype), numpy_array(there, dtype)):
            found.append(Hole(path=square.path, name=names[1], count=count))
    return found, [(mean, sums[0]), (square, sums[1])]
