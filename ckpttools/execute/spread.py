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
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct

from ckpttools import __version__
from ckpttools.errors import CkptError, NotAsWritten, UsageError, escape
from ckpttools.execute import Replaces, Report, Staged, commit, judge, place, preflight
from ckpttools.execute.ledger import Ledger, describe, digest
from ckpttools.execute.others import Elsewhere, Finishes, Job, Others
from ckpttools.execute.pieces import Pieces
from ckpttools.execute.preflight import Fingerprint
from ckpttools.execute.removing import delete
from ckpttools.execute.signals import terminating_signals
from ckpttools.execute.staging import clear_stale
from ckpttools.execute.system import WriteFailed, write_errors
from ckpttools.location import Location
from ckpttools.plan import Plan
from ckpttools.progress import Progress
from ckpttools.siblings import SPREAD

_POLL = 0.2  # seconds
_ALONE = "alone"
_DONE = "done-"  # of the ledger that a committing worker took


class Spread(Struct, frozen=True, kw_only=True):
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
    finish: Finishes | None = None,
) -> Spread:
    """This worker's share of `execute(plan, dst)`: returns when `dst` is there, whole and on disk.

    `finish` makes what `commit` takes; where `job.reads` all workers call it. Options and errors as for
    `execute`; also UsageError "other-plan", and "worker-failed" where another one has failed.
    """
    dst, ends = place(plan, dst, source)
    before = preflight.fingerprints(ends)
    described = describe(plan, before, __version__)
    share = _Share(plan, dst, job, digest(described), before)
    if share.is_committed():
        if job.worker.rank == 0 and not share.is_replaced(described):
            share.clear()
        return share.result(None)
    if job.worker.rank == 0 and os.path.lexists(dst) and any(share.folder.glob(f"{_DONE}*")):
        share.clear()  # of a job that was killed after it had committed
    with write_errors(dst):
        notes = clear_stale(dst) if job.worker.rank == 0 else []
        judge(dst, force, replaces)
        if share.ledger.is_of(described) is None:
            preflight.need_space(plan, dst)
        if job.alone:
            notes += share.take(described)
        share.join(described)
    try:
        with terminating_signals():
            with write_errors(dst):
                share.others.forget_failure()
            share.pieces.write(before, workers, progress)
            if not share.others.leave_to_me(share.pieces.needed, partial(share.read, finish)):
                return share.result(None)
            report = share.commit(force, replaces, finish, tuple(notes))
    except CkptError as error:
        if isinstance(error, WriteFailed):
            error.why = f"the destination is as it was; {share.folder} is kept, and gone on with"
        if job.alone and not isinstance(error, UsageError):
            share.clear()  # of a source that is damaged
        else:
            share.others.tell(error)
        if share.lock is not None:
            share.lock.close()  # whoever keeps the error keeps all of this
        raise
    except Elsewhere:
        share.wait_for_commit()
        return share.result(None)
    share.clear()
    return share.result(report)


class _Share:
    """One worker's work on one plan."""

    def __init__(
        self, plan: Plan, dst: Path, job: Job, digest: str, before: Mapping[Location, Fingerprint]
    ) -> None:
        self.plan, self.dst, self.job, self.digest, self.before = plan, dst, job, digest, before
        self.folder = dst.with_name(dst.name + SPREAD)
        self.records, self.done = self.folder / "ledger", self.folder / _DONE
        self.ledger = Ledger(self.records)
        self.others = Others(self.ledger, dst, job)
        self.pieces = Pieces(plan, dst, self.folder, self.ledger, job.worker)
        self.commits = False
        self.lock: BinaryIO | None = None  # held while it is open

    def result(self, report: Report | None) -> Spread:
        return Spread(
            digest=self.digest, report=report, pieces=self.pieces.count, waiting=self.others.missing
        )

    def is_committed(self) -> bool:
        return self.job.is_result(self.dst, self.digest) and preflight.is_there(self.plan, self.dst)

    def is_replaced(self, described: Mapping[str, Any]) -> bool:
        """Whether workers of another plan are at it."""
        ledgers = (self.records, *self.folder.glob(f"{_DONE}*"))
        return any(Ledger(place).is_of(described) is False for place in ledgers)

    def clear(self) -> None:
        """Remove the staging, and the destination that was replaced, if any."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def join(self, described: Mapping[str, Any]) -> None:
        name = self.ledger.join(described, self.dst)
        self.done = self.folder / f"{_DONE}{name}"
        self.pieces.out = self.folder / name

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
        if not (there and self.records.exists() and not self.ledger.is_of(described)):
            return []
        for path in self.folder.iterdir():
            if path.name != _ALONE:
                delete(path)
        return [f"removed what an ended copy of something else left in {self.folder}"]

    def wait_for_commit(self) -> None:
        """The ledger is gone: another worker gives the destination its name."""
        while self.done.exists() and not self.records.exists():
            time.sleep(_POLL)
        if not self.is_committed():
            raise UsageError(
                "write-failed",
                f"{escape(self.folder.name)} was removed, or not finished by the worker that commits",
                where=self.folder,
                why="the destination is as it was",
                hint="look at what the other workers said, then run the same command again",
            )

    def read(self, finish: Finishes | None, crcs: Sequence[int]) -> None:
        """This worker's part of reading back what all have written."""
        if finish:
            files = [self.pieces.out / file.path for file in self.plan.files]
            finish(self.digest, self.others.look)(self.pieces.out, dict(zip(files, crcs, strict=True)))

    def commit(
        self,
        force: bool,
        replaces: Replaces | None,
        finish: Finishes | None,
        notes: tuple[str, ...],
    ) -> Report:
        """Check the whole and give it its name. Raises `Elsewhere` where another worker does."""

        def last(path: Location, crcs: Mapping[Location, int]) -> Mapping[str, bytes]:
            self.others.let_read(crcs.values())
            try:
                more = finish(self.digest, self.others.look)(path, crcs) if finish else {}
            except CkptError as error:
                self.others.read_in_vain()
                if isinstance(error, NotAsWritten):
                    self.pieces.forget(error.places)
                raise
            try:
                self.records.rename(self.done)  # one worker can: from here on all is its own
            except FileNotFoundError:
                raise Elsewhere from None
            self.commits = True
            for name in more:
                (self.pieces.out / name).unlink(missing_ok=True)  # of a commit that failed
            return more

        staged = Staged(
            plan=self.plan, dst=self.dst, path=self.pieces.out, force=force, before=self.before, notes=notes
        )
        try:
            return commit(staged, [self.pieces.written()], replaces=replaces, finish=last)
        except CkptError:
            if self.commits:
                with suppress(OSError):
                    self.done.rename(self.records)
            raise
