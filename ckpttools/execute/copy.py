"""Moves the bytes: creates the staged files and fills them by a few threads, in flat memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from msgspec import Struct

from ckpttools.checksums import Share, crc32, joined
from ckpttools.execute import system, units
from ckpttools.execute.claims import Claim, SourceChecks
from ckpttools.execute.system import write_errors
from ckpttools.execute.units import StagedFile, Unit
from ckpttools.execute.writer import Writer
from ckpttools.passes.read import Reader, computed
from ckpttools.passes.threads import in_threads
from ckpttools.plan import Literal, OutputFile, Part, Plan, Sealed, reads
from ckpttools.progress import Progress
from ckpttools.tensors import ByteRange, Cast, Mean
from ckpttools.values import BLOCK_NBYTES


class Written(Struct, frozen=True, kw_only=True):
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

    `finishes`: who writes the whole of a file fills in its checksums and flushes it.
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

        With `shares` the units of the file come one after the other, so that its checksums are known;
        what the source's checksums get is joined to the shares. Raises ValueError where one is not.
        """
        file = unit.file
        claimed, known = _read_runs(view, unit, reader, scratch)
        at = 0
        for segment, claims in unit.pieces:
            part = view[at : at + segment.nbytes]
            at += segment.nbytes
            match segment:
                case ByteRange():
                    pass
                case Literal(data) | Sealed(data):
                    part[:] = data
                case Cast() | Mean():
                    chunks = reads(segment)
                    source = scratch[: sum(chunk.nbytes for chunk in chunks)]
                    reader.fill(source, chunks)
                    part[:] = computed(segment, source).view("u1").data
                    claimed += _sums(claims, source)
                case chunk:
                    reader.fill(part, (chunk,))
        sums = unit.sums(view, known)
        with self._lock:
            for claim, crc in claimed:
                self.checks.add(claim.source, crc)
            if shares is not None:
                for number, share in self.checks.take().items():
                    shares[number] = joined(shares.get(number, (0, 0)), share)
            for owners, start, end, crc in sums:
                file.crcs.add_to(owners, start, end, crc)
        holes = unit.holes()
        if self._alone or shares is not None:
            holes = [hole for hole in holes if not self._fill_in(hole, view, unit)]
            if holes and shares is not None:
                raise ValueError(f"{file.plan.path}: a checksum of bytes that come after it")
        whole = known[0] if len(unit.pieces) == 1 and 0 in known else crc32(view)
        with self._lock:
            unit.add_whole(whole, holes)
            file.holes += holes

    def _fill_in(self, hole: tuple[int, int], view: memoryview, unit: Unit) -> bool:
        """Put a checksum where it belongs, if all that it covers was added."""
        at, k = hole
        if unit.file.crcs.left[k]:
            return False
        at -= unit.start
        view[at : at + 4] = unit.file.crcs.values[k].to_bytes(4, "little")
        return True

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


def _read_runs(
    view: memoryview, unit: Unit, reader: Reader, scratch: memoryview
) -> tuple[list[tuple[Claim, int]], dict[int, int]]:
    """Put what is copied as it is into `view`: its claims with their CRC-32s, and those of whole pieces by
    where they begin in the unit.
    """
    claimed: list[tuple[Claim, int]] = []
    known: dict[int, int] = {}
    for source, copies, claims in unit.runs:
        at, nbytes = copies[0]
        block = view[at : at + nbytes] if len(copies) == 1 else scratch[: source.nbytes]
        reader.read(block, source.path, source.start)
        sums = _sums(claims, block)
        claimed += sums
        if len(copies) > 1:
            done = 0
            for at, nbytes in copies:
                view[at : at + nbytes] = block[done : done + nbytes]
                done += nbytes
        elif sums and claims[0].source.nbytes == nbytes:  # one pass serves both
            known[at] = sums[0][1]
    return claimed, known


def _sums(claims: Iterable[Claim], block: memoryview) -> list[tuple[Claim, int]]:
    return [(claim, crc32(block[claim.at : claim.at + claim.source.nbytes])) for claim in claims]


def join(plan: Plan, written: Iterable[Written], staging: Path, dst: Path) -> tuple[int, ...]:
    """The CRC-32 of each file, from its parts; files that several have written get their checksums now.

    Raises ValueError where the parts are not those of the plan, each once.
    """
    files = [StagedFile(file, staging) for file in plan.files]
    for part in written:
        for file, shares in zip(files, part.files, strict=True):
            file.crcs.join(shares)
    for file in files:
        if not any(file.crcs.left):
            continue
        file.holes = file.all_holes()
        if any(file.crcs.left[1:]) or file.crcs.left[0] != 4 * len(file.holes):
            raise ValueError("the parts do not make up the plan")
        with write_errors(dst / file.plan.path):
            fd = os.open(file.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                file.finish(fd)
            finally:
                os.close(fd)
    return tuple(file.crcs.values[0] for file in files)
