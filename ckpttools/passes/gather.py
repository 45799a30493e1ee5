"""Elements that are not contiguous on disk, views and tiles, copied in boxes that are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ckpttools.location import Location
from ckpttools.tensors import Strided, Tiles, contiguous_strides
from ckpttools.values import UNSIGNED, Array

GATHER_NBYTES = 1024 * 1024

Read = Callable[[memoryview, Location, int], None]  # fills the view with the bytes of a file from an offset


def gather(view: memoryview, chunk: Strided | Tiles, read: Read, scratch: memoryview) -> None:
    """Copy the elements of `chunk` to `view`, through `scratch`, which has `GATHER_NBYTES` bytes."""
    out = np.frombuffer(view, _element(chunk.itemsize))
    at = 0
    for origin, shape in _boxes(chunk.shape, chunk.first, chunk.numel):
        numel = math.prod(shape)
        box = out[at : at + numel].reshape(shape)
        at += numel
        if isinstance(chunk, Tiles):
            _tiles(box, origin, chunk, read, scratch)
        else:
            start = chunk.start + _offset(origin, chunk.strides) * chunk.itemsize
            _Gather(chunk.path, read, scratch).box(box, start, chunk.strides)


def _tiles(out: Array, origin: tuple[int, ...], chunk: Tiles, read: Read, scratch: memoryview) -> None:
    """Fill the box `out` at `origin` from each tile that it meets."""
    for tile in chunk.boxes:
        low = [max(a, b) for a, b in zip(origin, tile.origin, strict=True)]
        ends = zip(origin, out.shape, tile.origin, tile.shape, strict=True)
        high = [min(a + n, b + m) for a, n, b, m in ends]
        if all(a < b for a, b in zip(low, high, strict=True)):
            part = out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))]
            strides = contiguous_strides(tile.shape)
            inside = [a - o for a, o in zip(low, tile.origin, strict=True)]
            start = tile.start + _offset(inside, strides) * chunk.itemsize
            _Gather(tile.path, read, scratch).box(part, start, strides)


def _offset(origin: Sequence[int], strides: Sequence[int]) -> int:
    return sum(i * stride for i, stride in zip(origin, strides, strict=True))


class _Gather:
    """Reads boxes of one file."""

    def __init__(self, path: Location, read: Read, scratch: memoryview) -> None:
        self._path, self._read, self._scratch = path, read, scratch

    def box(self, out: Array, start: int, strides: tuple[int, ...]) -> None:
        """Read the box in one span, or in slices where the span is long or mostly holes.

        Reading through 8 KiB costs about as much as another call does.
        """
        extents = [(n - 1) * stride for n, stride in zip(out.shape, strides, strict=True)]
        if _fits(sum(extents) + 1, out):
            self._read_spans(out[np.newaxis], start, (0, *strides), sum(extents) + 1)
            return
        axis = extents.index(max(extents))
        rows, stride = np.moveaxis(out, axis, 0), strides[axis]
        inner = strides[:axis] + strides[axis + 1 :]
        numel = sum(extents) - extents[axis] + 1  # of the span of one slice
        step = GATHER_NBYTES // (numel * out.itemsize)
        if _fits(numel, rows[0]):
            for at in range(0, len(rows), step):
                low = start + at * stride * out.itemsize
                self._read_spans(rows[at : at + step], low, (stride, *inner), numel)
            return
        half = len(rows) // 2
        self.box(rows[:half], start, (stride, *inner))
        self.box(rows[half:], start + half * stride * out.itemsize, (stride, *inner))

    def _read_spans(self, rows: Array, start: int, strides: tuple[int, ...], span_numel: int) -> None:
        """One read per row; a row's elements lie in `span_numel` elements of the file."""
        nbytes, step = span_numel * rows.itemsize, strides[0] * rows.itemsize
        for k in range(len(rows)):
            self._read(self._scratch[k * nbytes : (k + 1) * nbytes], self._path, start + k * step)
        spans = np.frombuffer(self._scratch, rows.dtype, len(rows) * span_numel)
        steps = [nbytes, *(stride * rows.itemsize for stride in strides[1:])]
        rows[...] = np.lib.stride_tricks.as_strided(spans, rows.shape, steps)


def _fits(span_numel: int, out: Array) -> bool:
    nbytes = span_numel * out.itemsize
    return nbytes <= 8192 or (nbytes <= GATHER_NBYTES and span_numel <= 16 * out.size)


def _element(itemsize: int) -> np.dtype[Any]:
    """A type of this size whose elements numpy moves without looking at them."""
    return UNSIGNED.get(itemsize) or np.dtype(f"V{itemsize}")


def _boxes(
    shape: tuple[int, ...], first: int, numel: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(origin, shape) of the few boxes that hold elements `first` to `first + numel` in C order."""
    if not numel:
        return
    if not shape:
        yield (), ()
        return
    inner_shape, inner = shape[1:], math.prod(shape[1:])
    row, column = divmod(first, inner)
    if column or numel < inner:
        head = min(inner - column, numel)
        for origin, box in _boxes(inner_shape, column, head):
            yield (row, *origin), (1, *box)
        row, numel = row + 1, numel - head
    rows, tail = divmod(numel, inner)
    if rows:
        yield (row, *(0 for _ in inner_shape)), (rows, *inner_shape)
    for origin, box in _boxes(inner_shape, 0, tail):
        yield (row + rows, *origin), (1, *box)
