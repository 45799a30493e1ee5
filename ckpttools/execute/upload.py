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

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from errno import EEXIST, ESTALE
from pathlib import Path
from typing import Any

from ckpttools import __version__
from ckpttools.checksums import Share, joined
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.execute import Finish, Replaces, Report, WrittenFile, preflight, sending, units
from ckpttools.execute.checks import compare
from ckpttools.execute.copy import Copy
from ckpttools.execute.ledger import describe, digest
from ckpttools.execute.preflight import Fingerprint
from ckpttools.execute.sending import Upload, Version, Without
from ckpttools.execute.signals import terminating_signals
from ckpttools.execute.units import StagedFile, Unit
from ckpttools.location import Location, Stored
from ckpttools.passes.read import Reader
from ckpttools.passes.threads import count
from ckpttools.plan import Plan
from ckpttools.progress import Progress
from ckpttools.siblings import MANIFEST, UNFINISHED
from ckpttools.values import BLOCK_NBYTES

_FILES_AT_ONCE = 4
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
        old = work.begin(old)
        try:
            work.send(count(workers))
            checked = compare(plan.checks, [work.checks()])
            preflight.unchanged(before)
            work.clear(old)
            more = finish(work.seen, work.crcs()) if finish else {}
        except BaseException as error:
            with suppress(OSError):
                work.undo() if isinstance(error, CkptError) and not isinstance(
                    error, _StoreFailed
                ) else work.leave()
            raise
        work.commit(more)
    return Report(
        dst=dst,
        files=tuple(
            WrittenFile(path=file.path, nbytes=file.nbytes, crc32=work.crc(file.path)) for file in plan.files
        ),
        nbytes_read=work.nbytes_read,
        checked=checked,
        notes=work.notes,
    )


def refuse(
    plan: Plan, dst: Stored, *, source: Location | None, force: bool, replaces: Replaces | None
) -> dict[Location, Fingerprint]:
    """Raise what `upload` would raise before it writes; the fingerprints of the sources."""
    preflight.validate(plan)
    sending.bucket_of(dst).forget(str(dst.key))
    ends = preflight.source_ends(plan)
    for root in {*ends, *([source] if source else [])}:
        if isinstance(root, Stored) and (root == dst or dst in root.parents or root in dst.parents):
            raise preflight.in_source(dst, root)
    before = preflight.fingerprints(ends)
    with store_errors(dst):
        if sending.version_of(dst / UNFINISHED) is None and sending.is_taken(dst):
            if not force:
                raise preflight.exists(dst)
            if replaces is not None:
                replaces()
    return before


class _StoreFailed(UsageError):
    """What was sent is good, and can be gone on with."""


@contextmanager
def store_errors(dst: Stored) -> Iterator[None]:
    """An `OSError` of the store as a `UsageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (EEXIST, ESTALE):
            message, hint = "another program wrote there meanwhile", "see what it was; then run this again"
        else:
            message = f"cannot write: {escape(error.strerror or type(error).__name__)}"
            hint = "check the store; the same command goes on: finished files are not sent again"
        raise _StoreFailed(
            "write-failed",
            message,
            where=error.filename if isinstance(error.filename, str) else dst,
            why="what is there is not all of it, and no command takes it for a checkpoint",
            hint=hint,
        ) from None


class _Upload:
    """One plan on its way to a store: the record of what is finished, and the threads that send."""

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
        self.digest = digest(describe(plan, before, __version__))
        self.copy = Copy(plan, Path("-"), Path("-"), progress)
        self.marker = None if plan.is_single_file else dst / UNFINISHED
        self.seen = dst if self.marker is None else _seen(dst, self.marker)
        self.finished: dict[str, dict[str, Any]] = {}
        self.notes: tuple[str, ...] = ()
        self.nbytes_read = 0
        self._version: Version | None = None
        self._lock, self._stop, self._saved = threading.Lock(), threading.Event(), 0.0
        self._gaps: dict[int, Share] = {}

    def begin(self, old: list[Stored]) -> list[Stored]:
        """Take the place of what is `old` there; returns what is to be replaced. Raises UsageError."""
        if self.marker is None:
            return []
        try:
            data, self._version = sending.get(self.marker)
        except FileNotFoundError:
            if old:
                self.notes = (f"replaced {escape(self.dst)}, {len(old)} objects",)
        else:
            old = self._go_on(data)
        self._save()
        return old

    def _go_on(self, data: bytes) -> list[Stored]:
        """An upload that was not finished: of this plan, or with --force of another one, whose files go."""
        try:
            said = json.loads(data)
            if said["plan"] == self.digest:
                for name, record in said["finished"].items():
                    if sending.version_of(self.dst / name) == record["version"]:
                        self.finished[name] = record
                self.notes = (f"went on with an upload: {len(self.finished)} files were there",)
                return []
            names = [str(name) for name in said["files"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            names = []
        if not self.force:
            raise UsageError(
                "destination-exists",
                "an upload of something else was not finished there",
                where=self.dst,
                why="another program may still be writing it",
                hint="choose another destination; or, if nothing writes it any more, --force replaces it",
            )
        return [self.dst / name for name in names]

    def _save(self) -> None:
        """Record what is finished. Raises OSError ESTALE where another program has taken the place."""
        assert self.marker is not None
        record = {
            "ckpttools": __version__,
            "what": "an upload that is not finished: the files beside this one are no checkpoint yet",
            "plan": self.digest,
            "files": [file.path for file in self.plan.files],
            "finished": self.finished,
        }
        self._version = sending.put(self.marker, json.dumps(record).encode(), over=self._version)
        self._saved = time.monotonic()

    def send(self, workers: int) -> None:
        """Send every file that is not there, those that make it a checkpoint at the end."""
        later: list[tuple[StagedFile, list[Unit]]] = []
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(min(workers, _FILES_AT_ONCE)) as pool:
            try:
                # units of files that are there, too: what a unit claims depends on those before it
                for file, todo in self._files():
                    if file.plan.path in self.finished:
                        if self.progress is not None:
                            self.progress.update(file.plan.nbytes)
                    elif self.is_last(file.plan.path):
                        later.append((file, todo))
                    else:
                        running = _room(running, _FILES_AT_ONCE)
                        running.add(pool.submit(self._send, file, todo))
                _room(running, 0)
                self._read_gaps()
                for file, todo in later:
                    self._send(file, todo)
            except BaseException:
                self._stop.set()
                raise

    def _files(self) -> Iterator[tuple[StagedFile, list[Unit]]]:
        for file in self.copy.files:
            yield file, [unit for _, unit in units.in_order([file], self.copy.checks, units.UNIT)]

    def _send(self, file: StagedFile, todo: Sequence[Unit]) -> None:
        """One object, from its parts; then it is on record."""
        place = self.dst / file.plan.path if file.plan.path else self.dst
        shares: dict[int, Share] = {}
        with store_errors(place):
            if file.plan.nbytes <= sending.PART:
                data = b"".join(self._parts(file, todo, shares))
                self._make_room(place)
                version = self._put(place, data)
            else:
                with Upload(place, file.plan.nbytes) as sent:
                    for part in self._parts(file, todo, shares):
                        sent.write(part)
                    self._make_room(place)
                    version = sent.finish()
            record = {"version": version, "crc32": file.crcs.values[0], "checks": shares}
            with self._lock:
                self.finished[file.plan.path] = record
                if self.marker is not None and time.monotonic() - self._saved > _SAVED:
                    self._save()

    def _make_room(self, place: Stored) -> None:
        """Of a single file, which is about to appear: nothing is there by now, or it and its manifest go."""
        if self.marker is None and self.force:
            sending.delete(place.with_name(f"{place.name}.{MANIFEST}"))
        elif self.marker is None and sending.version_of(place) is not None:
            raise preflight.exists(place)

    def _put(self, place: Stored, data: bytes) -> Version:
        """In one request, where nothing is but what an ended upload left or what is to be replaced."""
        over = sending.version_of(place) if self.notes or self.force else None
        return sending.put(place, data, over=over)

    def _parts(self, file: StagedFile, todo: Sequence[Unit], shares: dict[int, Share]) -> Iterator[bytes]:
        nbytes = sending.part_of(file.plan.nbytes)
        room, scratch = memoryview(bytearray(units.LONGEST)), memoryview(bytearray(BLOCK_NBYTES))
        part = bytearray()
        with Reader() as reader:
            for unit in todo:
                if self._stop.is_set():
                    raise InterruptedError
                view = room[: unit.nbytes]
                self.copy.fill(view, unit, reader, scratch, shares)
                part += view
                while len(part) >= nbytes:
                    yield bytes(part[:nbytes])
                    del part[:nbytes]
                if self.progress is not None:
                    with self._lock:
                        self.progress.update(unit.nbytes)
            if part:
                yield bytes(part)
            with self._lock:
                self.nbytes_read += reader.nbytes_read

    def _read_gaps(self) -> None:
        """What only the source's checksums need."""
        self.copy.read(self.copy.checks.gaps(units.UNIT), 1)
        self.nbytes_read += self.copy.take_nbytes_read()
        self._gaps = self.copy.checks.take()

    def leave(self) -> None:
        """What is finished is on record; nothing is left of an upload that never began."""
        if self.marker is not None and self.finished:
            self._save()
        elif self.marker is not None:
            sending.delete(self.marker)

    def undo(self) -> None:
        """Remove what was sent, unless another program has put something else there."""
        for name, record in self.finished.items():
            place = self.dst / name if name else self.dst
            if sending.version_of(place) == record["version"]:
                sending.delete(place)
        if self.marker is not None:
            sending.delete(self.marker)

    def crcs(self) -> dict[Location, int]:
        """Of each file, where it will be."""
        return {
            self.seen / file.path if file.path else self.seen: self.crc(file.path) for file in self.plan.files
        }

    def checks(self) -> dict[int, Share]:
        """What all files, of this process and of those before it, add to the source's checksums."""
        out = dict(self._gaps)
        for record in self.finished.values():
            for number, (crc, nbytes) in record["checks"].items():
                out[int(number)] = joined(out.get(int(number), (0, 0)), (crc, nbytes))
        return out

    def crc(self, name: str) -> int:
        return int(self.finished[name]["crc32"])

    def clear(self, old: Sequence[Stored]) -> None:
        """Of what is replaced, delete what was not written over."""
        kept = {self.dst / file.path for file in self.plan.files}
        for place in old:
            if place not in kept and place != self.marker:
                sending.delete(place)

    def commit(self, more: Mapping[str, bytes]) -> None:
        """Put the small files that were made of the whole; at last the marker goes."""
        for name, data in more.items():
            self._put(self.dst.with_name(name) if self.marker is None else self.dst / name, data)
        if self.marker is not None:
            self._save()  # whoever has taken the place meanwhile shows here
            sending.delete(self.marker)


def _seen(dst: Stored, marker: Stored) -> Stored:
    """The place as it will be."""
    return Without(sending.bucket_of(dst), str(marker.key)).at(dst)


def _room(running: set[Future[None]], most: int) -> set[Future[None]]:
    """Wait until fewer than `most` run, or none; raise what went wrong in those that ended."""
    while running and len(running) >= max(most, 1):
        done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for each in done:
            each.result()
    return running
