"""One plan carried out by many processes, on many machines, that share nothing but the file system.

    DST.ckpt-spread/ledger/    what is finished (`ledger`); `done` while it gets its name
    DST.ckpt-spread/out-...    the staged file or folder, as the ledger calls it
    DST.ckpt-spread/alone      locked by the only process that writes there, if it is one (`ckpt copy`)

Every worker plans for itself: headers only, and the same plan everywhere, or it is refused. The work is
pieces of up to 512 MiB of output, which do not depend on how many workers there are; piece k belongs to
worker k modulo their number. A piece is in the ledger when its bytes are on disk, with its shares of all
checksums. Worker 0 (in an array, the one that finishes last) joins the shares and commits, as `commit` does
for one process, so whatever ends a job at any moment, the same command goes on from there: with any number of
workers, and without copying a finished piece again. Two jobs of the same plan write the same bytes to the
same places.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from ckpttools import __version__
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.execute import Finish, Replaces, Report, Staged, commit, copy, judge, place, preflight, units
from ckpttools.execute.copy import Copy, Written
from ckpttools.execute.ledger import Ledger, describe, digest
from ckpttools.execute.preflight import Fingerprint
from ckpttools.execute.removing import delete
from ckpttools.execute.signals import terminating_signals
from ckpttools.execute.staging import clear_stale
from ckpttools.execute.system import write_errors
from ckpttools.launch import Worker
from ckpttools.location import Location
from ckpttools.passes import threads
from ckpttools.plan import Plan
from ckpttools.progress import Progress
from ckpttools.siblings import SPREAD
from ckpttools.tensors import ByteRange

LONGEST_PIECE = 512 * 1024 * 1024
_SHORTEST_PIECE = 4096
_PIECES = 64  # of a small output
_GAPS = 512  # reads of up to 1 MiB that make a piece
_POLL = 0.2  # seconds
_REMIND = 150  # polls
_ALONE = "alone"
_DONE = "done-"  # of the ledger that a committing worker took

Is = Callable[[Path, str], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What this worker does for whom. `is_result` tells whether a destination is the result of the plan with
    this digest: another worker may have committed already. `alone`: it is the only process of the job, so
    that what an ended one left of another plan may go.
    """

    worker: Worker
    is_result: Is
    alone: bool = False
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What came of it. `report` is that of the worker that committed; None for the others."""

    digest: str
    report: Report | None
    pieces: int  # that this worker wrote
    waiting: tuple[str, ...] = ()  # pieces that others still have to write, where this worker does not wait


def spread(
    plan: Plan,
    dst: Path,
    job: Job,
    *,
    source: Location | None = None,
    force: bool = False,
    replaces: Replaces | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    finish: Callable[[str], Finish] | None = None,
) -> Spread:
    """This worker's share of `execute(plan, dst)`: returns when `dst` is there, whole and on disk.

    `finish` is given the digest of the plan, and makes what `commit` takes. Options and errors as for
    `execute`; also UsageError "other-plan", and "worker-failed" where another one has failed.
    """
    dst, ends = place(plan, dst, source)
    before = preflight.fingerprints(ends)
    described = describe(plan, before, __version__)
    share = _Share(plan, dst, job, digest(described), before, workers, progress)
    if share.is_committed():
        if job.worker.rank == 0:
            share.clear()
        return share.result(None)
    if job.worker.rank == 0 and os.path.lexists(dst) and any(share.folder.glob(f"{_DONE}*")):
        share.clear()  # of a job that was killed after it had committed
    with write_errors(dst):
        notes = clear_stale(dst) if job.worker.rank == 0 else []
        judge(dst, force, replaces)
        if not share.ledger.folder.exists():
            preflight.need_space(plan, dst)
        if job.alone:
            notes += share.take(described)
        share.join(described)
    try:
        with terminating_signals():
            share.forget_failure()
            share.write()
            if not share.is_to_commit():
                return share.result(None)
            report = share.commit(force, replaces, finish, tuple(notes))
    except CkptError as error:
        if job.alone and not isinstance(error, UsageError):
            share.clear()  # of a source that is damaged
        else:
            share.tell(error)
        if share.lock is not None:
            share.lock.close()  # whoever keeps the error keeps all of this
        raise
    except _Elsewhere:
        share.wait_for_commit()
        return share.result(None)
    share.clear()
    return share.result(report)


class _Elsewhere(Exception):
    """Another worker commits."""


class _Share:
    """One worker's work on one plan."""

    def __init__(
        self,
        plan: Plan,
        dst: Path,
        job: Job,
        digest: str,
        before: Mapping[Location, Fingerprint],
        workers: int,
        progress: Progress | None,
    ) -> None:
        self.plan, self.dst, self.job, self.digest, self.before = plan, dst, job, digest, before
        self.rank, self.world = job.worker.rank, job.worker.world
        self.folder = dst.with_name(dst.name + SPREAD)
        self.ledger, self.done = Ledger(self.folder / "ledger"), self.folder / _DONE
        self.out = self.folder
        self.commits = self.created = False
        self.lock: BinaryIO | None = None  # held while it is open
        self.workers, self.progress = threads.count(workers), progress
        self.needed: list[str] = []  # the pieces of all workers, in order: piece k is of worker k % world
        self.pieces = 0
        self.missing: tuple[str, ...] = ()
        self.failed = {name for name in self.ledger.names() if name.startswith("failed-")}

    def result(self, report: Report | None) -> Spread:
        return Spread(digest=self.digest, report=report, pieces=self.pieces, waiting=self.missing)

    def is_committed(self) -> bool:
        return os.path.lexists(self.dst) and self.job.is_result(self.dst, self.digest)

    def clear(self) -> None:
        """Remove the staging, and the destination that was replaced, if any."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def join(self, described: Mapping[str, Any]) -> None:
        name = self.ledger.join(described, self.dst)
        self.out, self.done = self.folder / name, self.folder / f"{_DONE}{name}"

    def take(self, described: Mapping[str, Any]) -> list[str]:
        """Be the only process that writes there; what an ended one left of another plan goes, and is said.
        Workers of a spread job, who hold no lock, are left alone. Raises UsageError where one is at it.
        """
        self.folder.mkdir(exist_ok=True)
        there = {path.name for path in self.folder.iterdir()}
        if there and _ALONE not in there:
            return []
        self.lock = (self.folder / _ALONE).open("ab")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                "destination-exists",
                "another process is copying to it",
                where=self.dst,
                why="two that write the same place would be in each other's way",
                hint="wait until it has ended, or choose another destination",
            ) from None
        except OSError:
            return []  # a file system without locks: nobody can say whether one is at it
        if not (there and self.ledger.folder.exists() and self.ledger.is_of_another(described)):
            return []
        for path in self.folder.iterdir():
            if path.name != _ALONE:
                delete(path)
        return [f"removed what an ended copy of something else left in {self.folder}"]

    def tell(self, error: CkptError) -> None:
        """Let the others know; they would wait."""
        with suppress(OSError):
            record = {"job": self.job.worker.job, "id": error.id, "message": error.message}
            self.ledger.put(f"failed-{self.rank}", record)

    def forget_failure(self) -> None:
        """A failure of this worker is no longer one."""
        with write_errors(self.dst):
            self.ledger.forget(f"failed-{self.rank}")
        self.failed.discard(f"failed-{self.rank}")

    def _make_room(self) -> None:
        """All files, before the first piece of this worker: who has none to write leaves them alone, since
        another worker may be reading them back, or has given them their name.
        """
        if not self.created:
            copy.create(self.plan, self.out, self.dst, self.workers, again=True)
            self.created = True

    def write(self) -> None:
        """Write this worker's pieces, but for those that are in the ledger."""
        nbytes = max(min(-(-self.plan.nbytes // _PIECES), LONGEST_PIECE), _SHORTEST_PIECE)
        work = Copy(self.plan, self.out, self.dst, self.progress, finishes=False)
        done = self.ledger.names()
        # Of the pieces of others the units are made, too: what a unit claims depends on those before it.
        for number, group in groupby(units.in_order(work.files, work.checks, nbytes), lambda pair: pair[0]):
            todo = [unit for _, unit in group]
            if self._is_mine(f"piece-{number}", done):
                self._make_room()
                work.copy(todo, self._width(len(todo)))
                files = {id(unit.file): unit.file for unit in todo}.values()
                for file in files:
                    work.flush(file)
                self._record(work, {work.files.index(file): file.crcs.take() for file in files})
        for number, gaps in _batches(work.checks.gaps(units.UNIT)):
            if self._is_mine(f"gaps-{number}", done):
                work.read(gaps, self._width(len(gaps)))
                self._record(work, {})

    def _width(self, todo: int) -> int:
        return max(min(self.workers, todo), 1)

    def _is_mine(self, name: str, done: set[str]) -> bool:
        """Whether this worker has to write the piece."""
        mine = len(self.needed) % self.world == self.rank
        self.needed.append(name)
        return mine and name not in done

    def _record(self, work: Copy, files: Mapping[int, Mapping[int, tuple[int, int]]]) -> None:
        """The last piece of `needed` is on disk."""
        preflight.unchanged(self.before)
        record = {"files": files, "checks": work.checks.take(), "nbytes_read": work.take_nbytes_read()}
        with write_errors(self.dst):
            self.ledger.put(self.needed[-1], record)
        self.pieces += 1

    def wait_for_commit(self) -> None:
        """The ledger is gone: another worker gives the destination its name."""
        while self.done.exists() and not self.ledger.folder.exists():
            time.sleep(_POLL)
        if not self.is_committed():
            raise UsageError(
                "write-failed",
                f"{escape(self.folder.name)} was removed, or not finished by the worker that commits",
                where=self.folder,
                why="the destination is as it was",
                hint="look at what the other workers said, then run the same command again",
            )

    def is_to_commit(self) -> bool:
        """Wait for the others; whether this worker is to commit, when every piece is finished."""
        quiet, before = 0, -1
        while True:
            done = self.ledger.names()
            self.missing = tuple(name for name in self.needed if name not in done)
            if not self.missing and (self.rank == 0 or not self.job.worker.waits):
                return True
            if not done:
                self.missing = ()
                self.wait_for_commit()
                return False
            if not self.job.worker.waits:
                return False
            self._refuse_failed(done)
            quiet = quiet + 1 if len(done) == before else 0
            before = len(done)
            if quiet % _REMIND == _REMIND - 1:
                self.job.say(self._reminder())
            time.sleep(_POLL)

    def _refuse_failed(self, done: set[str]) -> None:
        """What was there when this worker came may be of another job, unless the launcher names it."""
        for name in sorted(done):
            if name.startswith("failed-"):
                said = self.ledger.get(name)
                if name in self.failed and not (said["job"] and said["job"] == self.job.worker.job):
                    continue
                raise UsageError(
                    "worker-failed",
                    f"worker {name.removeprefix('failed-')} failed: {escape(str(said.get('message')), 500)}",
                    where=self.dst,
                    why="its part of the destination is missing; what is finished is kept",
                    hint="mend the cause, then run the same command again: it goes on from there",
                )

    def _reminder(self) -> str:
        """Who is waited for, and for how many pieces."""
        owed: dict[int, int] = {}
        for number, name in enumerate(self.needed):
            if name in self.missing:
                owed[number % self.world] = owed.get(number % self.world, 0) + 1
        if not owed:
            return f"worker {self.rank} waits for worker 0 to finish {escape(self.dst.name)}"
        died = {rank for rank in owed if f"failed-{rank}" in self.ledger.names()}
        who = ", ".join(
            f"worker {rank} ({n} pieces{'; it failed' if rank in died else ''})"
            for rank, n in sorted(owed.items())[:8]
        )
        more = f" and {len(owed) - 8} more" if len(owed) > 8 else ""
        return f"worker {self.rank} waits for {who}{more}"

    def commit(
        self,
        force: bool,
        replaces: Replaces | None,
        finish: Callable[[str], Finish] | None,
        notes: tuple[str, ...],
    ) -> Report:
        """Check the whole and give it its name. Raises `_Elsewhere` where another worker does."""

        def last(path: Location, crcs: Mapping[Location, int]) -> Mapping[str, bytes]:
            try:
                more = finish(self.digest)(path, crcs) if finish else {}
            except UsageError as error:
                if error.id == "write-failed":
                    self.clear()  # what is on record is not on disk
                raise
            try:
                self.ledger.folder.rename(self.done)  # one worker can: from here on all is its own
            except FileNotFoundError:
                raise _Elsewhere from None
            self.commits = True
            for name in more:
                (self.out / name).unlink(missing_ok=True)  # of a commit that failed
            return more

        staged = Staged(
            plan=self.plan, dst=self.dst, path=self.out, force=force, before=self.before, notes=notes
        )
        try:
            return commit(staged, [self.written()], replaces=replaces, finish=last)
        except CkptError:
            if self.commits:
                with suppress(OSError):
                    self.done.rename(self.ledger.folder)
            raise

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


def _batches(gaps: Iterator[ByteRange]) -> Iterator[tuple[int, list[ByteRange]]]:
    for number, group in groupby(enumerate(gaps), lambda pair: pair[0] // _GAPS):
        yield number, [gap for _, gap in group]
