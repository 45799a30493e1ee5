"""Carries out a plan at a place in a store: no rename there, and a folder is only what the keys say.

    DST/ckpt-unfinished.json    from the first byte to the last: the plan, and which files of it are there
    DST/...                     the files, large ones in parts; those that make it a checkpoint come last

While the first one is there no command takes the folder for a checkpoint. It is put where nothing is, and
each time in place of the version that this process put: of two that write the same, one is refused. When all
bytes were read back and the manifest is there, its deletion commits. Whatever ends the program before leaves
it, and the same command goes on: finished files are not sent again. A single file appears whole, and needs
none of this.

A part is made in memory from the units of the plan, with a CRC-32 of every byte, so nothing lies on a disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from ckpttools import __version__
from ckpttools.errors import CkptError, escape
from ckpttools.execute import Finish, Replaces, Report, WrittenFile, preflight, sending
from ckpttools.execute.aliases import refuse_source
from ckpttools.execute.claims import compare
from ckpttools.execute.ledger import Ledger, describe, digest
from ckpttools.execute.marker import Marker
from ckpttools.execute.objects import File, Objects, checks_of
from ckpttools.execute.preflight import Fingerprint
from ckpttools.execute.sending import StoreFailed, Version, Without, store_errors
from ckpttools.execute.signals import terminating_signals
from ckpttools.location import Location, Stored
from ckpttools.passes.threads import count
from ckpttools.plan import Plan
from ckpttools.progress import Progress
from ckpttools.siblings import MANIFEST, SPREAD, UNFINISHED

_SAVED = 2.0  # seconds from one record of what is finished to the next

IsLast = Callable[[str], bool]


def upload(
    plan: Plan,
    dst: Stored,
    *,
    source: Location | None = None,
    force: bool = False,
    replaces: Replaces | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    finish: Finish | None = None,
    is_last: IsLast = lambda name: False,
) -> Report:
    """Write the plan's files at `dst`; afterwards they are whole, or no command takes them for a checkpoint.

    `is_last` names the files that make it one, `finish` is given the place and the CRC-32 of each file: it
    reads them back, raises, and returns further small files. Options and errors otherwise as for `execute`.
    """
    with store_errors(dst):
        old = sending.below(dst) if force and not plan.is_single_file else []  # judged by `refuse`
    before = refuse(plan, dst, source=source, force=force, replaces=replaces)
    work = _Upload(plan, dst, before, progress, is_last, force=force)
    with terminating_signals(), store_errors(dst):
        work.begin(old)
        try:
            work.send(count(workers))
            checked = compare(plan.checks, [checks_of(work.finished.values(), work.gaps)])
            preflight.unchanged(before)
            if work.marker is not None:
                work.marker.clear()
            more = finish(work.seen, work.objects.crcs(work.finished, work.seen)) if finish else {}
        except BaseException as error:
            with suppress(OSError):
                if isinstance(error, CkptError) and not isinstance(error, StoreFailed):
                    if work.undo():
                        error.hint += (
                            f"\n{escape(dst)} is no checkpoint now: --force replaces what is left there"
                        )
                else:
                    work.leave()
            raise
        work.commit(more)
    return report(plan, dst, work.finished, work.objects.nbytes_read, checked, work.notes)


def report(
    plan: Plan,
    dst: Stored,
    records: Mapping[str, Mapping[str, Any]],
    nbytes_read: int,
    checked: int,
    notes: tuple[str, ...],
) -> Report:
    return Report(
        dst=dst,
        files=tuple(
            WrittenFile(path=file.path, nbytes=file.nbytes, crc32=int(records[file.path]["crc32"]))
            for file in plan.files
        ),
        nbytes_read=nbytes_read,
        checked=checked,
        notes=notes,
    )


def refuse(
    plan: Plan,
    dst: Stored,
    *,
    source: Location | None,
    force: bool,
    replaces: Replaces | None,
    begun: bool | None = None,
) -> dict[Location, Fingerprint]:
    """Raise what `upload` would raise before it writes; the fingerprints of the sources. `begun`: whether
    what is there was put by this plan; None where its marker tells.
    """
    preflight.validate(plan)
    sending.bucket_of(dst).forget(str(dst.key))
    ends = preflight.source_ends(plan)
    before = preflight.fingerprints(ends)
    with store_errors(dst):
        refuse_source(dst, ends, source)
        marker = Marker(dst, plan, digest(describe(plan, before, __version__)))
        there = None if plan.is_single_file else marker.is_there()
        if not (there if begun is None else begun) and sending.is_taken(dst):
            if not force:
                raise preflight.exists(dst) if there is None else marker.another()
            if replaces is not None:
                replaces()
    return before


class _Upload:
    """One plan on its way to a store, by one process: the record of what is finished is in the marker."""

    def __init__(
        self,
        plan: Plan,
        dst: Stored,
        before: Mapping[Location, Fingerprint],
        progress: Progress | None,
        is_last: IsLast,
        *,
        force: bool,
    ) -> None:
        self.plan, self.dst, self.progress, self.is_last, self.force = plan, dst, progress, is_last, force
        self.objects = Objects(plan, dst, progress)
        made = digest(describe(plan, before, __version__))
        self.marker = None if plan.is_single_file else Marker(dst, plan, made)
        self.seen = seen(dst, plan)
        self.finished: dict[str, dict[str, Any]] = {}
        self.gaps: dict[int, tuple[int, int]] = {}
        self.notes: tuple[str, ...] = ()
        self._saved = 0.0
        self._appeared = False  # the first object, maybe

    def begin(self, old: list[Stored]) -> None:
        """Take the place of what is `old` there. Raises UsageError."""
        if self.marker is None:
            return
        self.marker.read(self.force)
        if self.marker.is_ours:
            for name, record in self.marker.finished.items():
                if sending.version_of(self.dst / name) == record["version"]:
                    self.finished[name] = record
            self.notes = (f"went on with an upload: {len(self.finished)} files were there",)
        elif not self.marker.found:
            self.marker.replaces(old)
            if old:
                self.notes = (f"replaced {escape(self.dst)}, {len(old)} objects",)
        else:
            self.marker.replaces(manifests(old))
        self._save(self.marker)

    def _save(self, marker: Marker) -> None:
        marker.put(self.finished)
        self._saved = time.monotonic()

    def send(self, workers: int) -> None:
        """Send every file that is not there, those that make it a checkpoint at the end."""
        later: list[File] = []

        def now() -> Iterator[File]:
            for file in self.objects.files():
                plan = file[0].plan
                if plan.path in self.finished:
                    if self.progress is not None:
                        self.progress.update(plan.nbytes)
                elif self.is_last(plan.path):
                    later.append(file)
                else:
                    yield file

        self.objects.each(now(), workers, self._send)
        self.gaps = self.objects.gaps()
        for file in later:
            self._send(file)

    def _send(self, file: File) -> None:
        """One object; then it is on record."""
        record = self.objects.send(file, self._put, self._make_room)
        place = self.objects.place(file[0].plan.path)
        with self.objects.lock, store_errors(place):
            self.finished[file[0].plan.path] = record
            if self.marker is not None and time.monotonic() - self._saved > _SAVED:
                self._save(self.marker)

    def _make_room(self, place: Stored) -> None:
        """Of a single file, which is about to appear: nothing is there by now, or it goes; so does a manifest
        that describes another one.
        """
        self._appeared = True
        if self.marker is None:
            if not self.force and sending.version_of(place) is not None:
                raise preflight.exists(place)
            sending.delete(place.with_name(f"{place.name}.{MANIFEST}"))

    def _put(self, place: Stored, data: bytes) -> Version:
        """In one request, where nothing is but what an ended upload left or what is to be replaced."""
        over = sending.version_of(place) if self.notes or self.force else None
        return sending.put(place, data, over=over)

    def leave(self) -> None:
        """What is finished is on record; nothing is left of an upload that never began."""
        if self.marker is None:
            return
        if self._appeared or self.marker.found:
            self._save(self.marker)
        else:
            self.marker.release()

    def undo(self) -> bool:
        """Remove what was sent, unless another program has put something else there. Where that leaves the
        rest of what was to be replaced, or of an ended upload, the marker stays, and True is returned.
        """
        for name, record in self.finished.items():
            place = self.objects.place(name)
            if sending.version_of(place) == record["version"]:
                sending.delete(place)
        if self.marker is None:
            return False
        is_less = self.marker.found or (self.marker.old and self._appeared)
        if is_less and any(place != self.marker.place for place in sending.below(self.dst)):
            self.finished.clear()
            self._save(self.marker)
            return True
        self.marker.release()
        return False

    def commit(self, more: Mapping[str, bytes]) -> None:
        """Put the small files that were made of the whole; at last the marker goes."""
        for name, data in more.items():
            self._put(self.dst.with_name(name) if self.marker is None else self.dst / name, data)
        if self.marker is not None:
            self._save(self.marker)  # whoever has taken the place meanwhile shows here
            self.marker.delete()
        if self.force and self.dst.name:  # what many workers have noted of what was replaced
            Ledger(self.dst.with_name(self.dst.name + SPREAD)).remove()


def manifests(places: Iterable[Stored]) -> list[Stored]:
    """Of what is replaced: they name a plan whose files another one has replaced since."""
    return [place for place in places if place.name.endswith(MANIFEST)]


def seen(dst: Stored, plan: Plan) -> Stored:
    """The place as it will be."""
    if plan.is_single_file:
        return dst
    return Without(sending.bucket_of(dst), str((dst / UNFINISHED).key)).at(dst)
