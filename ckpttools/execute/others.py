"""The other workers of the same plan, as the ledger shows them: what is finished, and who has failed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from msgspec import Struct

from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.execute import Finish
from ckpttools.execute.ledger import Ledger
from ckpttools.launch import Worker
from ckpttools.location import Location

_REMIND = 150  # polls

_WRITTEN = "written"

Is = Callable[[Location, str], bool]
# of the digest of the plan, and of what those who wait for others call, which may raise
Finishes = Callable[[str, Callable[[], None]], Finish]


class Job(Struct, frozen=True, kw_only=True):
    """What this worker does for whom. `is_result` tells whether a destination is the result of the plan with
    this digest: another worker may have committed already. `alone`: it is the only process of the job, so
    that what an ended one left of another plan may go. `reads`: all workers read back together what was
    written.
    """

    worker: Worker
    is_result: Is
    alone: bool = False
    reads: bool = False
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)


class Elsewhere(Exception):
    """Another worker commits, or has: the ledger is gone."""


class Others:
    """Those whom worker `job.worker` waits for. Piece k of `needed` is of worker k modulo their number."""

    def __init__(self, ledger: Ledger, dst: Location, job: Job) -> None:
        self.ledger, self.dst, self.job = ledger, dst, job
        self.rank, self.world = job.worker.rank, job.worker.world
        self.missing: tuple[str, ...] = ()
        self._failed = {name for name in ledger.names() if name.startswith("failed-")}

    def tell(self, error: CkptError) -> None:
        """Let them know; they would wait."""
        with suppress(OSError):
            record = {"job": self.job.worker.job, "id": error.id, "message": error.message}
            self.ledger.put(f"failed-{self.rank}", record)

    def forget_failure(self) -> None:
        """A failure of this worker is no longer one."""
        self.ledger.forget(f"failed-{self.rank}")
        self._failed.discard(f"failed-{self.rank}")

    def leave_to_me(
        self, needed: Sequence[str], read: Callable[[Sequence[int]], object] = lambda crcs: None
    ) -> bool:
        """Wait for them; whether this worker is to commit, when every piece is finished. `read` is called
        where all are to read back what was written, with the CRC-32 of each file.

        Raises `Elsewhere` where the ledger is gone, UsageError "worker-failed".
        """
        quiet, before, has_read = 0, -1, False
        while True:
            done = self.ledger.names()
            self.missing = tuple(name for name in needed if name not in done)
            if not self.missing and (self.rank == 0 or not self.job.worker.waits):
                return True
            if not done:
                self.missing = ()
                raise Elsewhere
            if not self.job.worker.waits:
                return False
            self._refuse_failed(done)
            if self.job.reads and _WRITTEN in done and not has_read:
                with suppress(FileNotFoundError):
                    crcs = self.ledger.get(_WRITTEN)["crcs"]
                    read(crcs)
                    has_read = True
                continue
            quiet = quiet + 1 if len(done) == before else 0
            before = len(done)
            if quiet % _REMIND == _REMIND - 1:
                self.job.say(self._reminder(needed))
            time.sleep(self.ledger.pause)

    def let_read(self, crcs: Iterable[int]) -> None:
        """Every file is written: all are to read it back."""
        if self.job.reads:
            self.ledger.put(_WRITTEN, {"crcs": list(crcs)})

    def read_in_vain(self) -> None:
        """What was written has to be written again."""
        if self.job.reads:
            self.ledger.forget(_WRITTEN)

    def look(self) -> None:
        """Raises UsageError "worker-failed" where one of them has failed."""
        self._refuse_failed(self.ledger.names())

    def _refuse_failed(self, done: set[str]) -> None:
        """What was there when this worker came may be of another job, unless the launcher names it."""
        for name in sorted(done):
            if name.startswith("failed-"):
                try:
                    said = self.ledger.get(name)
                except FileNotFoundError:
                    continue
                if name in self._failed and not (said["job"] and said["job"] == self.job.worker.job):
                    continue
                raise UsageError(
                    "worker-failed",
                    f"worker {name.removeprefix('failed-')} failed: {escape(str(said.get('message')), 500)}",
                    where=self.dst,
                    why="its part of the destination is missing; what is finished is kept",
                    hint="mend the cause, then run the same command again: it goes on from there",
                )

    def _reminder(self, needed: Sequence[str]) -> str:
        """Who is waited for, and for how many pieces."""
        owed: dict[int, int] = {}
        for number, name in enumerate(needed):
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
