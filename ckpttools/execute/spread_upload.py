"""One plan carried out by many processes, to a place in a store.

    DST/ckpt-unfinished.json        the marker, as of one process (`marker`): it goes last
    DST.ckpt-spread/ledger/         what is finished (`ledger`): the version, CRC-32 and shares of each object
    DST/...                         the files, those that make it a checkpoint by the worker that commits

Work is shared out by file: an upload in parts belongs to the client that began it (obstore gives its number
to nobody, and stores put objects together only from parts of one), so a plan of one file is one worker's
work. Each file appears whole; then it is in the ledger. Worker 0 (in an array, any that finds all files
finished) sends what is left, has everything read back, puts the manifest, which names the plan, then removes
ledger and marker. All that is put is the same whoever puts it, so two that commit do each other no harm, and
whatever ends a job, the same command goes on: files that are in the ledger, and are still that version, are
not sent again. A single file that is there and not in the ledger may be anybody's: only --force replaces it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from errno import EEXIST, ESTALE
from functools import partial
from typing import Any

from ckpttools import __version__
from ckpttools.errors import CkptError, NotAsWritten, UsageError, escape
from ckpttools.execute import Replaces, Report, preflight, sending
from ckpttools.execute.claims import compare
from ckpttools.execute.ledger import Ledger, describe, digest
from ckpttools.execute.marker import Marker
from ckpttools.execute.objects import File, Objects, Record, checks_of
from ckpttools.execute.others import Elsewhere, Finishes, Job, Others
from ckpttools.execute.preflight import Fingerprint
from ckpttools.execute.sending import Version, store_errors
from ckpttools.execute.signals import terminating_signals
from ckpttools.execute.spread import Spread
from ckpttools.execute.upload import IsLast, manifests, refuse, report, seen
from ckpttools.location import Location, Stored
from ckpttools.passes.threads import count
from ckpttools.plan import Plan
from ckpttools.progress import Progress
from ckpttools.siblings import MANIFEST, SPREAD

_GAPS = "gaps"
_LOOKS = 5  # for a result that another worker has just put


def spread_upload(
    plan: Plan,
    dst: Stored,
    job: Job,
    *,
    source: Location | None = None,
    force: bool = False,
    replaces: Replaces | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    finish: Finishes | None = None,
    is_last: IsLast = lambda name: False,
) -> Spread:
    """This worker's share of `upload(plan, dst)`: returns when `dst` is there, whole.

    Options and errors as for `upload` and `spread`.
    """
    preflight.validate(plan)
    before = preflight.fingerprints(preflight.source_ends(plan))
    described = describe(plan, before, __version__)
    if not dst.name:
        raise UsageError(
            "bad-usage",
            "many processes need a place of their own beside what they write",
            where=dst,
            why="what is finished is noted there, and a bucket has nothing beside it",
            hint=f"name a folder or a file below {dst}",
        )
    with terminating_signals(), store_errors(dst):
        share = _Share(plan, dst, job, described, before, progress, is_last, force=force)
        if share.is_committed():
            return share.end(None)
        old = sending.below(dst) if force and not plan.is_single_file else []  # judged by `refuse`
        for look in range(_LOOKS):
            try:
                begun = share.is_begun()
                refuse(plan, dst, source=source, force=force, replaces=replaces, begun=begun)
                break
            except UsageError:
                if share.is_committed():
                    return share.end(None)
                if look == _LOOKS - 1 or not share.ledger.is_of(share.described):
                    raise
            time.sleep(share.ledger.pause)  # another worker of this plan may have put it right now
        share.begin(old)
        if share.is_committed():  # while this worker began
            return share.end(None)
        try:
            share.others.forget_failure()
            share.send(count(workers))
            if not share.others.leave_to_me(share.needed, partial(share.read, finish)):
                return share.result(None)
            made = share.commit(finish)
        except CkptError as error:
            share.others.tell(error)
            raise
        except Elsewhere:
            share.wait_for_commit()
            return share.end(None)
        return share.end(made)


class _Share:
    """One worker's work on one plan."""

    def __init__(
        self,
        plan: Plan,
        dst: Stored,
        job: Job,
        described: Mapping[str, Any],
        before: Mapping[Location, Fingerprint],
        progress: Progress | None,
        is_last: IsLast,
        *,
        force: bool,
    ) -> None:
        self.plan, self.dst, self.job, self.before = plan, dst, job, before
        self.described, self.digest = described, digest(described)
        self.is_last, self.force = is_last, force
        self.ledger = Ledger(dst.with_name(dst.name + SPREAD) / "ledger")
        self.others = Others(self.ledger, dst, job)
        self.objects = Objects(plan, dst, progress)
        self.marker = None if plan.is_single_file else Marker(dst, plan, self.digest, shared=True)
        shared = [k for k, file in enumerate(plan.files) if not is_last(file.path)]
        shared.sort(key=lambda k: -plan.files[k].nbytes)  # so that each worker gets large ones and small ones
        self.needed = [*(f"file-{k}" for k in shared), _GAPS]
        self.last: list[File] = []  # those that make it a checkpoint
        self.count = 0

    def result(self, made: Report | None) -> Spread:
        return Spread(digest=self.digest, report=made, pieces=self.count, waiting=self.others.missing)

    def end(self, made: Report | None) -> Spread:
        """It is committed: nothing else is left of it."""
        self.others.missing = ()
        if self.ledger.is_of(self.described) is not False:
            Ledger(self.ledger.folder.parent).remove()  # and what those who read back together have told
        if self.marker is not None and self.marker.is_there():
            self.marker.delete()
        return self.result(made)

    def is_begun(self) -> bool:
        """Whether what is there was put by this plan: its marker is, or the ledger has the only file."""
        if self.marker is not None:
            return bool(self.marker.is_there())
        is_sent = self.ledger.is_of(self.described) is True and self.needed[0] in self.ledger.names()
        return is_sent and self._is_there(self.needed[0])

    def is_committed(self) -> bool:
        """Whether the manifest, which comes when all was read back, is there and names this plan, all files
        are there, and nothing else has begun to replace them.
        """
        if self.marker is not None and self.marker.is_there() is False:
            return False
        bucket = sending.bucket_of(self.dst)
        bucket.forget(str((self.dst / MANIFEST).key))
        bucket.forget(str(self.dst.with_name(f"{self.dst.name}.{MANIFEST}").key))
        return self.job.is_result(self.dst, self.digest) and preflight.is_there(self.plan, self.dst)

    def begin(self, old: list[Stored]) -> None:
        """Join the others, or be the first. Raises UsageError, OSError."""
        if self.marker is not None:
            self.marker.read(self.force)
        self.ledger.join(self.described, self.dst)
        if self.marker is None or self.marker.is_ours:
            return
        if not self.marker.found:
            self.marker.replaces(old)
        else:  # else one of this plan, from before, would say that it is committed
            for place in manifests(old):
                sending.delete(place)
        try:
            self.marker.put({})
        except OSError as error:
            if error.errno not in (EEXIST, ESTALE):
                raise
            self.marker.read(False)  # another worker's, or of something else: refused

    def send(self, workers: int) -> None:
        """Send this worker's files, but for those that are there."""
        done = self.ledger.names()
        mine = {
            name for k, name in enumerate(self.needed) if k % self.job.worker.world == self.job.worker.rank
        }
        todo = {name for name in mine if name not in done or not self._is_there(name)}
        for name in todo & done:
            self.ledger.forget(name)

        def now() -> Iterator[File]:
            # The files of others are gone through, too: what a unit claims depends on those before it.
            for k, file in enumerate(self.objects.files()):
                if self.is_last(file[0].plan.path):
                    self.last.append(file)
                elif f"file-{k}" in todo:
                    yield file

        numbers = {file.path: k for k, file in enumerate(self.plan.files)}

        def send(file: File) -> None:
            record = self.objects.send(file, self._put, self._make_room)
            preflight.unchanged(self.before)
            with store_errors(self.dst):
                self.ledger.put(f"file-{numbers[file[0].plan.path]}", record)
            with self.objects.lock:
                self.count += 1

        self.objects.each(now(), workers, send)
        if _GAPS in todo:
            gaps = self.objects.gaps()
            preflight.unchanged(self.before)
            self.ledger.put(_GAPS, {"checks": gaps})

    def _make_room(self, place: Stored) -> None:
        """Raises UsageError where something else has taken the place. Of a single file: the manifest of what
        it replaces goes before it appears.
        """
        if self.marker is not None:
            self.marker.refuse_another()
            return
        if not self.force and sending.version_of(place) is not None:
            raise preflight.exists(place)
        sending.delete(place.with_name(f"{place.name}.{MANIFEST}"))

    def _put(self, place: Stored, data: bytes) -> Version:
        is_free = self.marker is None and not self.force
        return sending.put(place, data) if is_free else sending.put_over(place, data)

    def _is_there(self, name: str) -> bool:
        """Whether what the ledger says of a file is so, still."""
        if name == _GAPS:
            return True
        file = self.plan.files[int(name.removeprefix("file-"))]
        return bool(self.ledger.get(name)["version"] == sending.version_of(self.objects.place(file.path)))

    def wait_for_commit(self) -> None:
        """The ledger is gone: another worker has put the manifest."""
        for _ in range(_LOOKS):
            if self.is_committed():
                return
            time.sleep(self.ledger.pause)
        raise UsageError(
            "write-failed",
            f"{escape(self.ledger.folder.parent.name)} was removed, or the worker that commits has failed",
            where=self.dst,
            why="what is there is not all of it, and no command takes it for a checkpoint",
            hint="look at what the other workers said, then run the same command again",
        )

    def commit(self, finish: Finishes | None) -> Report:
        """All files are there: what makes them a checkpoint comes, everything is read back, the manifest."""
        records: dict[str, Record] = {}
        try:
            gaps = {int(k): (crc, n) for k, (crc, n) in self.ledger.get(_GAPS)["checks"].items()}
            for name in self.needed[:-1]:
                path = self.plan.files[int(name.removeprefix("file-"))].path
                records[path] = self.ledger.get(name)
        except FileNotFoundError:
            raise Elsewhere from None
        for last in self.last:
            records[last[0].plan.path] = self.objects.send(last, self._put, self._make_room)
        try:
            checked = compare(self.plan.checks, [checks_of(records.values(), gaps)])
            preflight.unchanged(self.before)
            if self.marker is not None:
                self.marker.clear()
            there = seen(self.dst, self.plan)
            crcs = self.objects.crcs(records, there)
            self.others.let_read(crcs.values())
            more = finish(self.digest, self.others.look)(there, crcs) if finish else {}
            if self.marker is not None:
                self.marker.refuse_another()
        except CkptError as error:
            self.others.read_in_vain()
            self.drop(error.places if isinstance(error, NotAsWritten) else ())
            raise
        for name, data in more.items():
            sending.put_over(self.dst.with_name(name) if self.marker is None else self.dst / name, data)
        return report(self.plan, self.dst, records, self.objects.nbytes_read, checked, ())

    def read(self, finish: Finishes | None, crcs: Sequence[int]) -> None:
        """This worker's part of reading back what all have written."""
        if finish:
            there = seen(self.dst, self.plan)
            files = [there / file.path for file in self.plan.files]
            finish(self.digest, self.others.look)(there, dict(zip(files, crcs, strict=True)))

    def drop(self, wrong: Collection[Location]) -> None:
        """What is not what was written is sent again the next time; a single file, which nothing marks as
        unfinished, goes in any case, but for one that another worker has found to be right.
        """
        if self.marker is None and self.is_committed():
            return
        for k, file in enumerate(self.plan.files):
            if self.marker is None or seen(self.dst, self.plan) / file.path in wrong:
                self.ledger.forget(f"file-{k}")
                sending.delete(self.objects.place(file.path))
