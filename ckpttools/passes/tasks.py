"""What a pass is to look at, and what it may find.

A byte passes its record's checksum and, where it belongs to a tensor, the scan for NaN and Inf; where a
master weight has a 16-bit (or fp32) copy in the model file, both are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ckpttools.location import Location
from ckpttools.plan import SourceCheck
from ckpttools.tensors import FLOAT32, ByteRange, DType, TensorRef


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
Pair = Compare | Twins | Moments


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


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """NaN or Inf in a block of a tensor; `byte` is where the first one lies in the file."""

    path: Location
    byte: int
    name: str
    nan: int
    inf: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Negative:
    """Squares below zero."""

    path: Location
    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wild:
    """Finite values beyond any sense."""

    path: Location
    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """Zeros in a mean of squares where the mean itself is not zero."""

    path: Location
    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlike:
    """Two copies of the same tensor that differ."""

    path: Location
    name: str
    twin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A model weight that is not its master weight, rounded. `element` counts within the parameter."""

    master: Location
    model: Location
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
