"""The only module that computes on tensor values: read, gather, cast, scan, compare.

Everything works in blocks of bounded size, so memory does not grow with the tensors.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ckpttools.errors import CkptError, Unsupported, UsageError
from ckpttools.tensors import DTYPES, FLOAT64, ByteRange, Chunk, DType, Strided, TensorRef, Zeros

Array = npt.NDArray[Any]

BLOCK_NBYTES = 1024 * 1024  # smaller ones spend their time in Python, which only one thread can at a time
_GATHER_NBYTES = 1024 * 1024
_OPEN_FILES = 32

_NUMPY: dict[str, np.dtype[Any]] = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES}
_UNSIGNED = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
_SIGNED = {n: np.dtype(f"i{n}") for n in (1, 2, 4, 8)}
# Sign and exponent bits of +Inf, for the formats that have Inf; NaNs are the patterns above it.
_INFINITY = {"float64": 0x7FF0 << 48, "float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}


class Handles:
    """File descriptors of one thread, at most `limit` open at once, the least recently used closed first."""

    def __init__(self, flags: int, limit: int = _OPEN_FILES) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._limit = limit
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __getitem__(self, path: Path) -> int:
        fd = self._open.get(path)
        if fd is None:
            fd = os.open(path, self._flags)
            self._open[path] = fd
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(path)
        return fd

    def close(self) -> None:
        """Close every descriptor; an error of the last write may show only here."""
        while self._open:
            os.close(self._open.popitem()[1])


class Reader:
    """Reads chunks for one thread: open descriptors and one scratch buffer of fixed size.

    Raises `CkptError` "source-truncated" where a file ends too early, `UsageError` "source-unreadable"
    where the system refuses. `nbytes_read` counts what was read so far.
    """

    def __init__(self) -> None:
        self.nbytes_read = 0
        self._files = Handles(os.O_RDONLY)
        self._scratch = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # all that was asked for has been read
            self._files.close()

    def fill(self, view: memoryview, chunks: Iterable[Chunk]) -> None:
        """Read `chunks`, one after the other, into `view`, which is exactly as long."""
        at = 0
        for chunk in chunks:
            part = view[at : at + chunk.nbytes]
            at += chunk.nbytes
            match chunk:
                case ByteRange(path, start, _):
                    self.read(part, path, start)
                case Zeros():
                    np.frombuffer(part, np.uint8)[:] = 0
                case Strided():
                    self._gather(part, chunk)

    def read(self, view: memoryview, path: Path, start: int) -> None:
        """Fill `view` with the bytes of the file at `path` from `start`."""
        try:
            fd = self._files[path]
            got = os.preadv(fd, [view], start)
            while 0 < got < len(view):
                more = os.preadv(fd, [view[got:]], start + got)
                if not more:
                    break
                got += more
        except OSError as error:
            raise UsageError(
                "source-unreadable",
                f"cannot read the source: {error.strerror}",
                where=path,
                why="nothing was written: a copy without these bytes would be damaged",
                hint="check that the file exists and may be read, and the health of its disk",
            ) from error
        if got < len(view):
            raise truncated(path, start + len(view), start + got)
        self.nbytes_read += got

    def _gather(self, view: memoryview, chunk: Strided) -> None:
        """Copy a view that is not contiguous on disk, in boxes that are."""
        if not self._scratch:
            self._scratch = memoryview(bytearray(_GATHER_NBYTES))
        out = np.frombuffer(view, _element(chunk.itemsize))
        at = 0
        for origin, shape in _boxes(chunk.shape, chunk.first, chunk.numel):
            numel = math.prod(shape)
            offset = sum(i * stride for i, stride in zip(origin, chunk.strides, strict=True))
            box = out[at : at + numel].reshape(shape)
            self._read_box(box, chunk.path, chunk.start + offset * chunk.itemsize, chunk.strides)
            at += numel

    def _read_box(self, out: Array, path: Path, start: int, strides: tuple[int, ...]) -> None:
        """Read the box in one span, or in slices where the span is long or mostly holes.

        Reading through 8 KiB costs about as much as another call does.
        """
        extents = [(n - 1) * stride for n, stride in zip(out.shape, strides, strict=True)]
        if self._fits(sum(extents) + 1, out):
            self._read_spans(out[np.newaxis], path, start, (0, *strides), sum(extents) + 1)
            return
        axis = extents.index(max(extents))
        rows, stride = np.moveaxis(out, axis, 0), strides[axis]
        inner = strides[:axis] + strides[axis + 1 :]
        numel = sum(extents) - extents[axis] + 1  # of the span of one slice
        step = _GATHER_NBYTES // (numel * out.itemsize)
        if self._fits(numel, rows[0]):
            for at in range(0, len(rows), step):
                low = start + at * stride * out.itemsize
                self._read_spans(rows[at : at + step], path, low, (stride, *inner), numel)
            return
        half = len(rows) // 2
        self._read_box(rows[:half], path, start, (stride, *inner))
        self._read_box(rows[half:], path, start + half * stride * out.itemsize, (stride, *inner))

    def _fits(self, span_numel: int, out: Array) -> bool:
        nbytes = span_numel * out.itemsize
        return nbytes <= 8192 or (nbytes <= _GATHER_NBYTES and span_numel <= 16 * out.size)

    def _read_spans(
        self, rows: Array, path: Path, start: int, strides: tuple[int, ...], span_numel: int
    ) -> None:
        """One read per row; a row's elements lie in `span_numel` elements of the file."""
        nbytes, step = span_numel * rows.itemsize, strides[0] * rows.itemsize
        for k in range(len(rows)):
            self.read(self._scratch[k * nbytes : (k + 1) * nbytes], path, start + k * step)
        spans = np.frombuffer(self._scratch, rows.dtype, len(rows) * span_numel)
        steps = [nbytes, *(stride * rows.itemsize for stride in strides[1:])]
        rows[...] = np.lib.stride_tricks.as_strided(spans, rows.shape, steps)


def truncated(path: Path, need: int, have: int) -> CkptError:
    """A source file that is shorter than its own headers say."""
    return CkptError(
        "source-truncated",
        f"the file ends at byte {have}, but its tensors go to byte {need}",
        where=path,
        why=f"{need - have} bytes of tensor data are missing",
        hint="copy the file again from where it was written, or fall back to an earlier checkpoint",
    )


class Cutter:
    """Cuts a sequence of chunks from front to back, in time linear in their number."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._rest = iter(chunks)
        self._chunk: Chunk = Zeros(0)

    def take(self, nbytes: int) -> tuple[Chunk, ...]:
        """The next `nbytes` bytes, fewer at the end."""
        out: list[Chunk] = []
        while nbytes:
            if not self._chunk.nbytes:
                following = next(self._rest, None)
                if following is None:
                    break
                self._chunk = following
                continue
            here = min(nbytes, self._chunk.nbytes)
            out.append(self._chunk.cut(0, here))
            self._chunk = self._chunk.cut(here, self._chunk.nbytes - here)
            nbytes -= here
        return tuple(out)


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """numpy's type of the same elements; bfloat16 and float8 come from ml_dtypes."""
    return _NUMPY[dtype.name]


def numpy_array(view: memoryview, dtype: DType) -> Array:
    """The elements in `view` as a 1-D array that shares its memory."""
    return np.frombuffer(view, numpy_dtype(dtype))


def blocks(
    chunks: Iterable[Chunk], dtype: DType, block_nbytes: int = BLOCK_NBYTES, reader: Reader | None = None
) -> Iterator[Array]:
    """The elements of `chunks` in order, in 1-D arrays of `block_nbytes` bytes, the last one shorter.

    An array is valid until the next one is asked for: they share one buffer. Raises as `Reader` does.
    """
    if reader is None:
        with Reader() as own:
            yield from blocks(chunks, dtype, block_nbytes, own)
        return
    item = dtype.itemsize
    buffer = memoryview(bytearray(max(block_nbytes // item, 1) * item))
    cutter = Cutter(chunks)
    while parts := cutter.take(len(buffer)):
        view = buffer[: sum(part.nbytes for part in parts)]
        reader.fill(view, parts)
        yield numpy_array(view, dtype)


def load(ref: TensorRef) -> Array:
    """The whole tensor in memory; for scalars and tests."""
    buffer = bytearray(ref.nbytes)
    with Reader() as reader:
        reader.fill(memoryview(buffer), ref.chunks)
    return np.frombuffer(buffer, numpy_dtype(ref.dtype)).reshape(ref.shape)


def cast(block: Array, source: DType, target: DType) -> Array:
    """Elements of one float type as another, rounded to nearest even; bits as torch's `.to()` gives them.

    Narrow types are reached through float32, as in torch: float64 is rounded twice. NaN stays NaN, its
    payload may change. Raises `Unsupported` for types that are not floats and for float8_e8m0fnu as
    target (its values are powers of two: scales, not weights).
    """
    if source == target:
        return block
    if not (source.is_float and target.is_float) or target.name == "float8_e8m0fnu":
        raise Unsupported(
            "cast",
            f"no cast from {source} to {target}",
            why="only floating point values can be rounded to another floating point type",
            hint="leave these tensors as they are, or choose one of fp32, fp16, bf16",
        )
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if target == FLOAT64:
            return block.astype(np.float64)
        wide = block.astype(np.float32, copy=False)
        if target.name == "float8_e4m3fn":
            wide = np.clip(wide, -448, 448)  # torch saturates: this type has no Inf
        return wide.astype(numpy_dtype(target), copy=False)


def nonfinite(block: Array, dtype: DType) -> tuple[int, int]:
    """How many elements are NaN, and how many +-Inf; (0, 0) for types that have neither.

    The block should fit in the cache: it is read twice, at about 50 GB/s together.
    """
    infinity = _INFINITY.get(dtype.name)
    if infinity is None:
        return _nonfinite_slow(block, dtype)
    bits = block.view(_UNSIGNED[dtype.itemsize])
    sign = 1 << (8 * dtype.itemsize - 1)
    # The largest positive value shows as signed, the largest negative one as unsigned.
    if not bits.size or (
        int(bits.view(f"i{dtype.itemsize}").max()) < infinity and int(bits.max()) < sign | infinity
    ):
        return 0, 0
    magnitude = bits & bits.dtype.type(sign - 1)
    return int(np.count_nonzero(magnitude > infinity)), int(np.count_nonzero(magnitude == infinity))


def _nonfinite_slow(block: Array, dtype: DType) -> tuple[int, int]:
    if not (dtype.is_float or dtype.name.startswith("complex")):
        return 0, 0
    wide = block.astype(np.complex128 if dtype.name.startswith("complex") else np.float32)
    nan = np.isnan(wide)
    return int(np.count_nonzero(nan)), int(np.count_nonzero(np.isinf(wide) & ~nan))


# The bits of 1e10: no weight or moment of a network that trains comes near it.
_WILD = {"float64": 0x4202A05F20000000, "float32": 0x501502F9, "bfloat16": 0x5015}


def wild(block: Array, dtype: DType) -> int:
    """How many finite elements are larger than 1e10, the type's own extremes (masks) not counted."""
    limit = _WILD.get(dtype.name)
    if limit is None or not block.size:
        return 0
    bits = block.view(_UNSIGNED[dtype.itemsize])
    sign = 1 << (8 * dtype.itemsize - 1)
    if int(bits.view(f"i{dtype.itemsize}").max()) <= limit and int(bits.max()) <= sign | limit:
        return 0
    magnitude = bits & bits.dtype.type(sign - 1)
    return int(np.count_nonzero((magnitude > limit) & (magnitude < _INFINITY[dtype.name] - 1)))


def ordinary(block: Array, dtype: DType, *, squares: bool = False) -> bool:
    """Whether `nonfinite`, `wild` and, for `squares`, `negatives` would find nothing: one or two passes
    instead of five. False where they must tell: for other types, and for squares of -0.
    """
    infinity = _INFINITY.get(dtype.name)
    if infinity is None or not block.size:
        return not block.size
    limit = _WILD.get(dtype.name, infinity - 1)
    bits = block.view(_UNSIGNED[dtype.itemsize])
    if squares:  # as unsigned numbers, those below zero are the largest
        return int(np.maximum.reduce(bits)) <= limit
    sign = 1 << (8 * dtype.itemsize - 1)
    signed = bits.view(_SIGNED[dtype.itemsize])
    return int(np.maximum.reduce(signed)) <= limit and int(np.maximum.reduce(bits)) <= sign | limit


def negatives(block: Array) -> int:
    """How many elements of a float block are below zero."""
    return int(np.count_nonzero(block < 0)) if block.size and block.min() < 0 else 0


def holes(mean: Array, square: Array) -> int:
    """How many elements have a mean of squares of 0 and a mean that is not: no gradients can give that.

    Means below 1e-15 do not count: the square of such a gradient may be too small for the type.
    """
    if not square.size or square.min() > 0:
        return 0
    return int(np.count_nonzero((square == 0) & (np.abs(mean) > 1e-15)))


def same_after_cast(master: Array, model: Array, dtype: DType) -> int | None:
    """The first index where `master` (float32), cast to `dtype`, differs in bits from `model`, or None.

    Every NaN equals every other. Works in blocks that stay in the cache.
    """
    if master.size != model.size:
        raise ValueError(f"{master.size} master weights for {model.size} model weights")
    step = BLOCK_NBYTES // 4
    unsigned = _UNSIGNED[dtype.itemsize]
    for at in range(0, master.size, step):
        there = model[at : at + step]
        if _rounds_to(master[at : at + step], there, dtype):
            continue
        here = cast(master[at : at + step], DTYPES["float32"], dtype)
        differs = here.view(unsigned) != there.view(unsigned)
        if differs.any():
            differs &= ~(np.isnan(here) & np.isnan(there))
            if differs.any():
                return at + int(differs.argmax())
    return None


def _rounds_to(master: Array, model: Array, dtype: DType) -> bool:
    """Whether float32 bits, rounded as integers, are the bits of bfloat16: twice as fast as the cast.

    NaNs may round to other NaNs, and other types are not looked at: False means that the cast must tell.
    """
    if dtype.name != "bfloat16":
        return False
    bits = master.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)  # the upper halves are the rounded values now
    there = model.view(np.uint16).astype(np.uint32)
    there <<= np.uint32(16)
    rounded -= there
    return not rounded.size or int(np.maximum.reduce(rounded)) <= 0xFFFF


def _element(itemsize: int) -> np.dtype[Any]:
    """A type of this size whose elements numpy moves without looking at them."""
    return _UNSIGNED.get(itemsize) or np.dtype(f"V{itemsize}")


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
