"""Tensors as data on disk: a dtype, a shape and the byte ranges that hold the value, unread.

A `TensorRef` is immutable and cheap; slicing and joining it moves no data. Its chunks, concatenated,
are the tensor's value in C order, little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from ckpttools.location import Location


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """An element type. `name` is torch's (`bfloat16`), `short` the command line's (`bf16`)."""

    name: str
    short: str
    itemsize: int
    safetensors: str | None  # the code in a safetensors header; None where that format has none
    storage: str | None  # torch's typed storage class; None for types that only UntypedStorage holds

    @property
    def is_float(self) -> bool:
        return self.name.startswith(("float", "bfloat"))

    def __str__(self) -> str:
        return self.name


def _dtype(name: str, short: str, itemsize: int, safetensors: str | None, storage: str | None) -> DType:
    return DType(name=name, short=short, itemsize=itemsize, safetensors=safetensors, storage=storage)


FLOAT64 = _dtype("float64", "fp64", 8, "F64", "DoubleStorage")
FLOAT32 = _dtype("float32", "fp32", 4, "F32", "FloatStorage")
FLOAT16 = _dtype("float16", "fp16", 2, "F16", "HalfStorage")
BFLOAT16 = _dtype("bfloat16", "bf16", 2, "BF16", "BFloat16Storage")
INT64 = _dtype("int64", "int64", 8, "I64", "LongStorage")
UINT8 = _dtype("uint8", "uint8", 1, "U8", "ByteStorage")

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        FLOAT64,
        FLOAT32,
        FLOAT16,
        BFLOAT16,
        INT64,
        _dtype("int32", "int32", 4, "I32", "IntStorage"),
        _dtype("int16", "int16", 2, "I16", "ShortStorage"),
        _dtype("int8", "int8", 1, "I8", "CharStorage"),
        UINT8,
        _dtype("bool", "bool", 1, "BOOL", "BoolStorage"),
        _dtype("uint16", "uint16", 2, "U16", None),
        _dtype("uint32", "uint32", 4, "U32", None),
        _dtype("uint64", "uint64", 8, "U64", None),
        _dtype("complex64", "complex64", 8, "C64", "ComplexFloatStorage"),
        _dtype("complex128", "complex128", 16, None, "ComplexDoubleStorage"),
        _dtype("float8_e4m3fn", "fp8_e4m3", 1, "F8_E4M3", None),
        _dtype("float8_e5m2", "fp8_e5m2", 1, "F8_E5M2", None),
        _dtype("float8_e4m3fnuz", "fp8_e4m3fnuz", 1, "F8_E4M3FNUZ", None),
        _dtype("float8_e5m2fnuz", "fp8_e5m2fnuz", 1, "F8_E5M2FNUZ", None),
        _dtype("float8_e8m0fnu", "fp8_e8m0", 1, "F8_E8M0", None),
    )
}
BY_STORAGE: dict[str, DType] = {d.storage: d for d in DTYPES.values() if d.storage}
BY_SAFETENSORS: dict[str, DType] = {d.safetensors: d for d in DTYPES.values() if d.safetensors}
# conversions that lose nothing, by name
EXACT = {(a, b) for a in ("float16", "bfloat16") for b in ("float32", "float64")} | {("float32", "float64")}


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`nbytes` bytes of the file at `path`, from `start`."""

    path: Location
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def cut(self, start: int, nbytes: int) -> ByteRange:
        return ByteRange(self.path, self.start + start, nbytes)


@dataclass(frozen=True, slots=True)
class Zeros:
    """`nbytes` zero bytes that no file holds."""

    nbytes: int

    def cut(self, start: int, nbytes: int) -> Zeros:
        return Zeros(nbytes)


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that no file holds: headers, pickles, JSON, a step that was an int."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def cut(self, start: int, nbytes: int) -> Literal:
        return Literal(self.data[start : start + nbytes])


@dataclass(frozen=True, slots=True, kw_only=True)
class Strided:
    """Elements `first` to `first + numel` (in C order) of a view that is not contiguous on disk.

    The element at index (i, j, ...) is the `itemsize` bytes at `start + itemsize * (i * strides[0] + ...)`.
    """

    path: Location
    start: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    first: int
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def end(self) -> int:
        """The end of the whole view in the file, whatever part of it this is; no dimension is 0."""
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return self.start + (last + 1) * self.itemsize

    def cut(self, start: int, nbytes: int) -> Strided:
        assert start % self.itemsize == 0 and nbytes % self.itemsize == 0
        return Strided(
            path=self.path,
            start=self.start,
            itemsize=self.itemsize,
            shape=self.shape,
            strides=self.strides,
            first=self.first + start // self.itemsize,
            numel=nbytes // self.itemsize,
        )


@dataclass(frozen=True, slots=True)
class Box:
    """A part of an array that lies in C order from byte `start` of a file: `shape` elements at `origin`."""

    path: Location
    start: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Elements `first` to `first + numel` (in C order) of an array that lies in boxes, which fill it.

    A tensor split along two dimensions is few boxes, but as ranges in C order one for each row of each box.
    """

    itemsize: int
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]  # disjoint, together the whole array
    first: int
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def cut(self, start: int, nbytes: int) -> Tiles:
        assert start % self.itemsize == 0 and nbytes % self.itemsize == 0
        return Tiles(
            itemsize=self.itemsize,
            shape=self.shape,
            boxes=self.boxes,
            first=self.first + start // self.itemsize,
            numel=nbytes // self.itemsize,
        )

    @property
    def ranges(self) -> Iterator[ByteRange]:
        """The bytes of each box in the rows (along the first dimension) that hold these elements."""
        inner = math.prod(self.shape[1:])
        if not self.numel:
            return
        low, high = self.first // inner, -(-(self.first + self.numel) // inner)
        for box in self.boxes:
            row = math.prod(box.shape[1:]) * self.itemsize
            top = max(low - box.origin[0], 0)
            rows = min(high - box.origin[0], box.shape[0]) - top
            if rows > 0:
                yield ByteRange(box.path, box.start + top * row, rows * row)


Source = ByteRange | Zeros | Literal | Strided | Tiles  # bytes as they lie


def spans(chunk: Source) -> Iterator[ByteRange]:
    """The parts of files that a chunk's bytes lie in; those of a view may hold bytes of others too."""
    match chunk:
        case ByteRange():
            yield chunk
        case Strided():
            yield ByteRange(chunk.path, chunk.start, chunk.end - chunk.start)
        case Tiles():
            yield from chunk.ranges


@dataclass(frozen=True, slots=True)
class Cast:
    """The elements of `chunks` converted from one dtype to another, rounding to nearest even."""

    chunks: tuple[Source, ...]
    source: DType
    target: DType

    @property
    def numel(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks) // self.source.itemsize

    @property
    def nbytes(self) -> int:
        return self.numel * self.target.itemsize

    def cut(self, start: int, nbytes: int) -> Cast:
        item, width = self.target.itemsize, self.source.itemsize
        assert start % item == 0 and nbytes % item == 0
        inner = cut_chunks(self.chunks, start // item * width, nbytes // item * width)
        return Cast(inner, self.source, self.target)


@dataclass(frozen=True, slots=True)
class Term:
    """One of the runs of elements that a `Mean` is taken of, and how much it counts."""

    chunks: tuple[Source, ...]
    dtype: DType
    weight: float


@dataclass(frozen=True, slots=True)
class Mean:
    """The weighted mean of as many elements of each term: products and sums in float64, in the order of the
    terms, divided by the sum of the weights, and rounded to `target` at the end.
    """

    terms: tuple[Term, ...]
    target: DType

    @property
    def numel(self) -> int:
        return sum(chunk.nbytes for chunk in self.terms[0].chunks) // self.terms[0].dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.numel * self.target.itemsize

    def cut(self, start: int, nbytes: int) -> Mean:
        item = self.target.itemsize
        assert start % item == 0 and nbytes % item == 0
        first, numel = start // item, nbytes // item
        terms = tuple(
            Term(cut_chunks(t.chunks, first * t.dtype.itemsize, numel * t.dtype.itemsize), t.dtype, t.weight)
            for t in self.terms
        )
        return Mean(terms, self.target)


Chunk = Source | Cast | Mean
C = TypeVar("C", bound=Chunk)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that has not been read: the value is the concatenation of its chunks."""

    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def flat(self, start: int, numel: int) -> TensorRef:
        """Elements `start` to `start + numel` as a 1-D tensor, still unread."""
        if not 0 <= start <= start + numel <= self.numel:
            raise ValueError(f"elements {start}..{start + numel} of a tensor of {self.numel}")
        item = self.dtype.itemsize
        return TensorRef(self.dtype, (numel,), cut_chunks(self.chunks, start * item, numel * item))

    def view(self, shape: tuple[int, ...]) -> TensorRef:
        """The same value in another shape of as many elements."""
        if math.prod(shape) != self.numel:
            raise ValueError(f"{self.numel} elements do not fill the shape {shape}")
        return TensorRef(self.dtype, shape, self.chunks)

    def cast(self, dtype: DType) -> TensorRef:
        """The same values as `dtype`, still unread, rounded at most once.

        Raises ValueError for one that was rounded already: cast the tensor that it was made from.
        """
        if dtype is self.dtype:
            return self
        if any(isinstance(chunk, Mean) for chunk in self.chunks):
            if not all(isinstance(chunk, Mean) for chunk in self.chunks):
                raise ValueError("a tensor of which some elements are means cannot be cast")
            means = (chunk for chunk in self.chunks if isinstance(chunk, Mean))
            return TensorRef(dtype, self.shape, tuple(Mean(mean.terms, dtype) for mean in means))
        parts: list[tuple[DType, Source]] = []
        for chunk in self.chunks:
            assert not isinstance(chunk, Mean)
            if not isinstance(chunk, Cast):
                parts.append((self.dtype, chunk))
            elif (chunk.source.name, chunk.target.name) in EXACT:
                parts += ((chunk.source, inner) for inner in chunk.chunks)
            else:
                raise ValueError("a cast tensor cannot be cast again: cast the one that it was made from")
        out: list[Chunk] = []
        for source, run in groupby(parts, key=itemgetter(0)):
            chunks = tuple(chunk for _, chunk in run)
            out += chunks if source is dtype else (Cast(chunks, source, dtype),)
        return TensorRef(dtype, self.shape, tuple(out))


def cut_chunks(chunks: Iterable[C], start: int, nbytes: int) -> tuple[C, ...]:
    """Bytes `start` to `start + nbytes` of the concatenation of `chunks`."""
    out: list[Any] = []
    end = start + nbytes
    at = 0
    for chunk in chunks:
        low, high = max(start, at), min(end, at + chunk.nbytes)
        if low < high:
            out.append(chunk.cut(low - at, high - low))
        at += chunk.nbytes
        if at >= end:
            break
    return join_chunks(out) if len(out) > 1 else tuple(out)


def join_chunks(chunks: Iterable[C]) -> tuple[C, ...]:
    """The same bytes in as few chunks as possible; empty ones dropped."""
    out: list[Any] = []
    for dtypes, run in groupby((chunk for chunk in chunks if chunk.nbytes), key=_dtypes):
        if dtypes is not None:
            casts = (chunk for chunk in run if isinstance(chunk, Cast))
            out.append(Cast(join_chunks(inner for cast in casts for inner in cast.chunks), *dtypes))
            continue
        for chunk in run:
            match out[-1] if out else None, chunk:
                case ByteRange(path, start, nbytes), ByteRange(path2, start2, nbytes2) if (
                    path == path2 and start + nbytes == start2
                ):
                    out[-1] = ByteRange(path, start, nbytes + nbytes2)
                case Zeros(nbytes), Zeros(nbytes2):
                    out[-1] = Zeros(nbytes + nbytes2)
                case _:
                    out.append(chunk)
    return tuple(out)


def _dtypes(chunk: Chunk) -> tuple[DType, DType] | None:
    """What a cast converts from and to; None for bytes as they lie."""
    return (chunk.source, chunk.target) if isinstance(chunk, Cast) else None


def cat(tensors: Iterable[TensorRef], dtype: DType) -> TensorRef:
    """The 1-D concatenation of the tensors' elements, all of type `dtype`."""
    refs = list(tensors)
    if any(ref.dtype is not dtype for ref in refs):
        raise ValueError("tensors of several dtypes cannot be joined")
    chunks = join_chunks(chunk for ref in refs for chunk in ref.chunks)
    return TensorRef(dtype, (sum(ref.numel for ref in refs),), chunks)


class Flat:
    """A long 1-D tensor made of many pieces, cut at many places: prefix sums make each cut cheap.

    ZeRO's flat groups are joined from one piece per rank and cut at every parameter.
    """

    __slots__ = ("_chunks", "_starts", "dtype", "numel")

    def __init__(self, ref: TensorRef) -> None:
        self.dtype, self.numel = ref.dtype, ref.numel
        self._chunks = ref.chunks
        self._starts = [0]
        for chunk in ref.chunks:
            self._starts.append(self._starts[-1] + chunk.nbytes)

    def cut(self, start: int, numel: int, shape: tuple[int, ...] | None = None) -> TensorRef:
        """Elements `start` to `start + numel`, as `shape`."""
        from bisect import bisect_right

        if not 0 <= start <= start + numel <= self.numel:
            raise ValueError(f"elements {start}..{start + numel} of a tensor of {self.numel}")
        item = self.dtype.itemsize
        first = max(bisect_right(self._starts, start * item) - 1, 0)
        offset = self._starts[first] if self._chunks else 0
        rest = (self._chunks[i] for i in range(first, len(self._chunks)))  # no copy of a long tail
        chunks = cut_chunks(rest, start * item - offset, numel * item)
        return TensorRef(self.dtype, (numel,) if shape is None else shape, chunks)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous tensor of this shape (as torch gives them)."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return tuple(strides)


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a view with these strides lies on disk in C order without holes."""
    if math.prod(shape) == 0:
        return True
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1:
            if stride != expected:
                return False
            expected *= n
    return True
