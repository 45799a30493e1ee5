"""Moves the bytes: creates the staged files and fills them by a few threads, in flat memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ckpttools.checksums import Share, crc32, joined
from ckpttools.execute import system, units
from ckpttools.execute.claims import SourceChecks
from ckpttools.execute.system import write_errors
from ckpttools.execute.units import StagedFile, Unit
from ckpttools.execute.writer import Writer
from ckpttools.passes.read import Reader, computed
from ckpttools.passes.threads import in_threads
from ckpttools.plan import Crc32, Literal, OutputFile, Part, Plan, reads
from ckpttools.progress import Progress
from ckpttools.tensors import ByteRange, Cast, Mean
from ckpttools.values import BLOCK_NBYTES

_FEW = 16  # pieces of a unit
_NOTHING = crc32(bytes(4))  # where a checksum belongs


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one part came to, as plain data: another process may commit it.

    `files` has for each file of the plan the shares of its CRC-32s (`StagedFile.crcs`), `checks` those of the
    source checksums by their number in the plan. `nbytes_read` counts source bytes.
    """

    part: Part
    files: tuple[tuple[Share, ...], ...]
    checks: Mapping[int, Share]
    nbytes_read: int


def create(plan: Plan, staging: Path, dst: Path, workers: int, *, again: bool = False) -> None:
    """Every file, empty, with its space: what cannot be written shows before hours of copying.

    With `again`, others may have made them, and keep what they have written.
    """
    exclusive = 0 if again else os.O_EXCL
    if not plan.is_single_file:
        with write_errors(dst):
            staging.mkdir(exist_ok=again)

    def make(files: Iterable[OutputFile]) -> None:
        for file in files:
            path = staging / file.path
            with write_errors(dst / file.path):
                path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | exclusive, 0o666)
                try:
                    if again and os.fstat(fd).st_size == file.nbytes:
                        continue  # its times tell whoever reads it back that nobody writes
                    if file.nbytes and not system.fallocate(fd, file.nbytes):
                        os.ftruncate(fd, file.nbytes)
                finally:
                    os.close(fd)

    in_threads(workers, make, plan.files)


class Copy:
    """Writes parts: the staged files, and the accounts of all threads, kept under one lock.

    `finishes`: who writes the whole of a file fills in its `Crc32` segments and flushes it.
    """

    def __init__(
        self, plan: Plan, staging: Path, dst: Path, progress: Progress | None, *, finishes: bool = True
    ) -> None:
        self.files = [StagedFile(file, staging) for file in plan.files]
        self.checks = SourceChecks(plan.checks)
        self._dst, self._progress, self._finishes = dst, progress, finishes
        self._alone = False  # nobody else writes bytes of these files
        self._nbytes_read = 0
        self._lock = threading.Lock()

    def run(self, part: Part, workers: int) -> Written:
        """Write and flush the part, and read what else the checksums need."""
        self._alone = self._finishes and part.world == 1
        self.copy(units.of_part(self.files, self.checks, part), workers)
        self.read(islice(self.checks.gaps(units.UNIT), part.rank, None, part.world), workers)
        for file in self.files:
            if 0 < file.left < file.plan.nbytes:  # others write the rest of it
                self.flush(file)
        return Written(
            part=part,
            files=tuple(tuple(file.crcs.shares) for file in self.files),
            checks=self.checks.shares(),
            nbytes_read=self._nbytes_read,
        )

    def copy(self, todo: Iterable[Unit], workers: int) -> None:
        """Write these units; what they come to is in `files` and `checks`."""
        in_threads(workers, self._copy, todo)

    def read(self, gaps: Iterable[ByteRange], workers: int) -> None:
        """Read these bytes for their checksums."""
        in_threads(workers, self._read, gaps)

    def flush(self, file: StagedFile) -> None:
        with write_errors(self._dst / file.plan.path):
            system.fsync_file(file.path)

    def take_nbytes_read(self) -> int:
        """The source bytes that were read since this was called last."""
        nbytes, self._nbytes_read = self._nbytes_read, 0
        return nbytes

    def _copy(self, todo: Iterable[Unit]) -> None:
        scratch = memoryview(bytearray(BLOCK_NBYTES))
        with Reader() as reader, write_errors(self._dst), Writer(units.LONGEST) as writer:
            for unit in todo:
                file, view = unit.file, writer.view(unit.start, unit.nbytes)
                self.fill(view, unit, reader, scratch)
                with write_errors(self._dst / file.plan.path):
                    fd = writer.write(file, view, unit.start)
                    with self._lock:
                        file.left -= unit.nbytes
                        last = self._finishes and not file.left
                    if last:
                        file.finish(fd)
                if self._progress is not None:
                    with self._lock:
                        self._progress.update(unit.nbytes)
            with self._lock:
                self._nbytes_read += reader.nbytes_read

    def fill(
        self,
        view: memoryview,
        unit: Unit,
        reader: Reader,
        scratch: memoryview,
        shares: dict[int, Share] | None = None,
    ) -> None:
        """Put the unit's bytes into `view`, and their CRC-32s to the accounts.

        With `shares` the units of the file come one after the other, so that its `Crc32` segments are known;
        what the source's checksums get is joined to the shares. Raises ValueError where one is not.
        """
        at, crcs = unit.start, unit.file.crcs
        many = len(unit.pieces) > _FEW  # then one CRC of all is made faster than it is joined from theirs
        holes: list[int] = []
        for segment, claims in unit.pieces:
            start, nbytes = at, segment.nbytes
            at += nbytes
            part = source = view[start - unit.start : at - unit.start]
            owners = crcs.owners(start)[1:] if many else crcs.owners(start)
            match segment:
                case Literal(data):
                    part[:] = data
                    if not owners:
                        continue
                case Crc32():  # if not known now, then when the file is complete: `StagedFile.finish`
                    known = unit.file.crc_at(start) if self._alone or shares is not None else None
                    part[:] = known or bytes(4)
                    if known is None:
                        holes.append(start)
                    if known is None or many:
                        continue
                case Cast() | Mean():
                    chunks = reads(segment)
                    source = scratch[: sum(chunk.nbytes for chunk in chunks)]
                    reader.fill(source, chunks)
                    part[:] = computed(segment, source).view("u1").data
                case chunk:
                    reader.fill(part, (chunk,))
            sums = [crc32(source[claim.at : claim.at + claim.source.nbytes]) for claim in claims]
            # The bytes of a plain copy are also those of its source: one pass serves both.
            is_same = source is part and claims and claims[0].source.nbytes == nbytes
            crc = sums[0] if is_same else crc32(part) if owners else 0
            with self._lock:
                for claim, source_crc in zip(claims, sums, strict=True):
                    self.checks.add(claim.source, source_crc)
                if shares is not None:
                    for number, share in self.checks.take().items():
                        shares[number] = joined(shares.get(number, (0, 0)), share)
                crcs.add_to(owners, start, at, crc)
        if holes and shares is not None:
            raise ValueError(f"{unit.file.plan.path}: a checksum of bytes that come after it")
        whole = crc32(view) if many else 0
        with self._lock:
            if many:
                crcs.add_to((0,), unit.start, at, whole)
                for hole in holes:
                    crcs.take_from((0,), hole, hole + 4, _NOTHING)
            unit.file.holes += holes

    def _read(self, gaps: Iterable[ByteRange]) -> None:
        buffer = memoryview(bytearray(units.UNIT))
        with Reader() as reader:
            for source in gaps:
                view = buffer[: source.nbytes]
                reader.read(view, source.path, source.start)
                crc = crc32(view)
                with self._lock:
                    self.checks.add(source, crc)
            with self._lock:
                self._nbytes_read += reader.nbytes_read


def join(plan: Plan, written: Iterable[Written], staging: Path, dst: Path) -> tuple[int, ...]:
    """The CRC-32 of each file, from its parts; files that several have written get their checksums now.

    Raises ValueError where the parts are not those of the plan, each once.
    """
    files = [StagedFile(file, staging) for file in plan.files]
    for part in written:
        for file, shares in zip(files, part.files, strict=True):
            file.crcs.join(shares)
    for file in files:
        if file.crcs.left[0] == 4 * len(file.crc_ranges) and not any(file.crcs.left[1:]):
            file.holes = [*file.crc_ranges]
            if file.holes:
                with write_errors(dst / file.plan.path):
                    fd = os.open(file.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    try:
                        file.finish(fd)
                    finally:
                        os.close(fd)
        elif any(file.crcs.left):
            raise ValueError("the parts do not make up the plan")
    return tuple(file.crcs.values[0] for file in files)
