"""One worker's pieces of a plan: up to 512 MiB of output each, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from pathlib import Path

from ckpttools.checksums import crc32
from ckpttools.execute import copy, preflight, units
from ckpttools.execute.copy import Copy, Written
from ckpttools.execute.ledger import Ledger
from ckpttools.execute.preflight import Fingerprint
from ckpttools.execute.system import write_errors
from ckpttools.execute.units import Unit
from ckpttools.launch import Worker
from ckpttools.location import Location
from ckpttools.passes import threads
from ckpttools.passes.read import Reader
from ckpttools.plan import Plan
from ckpttools.progress import Progress
from ckpttools.tensors import ByteRange

LONGEST_PIECE = 512 * 1024 * 1024
_SHORTEST_PIECE = 4096
_PIECES = 64  # of a small output
_GAPS = 512  # reads of up to 1 MiB that make a piece


class Pieces:
    """The pieces of all workers are `needed`, in order: piece k is of worker k modulo their number. What
    this one has written, `count`, is on disk at `out`, and in the ledger.
    """

    def __init__(self, plan: Plan, dst: Path, out: Path, ledger: Ledger, worker: Worker) -> None:
        self.plan, self.dst, self.out, self.ledger, self.worker = plan, dst, out, ledger, worker
        self.needed: list[str] = []
        self.count = 0
        self._created = False

    def write(self, before: Mapping[Location, Fingerprint], workers: int, progress: Progress | None) -> None:
        """Write this worker's pieces, but for those that are in the ledger. `before`: of the sources."""
        work = Copy(self.plan, self.out, self.dst, progress, finishes=False)
        width = threads.count(workers)
        done = self.ledger.names()
        # Of the pieces of others the units are made, too: what a unit claims depends on those before it.
        for number, todo in self._in_order(work):
            if self._is_mine(f"piece-{number}", done):
                self._make_room(width)
                work.copy(todo, max(min(width, len(todo)), 1))
                files = {id(unit.file): unit.file for unit in todo}.values()
                for file in files:
                    work.flush(file)
                preflight.unchanged(before)
                self._record(work, {work.files.index(file): file.crcs.take() for file in files})
        for number, gaps in _batches(work.checks.gaps(units.UNIT)):
            if self._is_mine(f"gaps-{number}", done):
                work.read(gaps, max(min(width, len(gaps)), 1))
                preflight.unchanged(before)
                self._record(work, {})

    def _in_order(self, work: Copy) -> Iterator[tuple[int, list[Unit]]]:
        nbytes = max(min(-(-self.plan.nbytes // _PIECES), LONGEST_PIECE), _SHORTEST_PIECE)
        for number, group in groupby(units.in_order(work.files, work.checks, nbytes), lambda pair: pair[0]):
            yield number, [unit for _, unit in group]

    def _make_room(self, width: int) -> None:
        """All files, before the first piece of this worker: who has none to write leaves them alone, since
        another worker may be reading them back, or has given them their name.
        """
        if not self._created:
            copy.create(self.plan, self.out, self.dst, width, again=True)
            self._created = True

    def _is_mine(self, name: str, done: set[str]) -> bool:
        """Whether this worker has to write the piece."""
        mine = len(self.needed) % self.worker.world == self.worker.rank
        self.needed.append(name)
        return mine and name not in done

    def _record(self, work: Copy, files: Mapping[int, Mapping[int, tuple[int, int]]]) -> None:
        """The last piece of `needed` is on disk."""
        record = {"files": files, "checks": work.checks.take(), "nbytes_read": work.take_nbytes_read()}
        with write_errors(self.dst):
            self.ledger.put(self.needed[-1], record)
        self.count += 1

    def written(self) -> Written:
        """All that is in the ledger, as if one process had written it."""
        files = [file.crcs for file in Copy(self.plan, self.out, self.dst, None).files]
        checks: dict[int, tuple[int, int]] = {}
        nbytes_read = 0
        for name in self.needed:
            record = self.ledger.get(name)
            nbytes_read += record["nbytes_read"]
            for number, shares in record["files"].items():
                crcs = files[int(number)]
                for k, (crc, nbytes) in shares.items():
                    crcs.values[int(k)] ^= crc
                    crcs.left[int(k)] -= nbytes
            for number, (crc, nbytes) in record["checks"].items():
                before = checks.get(int(number), (0, 0))
                checks[int(number)] = before[0] ^ crc, before[1] + nbytes
        return Written(
            part=self.plan.part(0, 1),
            files=tuple(tuple(crcs.shares) for crcs in files),
            checks=checks,
            nbytes_read=nbytes_read,
        )

    def forget(self, places: Collection[Location]) -> None:
        """These files are not what was written: forget the pieces that are wrong, or, where none shows to be,
        all that lie in them.
        """
        work = Copy(self.plan, self.out, self.dst, None, finishes=False)
        suspect = {k for k, file in enumerate(work.files) if file.path in places}
        inside, wrong = [], []
        with Reader() as reader:
            for number, todo in self._in_order(work):
                files = {k for unit in todo if (k := work.files.index(unit.file)) in suspect}
                if not files:
                    continue
                for unit in (unit for unit in todo if work.files.index(unit.file) in suspect):
                    _add_what_is_there(unit, reader)
                there = {k: {r: list(share) for r, share in work.files[k].crcs.take().items()} for k in files}
                said = self.ledger.get(f"piece-{number}")["files"]
                inside.append(number)
                if any(there[k] != {int(r): share for r, share in said[str(k)].items()} for k in files):
                    wrong.append(number)
        for number in wrong or inside:
            self.ledger.forget(f"piece-{number}")


def _add_what_is_there(unit: Unit, reader: Reader) -> None:
    """To the CRC-32s of its file, but for checksums, which come when all else is there."""
    view = memoryview(bytearray(unit.nbytes))
    reader.read(view, unit.file.path, unit.start)
    holes = unit.holes()
    for at, _ in holes:
        view[at - unit.start : at - unit.start + 4] = bytes(4)
    for owners, start, end, crc in unit.sums(view, {}):
        unit.file.crcs.add_to(owners, start, end, crc)
    unit.add_whole(crc32(view), holes)


def _batches(gaps: Iterator[ByteRange]) -> Iterator[tuple[int, list[ByteRange]]]:
    for number, group in groupby(enumerate(gaps), lambda pair: pair[0] // _GAPS):
        yield number, [gap for _, gap in group]
