"""The files of a plan as objects of a store: each is made in the order of its bytes, and appears whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ckpttools.checksums import Share, joined
from ckpttools.execute import sending, units
from ckpttools.execute.copy import Copy
from ckpttools.execute.sending import Upload, Version, store_errors
from ckpttools.execute.units import StagedFile, Unit
from ckpttools.location import Location, Stored
from ckpttools.passes.read import Reader
from ckpttools.plan import Plan
from ckpttools.progress import Progress
from ckpttools.values import BLOCK_NBYTES

_FILES_AT_ONCE = 4

File = tuple[StagedFile, list[Unit]]
Record = dict[str, Any]  # of an object that is there: its version, its crc32, and its shares of the checks
Put = Callable[[Stored, bytes], Version]


class Objects:
    """A part is made in memory from the units of the plan, with a CRC-32 of every byte."""

    def __init__(self, plan: Plan, dst: Stored, progress: Progress | None) -> None:
        self.plan, self.dst, self.progress = plan, dst, progress
        self.lock = threading.Lock()
        self.nbytes_read = 0
        self._copy = Copy(plan, Path("-"), Path("-"), progress)
        self._stop = threading.Event()

    def place(self, name: str) -> Stored:
        return self.dst / name if name else self.dst

    def files(self) -> Iterator[File]:
        """All, in order, since what a unit claims depends on those before it."""
        for file in self._copy.files:
            yield file, [unit for _, unit in units.in_order([file], self._copy.checks, units.UNIT)]

    def each(self, todo: Iterable[File], workers: int, send: Callable[[File], None]) -> None:
        """Call `send` for each, in threads; raise what one of them raised."""
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(min(workers, _FILES_AT_ONCE)) as pool:
            try:
                for file in todo:
                    running = _room(running, _FILES_AT_ONCE)
                    running.add(pool.submit(send, file))
                _room(running, 0)
            except BaseException:
                self._stop.set()
                raise

    def send(self, file: File, put: Put, make_room: Callable[[Stored], None] = lambda place: None) -> Record:
        """One object, from its parts; `put` sends a small one, `make_room` is called before it appears."""
        staged, todo = file
        place = self.place(staged.plan.path)
        shares: dict[int, Share] = {}
        with store_errors(place):
            if staged.plan.nbytes <= sending.PART:
                data = b"".join(self._parts(staged, todo, shares))
                make_room(place)
                version = put(place, data)
            else:
                with Upload(place, staged.plan.nbytes) as sent:
                    for part in self._parts(staged, todo, shares):
                        sent.write(part)
                    make_room(place)
                    version = sent.finish()
        return {"version": version, "crc32": staged.crcs.values[0], "checks": shares}

    def _parts(self, file: StagedFile, todo: Sequence[Unit], shares: dict[int, Share]) -> Iterator[bytes]:
        nbytes = sending.part_of(file.plan.nbytes)
        room, scratch = memoryview(bytearray(units.LONGEST)), memoryview(bytearray(BLOCK_NBYTES))
        part = bytearray()
        with Reader() as reader:
            for unit in todo:
                if self._stop.is_set():
                    raise InterruptedError
                view = room[: unit.nbytes]
                self._copy.fill(view, unit, reader, scratch, shares)
                part += view
                while len(part) >= nbytes:
                    yield bytes(part[:nbytes])
                    del part[:nbytes]
                if self.progress is not None:
                    with self.lock:
                        self.progress.update(unit.nbytes)
            if part:
                yield bytes(part)
            with self.lock:
                self.nbytes_read += reader.nbytes_read

    def gaps(self) -> dict[int, Share]:
        """What only the source's checksums need, when all units were made."""
        self._copy.read(self._copy.checks.gaps(units.UNIT), 1)
        self.nbytes_read += self._copy.take_nbytes_read()
        return self._copy.checks.take()

    def crcs(self, records: Mapping[str, Record], seen: Stored) -> dict[Location, int]:
        """Of each file, where it will be."""
        return {
            (seen / file.path if file.path else seen): int(records[file.path]["crc32"])
            for file in self.plan.files
        }


def checks_of(records: Iterable[Record], gaps: Mapping[int, Share]) -> dict[int, Share]:
    """What all files, of this process and of others, add to the source's checksums."""
    out = dict(gaps)
    for record in records:
        for number, (crc, nbytes) in record["checks"].items():
            out[int(number)] = joined(out.get(int(number), (0, 0)), (crc, nbytes))
    return out


def _room(running: set[Future[None]], most: int) -> set[Future[None]]:
    """Wait until fewer than `most` run, or none; raise what went wrong in those that ended."""
    while running and len(running) >= max(most, 1):
        done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for each in done:
            each.result()
    return running
