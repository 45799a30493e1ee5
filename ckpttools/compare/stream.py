"""The bytes of tensors in the order of their elements, and the source's checksums of all that is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ckpttools.checksums import crc32
from ckpttools.execute.claims import SourceChecks, compare
from ckpttools.passes import threads
from ckpttools.passes.ranges import Cutter
from ckpttools.passes.read import Reader
from ckpttools.plan import SourceCheck, reads
from ckpttools.progress import Progress
from ckpttools.stores.links import refuse_outside
from ckpttools.tensors import ByteRange, Cast, Chunk, DType, Mean, Source, Strided, TensorRef, Tiles, spans
from ckpttools.values import BLOCK_NBYTES, Array, cast, numpy_array

_GATHER = 4 * BLOCK_NBYTES  # views are read in larger parts: the runs in the file get longer with the part
T = TypeVar("T")


class Stream:
    """Reads one checkpoint's tensors; each thread brings its own `Reader`."""

    def __init__(self, checks: Iterable[SourceCheck]) -> None:
        self._stated = tuple(checks)
        self._checks = SourceChecks(self._stated)
        self._lock = threading.Lock()

    def blocks(self, ref: TensorRef, reader: Reader) -> Iterator[Array]:
        """The elements in 1-D arrays of at most some MiB, each valid until the next one is asked for."""
        whole = any(isinstance(chunk, (Strided, Tiles)) for chunk in ref.chunks)
        size = min(_GATHER if whole else BLOCK_NBYTES, ref.nbytes)
        buffer = memoryview(bytearray(max(size, ref.dtype.itemsize)))
        for dtype, chunks in _runs(ref):
            cutter = Cutter(chunks)
            step = max(len(buffer) // dtype.itemsize, 1) * dtype.itemsize
            if step > len(buffer):
                buffer = memoryview(bytearray(step))
            while parts := cutter.take(step):
                view = buffer[: sum(part.nbytes for part in parts)]
                reader.fill(view, parts)
                self._account(parts, view)
                yield cast(numpy_array(view, dtype), dtype, ref.dtype)

    def _account(self, parts: tuple[Source, ...], view: memoryview) -> None:
        with self._lock:
            claims = self._checks.claims(parts)
        sums = [(claim.source, crc32(view[claim.at : claim.at + claim.source.nbytes])) for claim in claims]
        with self._lock:
            for source, crc in sums:
                self._checks.add(source, crc)

    def finish(self, workers: int) -> int:
        """Read what else belongs to the checksums of what was read, and compare them: how many are right.

        Raises CkptError "checksum" where one is not.
        """

        def read(gaps: Iterable[ByteRange]) -> None:
            buffer = memoryview(bytearray(BLOCK_NBYTES))
            with Reader() as reader:
                for gap in gaps:
                    view = buffer[: gap.nbytes]
                    reader.read(view, gap.path, gap.start)
                    crc = crc32(view)
                    with self._lock:
                        self._checks.add(gap, crc)

        threads.in_threads(threads.count(workers), read, self._checks.gaps(BLOCK_NBYTES))
        return compare(self._stated, [self._checks.shares()])


def _runs(ref: TensorRef) -> Iterator[tuple[DType, tuple[Source, ...]]]:
    """The chunks as they lie, and the type that their bytes have there."""
    plain: list[Source] = []
    for chunk in ref.chunks:
        if isinstance(chunk, Mean):
            raise ValueError("a mean is compared once it is written")
        if isinstance(chunk, Cast):
            if plain:
                yield ref.dtype, tuple(plain)
                plain = []
            yield chunk.source, chunk.chunks
        else:
            plain.append(chunk)
    if plain:
        yield ref.dtype, tuple(plain)


def refuse_links(refs: Iterable[TensorRef]) -> None:
    """Raise CkptError where bytes lie behind a link out of the checkpoint; to be called inside `within`."""
    paths = {span.path for ref in refs for chunk in ref.chunks for span in _spans(chunk)}
    for path in sorted(paths, key=str):
        refuse_outside(path)


def place(ref: TensorRef) -> tuple[str, int]:
    """Where a tensor begins: reading in this order goes through the files from front to back."""
    for chunk in ref.chunks:
        for span in _spans(chunk):
            return str(span.path), span.start
    return "", 0


def _spans(chunk: Chunk) -> Iterator[ByteRange]:
    for source in reads(chunk):
        yield from spans(source)


def in_threads(
    workers: int, work: Callable[[T, Reader], int], items: Iterable[T], progress: Progress | None
) -> None:
    """Call `work` for each item, which returns the bytes that it went through."""
    lock = threading.Lock()

    def run(taken: Iterable[T]) -> None:
        with Reader() as reader:
            for item in taken:
                nbytes = work(item, reader)
                if progress is not None:
                    with lock:
                        progress.update(nbytes)

    threads.in_threads(threads.count(workers), run, items)
