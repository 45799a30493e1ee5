"""Reading the bytes of chunks, in memory that does not grow with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np

from ckpttools.errors import CkptError, UsageError
from ckpttools.location import Location
from ckpttools.passes.gather import GATHER_NBYTES, gather
from ckpttools.passes.ranges import Cutter
from ckpttools.plan import reads
from ckpttools.stores.files import handle
from ckpttools.tensors import (
    ByteRange,
    Cast,
    DType,
    Literal,
    Mean,
    Source,
    Strided,
    TensorRef,
    Term,
    Tiles,
    Zeros,
)
from ckpttools.values import BLOCK_NBYTES, Array, cast, mean, nonfinite, numpy_array, numpy_dtype

_OPEN_FILES = 32
P = TypeVar("P")
T = TypeVar("T")


class Handles(Generic[P, T]):
    """Open files of one thread, at most `limit` at once, the least recently used closed first."""

    def __init__(self, open: Callable[[P], T], close: Callable[[T], None], limit: int = _OPEN_FILES) -> None:
        self._new, self._done, self._limit = open, close, limit
        self._open: OrderedDict[P, T] = OrderedDict()

    def __getitem__(self, path: P) -> T:
        found = self._open.get(path)
        if found is None:
            found = self._open[path] = self._new(path)
            if len(self._open) > self._limit:
                self._done(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(path)
        return found

    def close(self) -> None:
        """Close every file; an error of the last write may show only here."""
        while self._open:
            self._done(self._open.popitem()[1])


class Reader:
    """Reads chunks for one thread: open descriptors and one scratch buffer of fixed size.

    Raises `CkptError` "source-truncated" where a file ends too early, `UsageError` "source-unreadable"
    where the system refuses. `nbytes_read` counts what was read so far.
    """

    def __init__(self) -> None:
        self.nbytes_read = 0
        self._files = Handles(handle, lambda file: file.close())
        self._scratch = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # all that was asked for has been read
            self._files.close()

    def fill(self, view: memoryview, chunks: Iterable[Source]) -> None:
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
                case Literal(data):
                    part[:] = data
                case Strided() | Tiles():
                    if not self._scratch:
                        self._scratch = memoryview(bytearray(GATHER_NBYTES))
                    gather(part, chunk, self.read, self._scratch)

    def read(self, view: memoryview, path: Location, start: int) -> None:
        """Fill `view` with the bytes of the file at `path` from `start`."""
        try:
            file = self._files[path]
            got = file.readinto(view, start)
            while 0 < got < len(view) and (more := file.readinto(view[got:], start + got)):
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


def truncated(path: Location, need: int, have: int) -> CkptError:
    """A source file that is shorter than its own headers say."""
    return CkptError(
        "source-truncated",
        f"the file ends at byte {have}, but its tensors go to byte {need}",
        where=path,
        why=f"{need - have} bytes of tensor data are missing",
        hint="copy the file again from where it was written, or fall back to an earlier checkpoint",
    )


def blocks(
    chunks: Iterable[Source], dtype: DType, block_nbytes: int = BLOCK_NBYTES, reader: Reader | None = None
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


def computed(chunk: Cast | Mean, source: memoryview) -> Array:
    """The elements of a chunk that are not copied, from the bytes of all that it reads, one after another.

    Raises CkptError for a mean that some of its terms would make NaN or infinite.
    """
    if isinstance(chunk, Cast):
        return cast(numpy_array(source, chunk.source), chunk.source, chunk.target)
    blocks, at = [], 0
    for term in chunk.terms:
        nbytes = sum(part.nbytes for part in term.chunks)
        blocks.append(numpy_array(source[at : at + nbytes], term.dtype))
        at += nbytes
    for term, block in zip(chunk.terms, blocks, strict=True):
        if any(nonfinite(block, term.dtype)):
            _refuse_lost(term, block, blocks)
    return mean(blocks, [term.weight for term in chunk.terms], chunk.target)


def _refuse_lost(term: Term, block: Array, blocks: list[Array]) -> None:
    """Raises CkptError where a mean would be NaN or infinite and not all terms are the same, as in a mask."""
    values = block.astype(np.float64)
    lost = ~np.isfinite(values)
    others = (other.astype(np.float64)[lost] for other in blocks)
    if not all(np.array_equal(values[lost], other, equal_nan=True) for other in others):
        raise CkptError(
            "nonfinite",
            f"{np.count_nonzero(lost)} elements are NaN or infinite, and so would be the mean",
            where=next((part.path for part in term.chunks if isinstance(part, ByteRange)), ""),
            why="a model with such weights computes nothing else",
            hint="ckpt verify names the tensors; leave that checkpoint out",
        )


def load(ref: TensorRef) -> Array:
    """The whole tensor in memory; for scalars and tests."""
    out = np.empty(ref.numel, numpy_dtype(ref.dtype))
    at = 0
    with Reader() as reader:
        for chunk in ref.chunks:
            inner = reads(chunk)
            buffer = memoryview(bytearray(sum(part.nbytes for part in inner)))
            reader.fill(buffer, inner)
            if isinstance(chunk, Cast | Mean):
                block = computed(chunk, buffer)
            else:
                block = numpy_array(buffer, ref.dtype)
            out[at : at + len(block)] = block
            at += len(block)
    return out.reshape(ref.shape)
