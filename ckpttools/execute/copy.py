"""Moves the bytes: creates the staged files and fills them by a few threads, in flat memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from ckpttools.checksums import crc32
from ckpttools.execute import system, units
from ckpttools.execute.checks import SourceChecks
from ckpttools.execute.system import write_errors
from ckpttools.execute.units import StagedFile, Unit, interleaved
from ckpttools.passes.read import Handles, Reader
from ckpttools.passes.threads import in_threads
from ckpttools.plan import Crc32, Literal, Plan
from ckpttools.progress import Progress
from ckpttools.tensors import ByteRange, Cast
from ckpttools.values import BLOCK_NBYTES, cast, numpy_array


class Copy:
    """One run: the staged files, and the accounts of all threads, kept under one lock."""

    def __init__(
        self, plan: Plan, staging: Path, dst: Path, checks: SourceChecks, progress: Progress | None
    ) -> None:
        self.files = [StagedFile(file, staging / file.path) for file in plan.files]
        self.nbytes_read = 0
        self._plan, self._staging, self._dst = plan, staging, dst
        self._checks, self._progress = checks, progress
        self._lock = threading.Lock()

    def run(self, workers: int) -> None:
        """Write and flush every file, and read what else the checksums need."""
        workers = min(workers, 1 + self._plan.nbytes // units.UNIT)
        if not self._plan.is_single_file:
            with write_errors(self._dst):
                self._staging.mkdir()
        in_threads(workers, self._create, self.files)
        in_threads(workers, self._copy, interleaved(self.files, self._checks, workers))
        in_threads(workers, self._read, self._checks.gaps(units.UNIT))

    def _create(self, files: Iterable[StagedFile]) -> None:
        """Every file, empty, with its space: what cannot be written shows before hours of copying."""
        for file in files:
            with write_errors(self._dst / file.plan.path):
                file.path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                try:
                    if file.left and not system.fallocate(fd, file.left):
                        os.ftruncate(fd, file.left)
                finally:
                    os.close(fd)

    def _copy(self, todo: Iterable[Unit]) -> None:
        buffer = memoryview(bytearray(units.LONGEST))
        scratch = memoryview(bytearray(BLOCK_NBYTES))
        flags = os.O_WRONLY | os.O_NOFOLLOW
        with Reader() as reader, write_errors(self._dst), closing(Handles(flags)) as handles:
            for unit in todo:
                file, view = unit.file, buffer[: unit.nbytes]
                self._fill(view, unit, reader, scratch)
                with write_errors(self._dst / file.plan.path):
                    fd = handles[file.path]
                    system.write(fd, view, unit.start)
                    system.start_writeback(fd, unit.start, unit.nbytes)
                    with self._lock:
                        file.left -= unit.nbytes
                        last = not file.left
                    if last:
                        _finish(file, fd)
                if self._progress is not None:
                    with self._lock:
                        self._progress.update(unit.nbytes)
            with self._lock:
                self.nbytes_read += reader.nbytes_read

    def _fill(self, view: memoryview, unit: Unit, reader: Reader, scratch: memoryview) -> None:
        """Put the unit's bytes into `view`, and their CRC-32s to the accounts."""
        at = 0
        for segment, claims in unit.pieces:
            part = source = view[at : at + segment.nbytes]
            match segment:
                case Literal(data):
                    part[:] = data
                case Crc32():
                    part[:] = bytes(4)  # known when the file is complete: `_finish`
                case Cast(chunks, dtype, target):
                    source = scratch[: sum(chunk.nbytes for chunk in chunks)]
                    reader.fill(source, chunks)
                    part[:] = cast(numpy_array(source, dtype), dtype, target).view("u1").data
                case chunk:
                    reader.fill(part, (chunk,))
            sums = [crc32(source[claim.at : claim.at + claim.source.nbytes]) for claim in claims]
            # The bytes of a plain copy are also those of its source: one pass serves both.
            is_same = source is part and claims and claims[0].source.nbytes == len(part)
            crc = sums[0] if is_same else crc32(part)
            with self._lock:
                for claim, source_crc in zip(claims, sums, strict=True):
                    self._checks.add(claim.source, source_crc)
                if not isinstance(segment, Crc32):
                    unit.file.crcs.add(unit.start + at, unit.start + at + len(part), crc)
            at += len(part)

    def _read(self, gaps: Iterable[ByteRange]) -> None:
        buffer = memoryview(bytearray(units.UNIT))
        with Reader() as reader:
            for source in gaps:
                view = buffer[: source.nbytes]
                reader.read(view, source.path, source.start)
                crc = crc32(view)
                with self._lock:
                    self._checks.add(source, crc)
            with self._lock:
                self.nbytes_read += reader.nbytes_read


def _finish(file: StagedFile, fd: int) -> None:
    """All other bytes are written: fill in the checksums and flush."""
    for at, crc in zip(file.crc_starts, file.crcs.values[1:], strict=True):
        data = crc.to_bytes(4, "little")
        system.write(fd, memoryview(data), at)
        file.crcs.add(at, at + 4, crc32(data))
    system.fsync(fd)
