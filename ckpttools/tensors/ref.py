"""A tensor as data on disk, unread: immutable and cheap; slicing and joining it moves no data.

Its chunks, concatenated, are the value in C order, little-endian.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

from msgspec import Struct

from ckpttools.tensors.chunks import ByteRange, Cast, Chunk, Mean, Source, cut_chunks, join_chunks
from ckpttools.tensors.dtypes import EXACT, DType


class TensorRef(Struct, frozen=True):
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
        if not 0 <= start <= start + numel <= self.numel:
            raise ValueError(f"elements {start}..{start + numel} of a tensor of {self.numel}")
        item = self.dtype.itemsize
        first = max(bisect_right(self._starts, start * item) - 1, 0)
        offset = self._starts[first] if self._chunks else 0
        if first < len(self._chunks) and isinstance(chunk := self._chunks[first], ByteRange):
            low, nbytes = start * item - offset, numel * item
            if 0 < nbytes <= chunk.nbytes - low:  # almost every one lies in one piece
                part = ByteRange(chunk.path, chunk.start + low, nbytes)
                return TensorRef(self.dtype, (numel,) if shape is None else shape, (part,))
        rest = (self._chunks[i] for i in range(first, len(self._chunks)))  # no copy of a long tail
        chunks = cut_chunks(rest, start * item - offset, numel * item)
        return TensorRef(self.dtype, (numel,) if shape is None else shape, chunks)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous tensor of this shape (as torch gives them)."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return tuple(strides)


@lru_cache(maxsize=4096)  # of many tensors, most have one of a few shapes
def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a view with these strides lies on disk in C order without holes."""
    if 0 in shape:
        return True
    expected = 1
    for n, stride in zip(shape[::-1], strides[::-1], strict=True):
        if n != 1:
            if stride != expected:
                return False
            expected *= n
    return True
