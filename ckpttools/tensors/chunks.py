"""Where a tensor's bytes are, or what they are computed from: chunks, which can be cut and joined unread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.location import Location
from ckpttools.tensors.dtypes import DType


class ByteRange(NamedTuple):
    """`nbytes` bytes of the file at `path`, from `start`. Hundreds of thousands are made, and hashed."""

    path: Location
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def cut(self, start: int, nbytes: int) -> ByteRange:
        return ByteRange(self.path, self.start + start, nbytes)


class Zeros(Struct, frozen=True):
    """`nbytes` zero bytes that no file holds."""

    nbytes: int

    def cut(self, start: int, nbytes: int) -> Zeros:
        return Zeros(nbytes)


class Literal(Struct, frozen=True):
    """Bytes that no file holds: headers, pickles, JSON, a step that was an int."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def cut(self, start: int, nbytes: int) -> Literal:
        return Literal(self.data[start : start + nbytes])


class Strided(Struct, frozen=True, kw_only=True):
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

    def byte_of(self, element: int) -> int:
        """Where in the file element `element` of the whole view begins."""
        at = 0
        for n, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            element, index = divmod(element, n)
            at += index * stride
        return self.start + at * self.itemsize

    def in_file_order(self) -> ByteRange | Strided:
        """The elements of a whole view, the smallest step innermost, and what it repeats at even steps once:
        a range where it leaves no holes. A part of a view stays as it is.
        """
        if self.first or not self.numel or self.numel != math.prod(self.shape):
            return self
        levels = [(1, 1)]  # how many, and the step between them, from the smallest step on
        for stride, n in sorted(zip(self.strides, self.shape, strict=True)):
            numel, step = levels[-1]
            if stride % step == 0 and stride <= numel * step:  # it begins where these end, or before
                levels[-1] = numel + (n - 1) * stride // step, step
            elif n > 1:
                levels.append((n, stride))
        if len(levels) == 1:
            return ByteRange(self.path, self.start, levels[0][0] * self.itemsize)
        shape = tuple(numel for numel, _ in levels[::-1])
        strides = tuple(step for _, step in levels[::-1])
        return replace(self, shape=shape, strides=strides, numel=math.prod(shape))


class Box(Struct, frozen=True):
    """A part of an array that lies in C order from byte `start` of a file: `shape` elements at `origin`."""

    path: Location
    start: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]


class Tiles(Struct, frozen=True, kw_only=True):
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


class Cast(Struct, frozen=True):
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


class Term(Struct, frozen=True):
    """One of the runs of elements that a `Mean` is taken of, and how much it counts."""

    chunks: tuple[Source, ...]
    dtype: DType
    weight: float


class Mean(Struct, frozen=True):
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
    chunks = tuple(chunks)
    if len(chunks) == 1 and isinstance(chunks[0], ByteRange) and chunks[0].nbytes:
        return chunks  # almost every tensor
    out: list[Any] = []
    for dtypes, run in groupby((chunk for chunk in chunks if chunk.nbytes), key=_dtypes):
        if dtypes is not None:
            casts = (chunk for chunk in run if isinstance(chunk, Cast))
            out.append(Cast(join_chunks(inner for cast in casts for inner in cast.chunks), *dtypes))
            continue
        for chunk in run:
            match out[-1] if out else None, chunk:
                case ByteRange(path, start, nbytes), ByteRange(path2, start2, nbytes2) if (
                    start + nbytes == start2 and (path is path2 or path == path2)
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
