"""What a pass is to look at, and what it may find.

A byte passes its record's checksum and, where it belongs to a tensor, the scan for NaN and Inf; where a
master weight has a 16-bit (or fp32) copy in the model file, both are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.location import Location
from ckpttools.plan import SourceCheck
from ckpttools.tensors import FLOAT32, ByteRange, DType, Strided, TensorRef, spans


class Scan(Struct, frozen=True, kw_only=True):
    """A range to be read; with a dtype, its elements are looked at. `name` says what it is a part of.

    `squares` are running means of squares, which cannot be negative.
    """

    source: ByteRange
    dtype: DType | None
    name: str
    squares: bool = False
    many: bool = False  # small tensors in one task

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


class ScanView(Struct, frozen=True, kw_only=True):
    """A view with holes between its elements, which are looked at as those of a `Scan` are. They are read by
    themselves, whatever else is read of the bytes around them.
    """

    source: Strided
    dtype: DType
    name: str
    squares: bool = False

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


class Compare(Struct, frozen=True, kw_only=True):
    """Master weights (fp32) and the same elements of the model file, in `dtype`."""

    master: ByteRange
    model: ByteRange
    dtype: DType
    name: str
    first: int  # index of the first element within the parameter
    many: bool = False

    @property
    def nbytes(self) -> int:
        return self.master.nbytes + self.model.nbytes


class Twins(Struct, frozen=True, kw_only=True):
    """Two copies of the same tensor, which must be equal byte for byte.

    Where some bytes belong to another task too (not `apart`), both are read once more.
    """

    one: ByteRange
    other: ByteRange
    name: str
    twin: str
    apart: bool = True

    @property
    def nbytes(self) -> int:
        return self.one.nbytes + self.other.nbytes


class Moments(Struct, frozen=True, kw_only=True):
    """The same elements of Adam's exp_avg and exp_avg_sq: a mean of gradients and a mean of their squares."""

    mean: ByteRange
    square: ByteRange
    dtype: DType
    name: str

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.square.nbytes


Pair = Compare | Twins | Moments
Plain = Scan | ScanView | Pair


class Joined(Struct, frozen=True, kw_only=True):
    """Small tasks of one kind whose bytes follow each other, on both sides of pairs: `whole` is all of them
    at once, which costs no more than one. Where something is odd about it, each of `tasks` is carried out.
    """

    whole: Plain
    tasks: tuple[Plain, ...]

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes


Task = Plain | Joined


def plain(task: Task) -> Plain:
    """The task that reads the same bytes at once."""
    return task.whole if isinstance(task, Joined) else task


def parts(task: Task) -> tuple[Plain, ...]:
    """The tasks one by one."""
    return task.tasks if isinstance(task, Joined) else (task,)


def sources(task: Task) -> tuple[ByteRange, ...]:
    """What a task reads; of a view, from its first element to its last."""
    match plain(task):
        case Scan() as scan:
            return (scan.source,)
        case ScanView() as view:
            return tuple(spans(view.source))
        case pair:
            return sides(pair)


def sides(pair: Pair) -> tuple[ByteRange, ByteRange]:
    """The two ranges that are held against each other."""
    match pair:
        case Compare(master=one, model=other) | Twins(one=one, other=other):
            return one, other
        case Moments(mean=one, square=other):
            return one, other


def itemsizes(pair: Pair) -> tuple[int, int]:
    """The bytes of one element on either side."""
    match pair:
        case Compare(dtype=dtype):
            return FLOAT32.itemsize, dtype.itemsize
        case Moments(dtype=dtype):
            return dtype.itemsize, dtype.itemsize
        case Twins():
            return 1, 1


class NonFinite(Struct, frozen=True, kw_only=True):
    """NaN or Inf in a block of a tensor; `byte` is where the first one lies in the file."""

    path: Location
    byte: int
    name: str
    nan: int
    inf: int


class Odd(Struct, frozen=True, kw_only=True):
    """Elements that training does not make. `what`: "wild" are finite and beyond any sense, "negative" are
    squares below zero, a "hole" is zeros in a mean of squares where the mean itself is not zero.
    """

    path: Location
    name: str
    count: int
    what: Literal["wild", "negative", "hole"]


class Unlike(Struct, frozen=True, kw_only=True):
    """Two copies of the same tensor that differ."""

    path: Location
    name: str
    twin: str


class Mismatch(Struct, frozen=True, kw_only=True):
    """A model weight that is not its master weight, rounded. `element` counts within the parameter."""

    master: Location
    model: Location
    name: str
    element: int
    dtype: DType


class BadChecksum(Struct, frozen=True, kw_only=True):
    check: SourceCheck


class Constant(Struct, frozen=True, kw_only=True):
    """A block whose `count` elements all have the same bits: `value`."""

    path: Location
    name: str
    count: int
    value: float


class Denormal(Struct, frozen=True, kw_only=True):
    """Numbers smaller than the type can hold in full, in a block that is flooded with them."""

    path: Location
    name: str
    count: int


Problem = NonFinite | Odd | Mismatch | Unlike | BadChecksum
Pattern = Constant | Denormal  # of a block: the whole tensor tells whether it means anything
Result = Problem | Pattern


def join(tasks: Iterable[Plain]) -> Iterator[Task]:
    """The same work in as few tasks of at most a block as can be: neighbours are joined."""
    from ckpttools.values import BLOCK_NBYTES  # numpy: of no use to headers

    run: list[Plain] = []
    nbytes = 0
    for task in tasks:
        if run and nbytes + task.nbytes <= BLOCK_NBYTES and _follows(run[-1], task):
            nbytes += task.nbytes
        else:
            yield from _joined(run)
            run, nbytes = [], task.nbytes
        run.append(task)
    yield from _joined(run)


def _follows(one: Plain, other: Plain) -> bool:
    match one, other:
        case Scan(), Scan():
            alike = one.dtype is other.dtype and one.squares == other.squares
            return alike and _adjoin(one.source, other.source)
        case Compare(), Compare():
            alike = one.dtype is other.dtype
            return alike and _adjoin(one.master, other.master) and _adjoin(one.model, other.model)
        case Moments(), Moments():
            alike = one.dtype is other.dtype
            return alike and _adjoin(one.mean, other.mean) and _adjoin(one.square, other.square)
    return False


def _adjoin(one: ByteRange, other: ByteRange) -> bool:
    return one.end == other.start and (one.path is other.path or one.path == other.path)


def _joined(run: list[Plain]) -> Iterator[Task]:
    if len(run) < 2:
        yield from run
        return
    match run[0], run[-1]:
        case Scan() as first, Scan() as last:
            source = _span(first.source, last.source)
            yield Joined(whole=replace(first, source=source, many=True), tasks=tuple(run))
        case Compare() as first, Compare() as last:
            master, model = _span(first.master, last.master), _span(first.model, last.model)
            yield Joined(whole=replace(first, master=master, model=model, many=True), tasks=tuple(run))
        case Moments() as first, Moments() as last:
            mean, square = _span(first.mean, last.mean), _span(first.square, last.square)
            yield Joined(whole=replace(first, mean=mean, square=square), tasks=tuple(run))


def _span(first: ByteRange, last: ByteRange) -> ByteRange:
    return ByteRange(first.path, first.start, last.end - first.start)


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
    match one.chunks, other.chunks:
        case (ByteRange() as left,), (ByteRange() as right,):
            yield left, right, 0
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
