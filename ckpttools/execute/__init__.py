"""Carries out a plan: the only package that writes.

The files are built under a staging name beside the destination, flushed, and appear by one rename:

1. `prepare` refuses (`preflight`): destination exists or lies in the sources, parent missing, too little
   space, short source; removes what a killed run left (`staging`), and reserves the space of every file;
2. `write` moves the `units` of one part of the plan, about 1 MiB each, by a few threads (`copy`), with a
   CRC-32 of every byte as it passes; who writes the whole of a file fills in its checksums and
   flushes it;
3. `commit` joins the parts, compares the checksums that the sources state (`claims`), looks for sources
   that changed, flushes the folders, renames, and flushes the parent folder.

`execute` is the three of them in one process. Many processes share a plan so: one prepares, each writes its
own `Plan.part(rank, world)` to the same staging, and the first commits what they all return:

    with prepare(plan, dst) as staged:
        written = gather(write(staged, plan.part(rank, world)))
        report = commit(staged, written)

Whatever happens before the rename leaves the destination as it was and removes the staging.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.execute import copy, preflight, staging, units
from ckpttools.execute.claims import compare
from ckpttools.execute.copy import Written
from ckpttools.execute.preflight import Fingerprint, validate
from ckpttools.execute.signals import terminating_signals
from ckpttools.execute.system import write_errors
from ckpttools.location import Location
from ckpttools.passes import threads
from ckpttools.plan import Part, Plan
from ckpttools.progress import Progress

__all__ = ["Report", "Staged", "Written", "WrittenFile", "commit", "execute", "prepare", "validate", "write"]


class WrittenFile(Struct, frozen=True, kw_only=True):
    """`path` as in the plan; `crc32` of the whole file, taken from the bytes as they were written."""

    path: str
    nbytes: int
    crc32: int


class Report(Struct, frozen=True, kw_only=True):
    """What was done. `nbytes_read` counts source bytes, also those read only for a checksum or between
    the elements of a view."""

    dst: Location
    files: tuple[WrittenFile, ...]
    nbytes_read: int
    checked: int  # source checksums that were compared and found right
    notes: tuple[str, ...]


class Staged(Struct, frozen=True, kw_only=True):
    """A plan that is being carried out at `path`, beside `dst`: plain data, the same for every writer."""

    plan: Plan
    dst: Path
    path: Path
    force: bool = False
    before: Mapping[Location, Fingerprint]  # of the sources
    notes: tuple[str, ...] = ()


Replaces = Callable[[], str]
Finish = Callable[[Location, Mapping[Location, int]], Mapping[str, bytes]]


@contextmanager
def prepare(
    plan: Plan,
    dst: Path,
    *,
    source: Location | None = None,
    force: bool = False,
    replaces: Replaces | None = None,
    workers: int = 0,
) -> Iterator[Staged]:
    """The staging of a plan: every file is there, with its space, and is gone afterwards unless committed.

    Options and errors as for `execute`.
    """
    dst, ends = place(plan, dst, source)
    with write_errors(dst):
        notes = staging.clear_stale(dst)
    before = _refuse(plan, dst, ends, force, replaces)
    with terminating_signals(), staging.staging_for(dst) as path:
        copy.create(plan, path, dst, _width(plan.nbytes, workers))
        yield Staged(plan=plan, dst=dst, path=path, force=force, before=before, notes=tuple(notes))


def write(staged: Staged, part: Part, *, workers: int = 0, progress: Progress | None = None) -> Written:
    """Write one part: it is on disk afterwards. `workers` threads copy, 0 chooses."""
    work = copy.Copy(staged.plan, staged.path, staged.dst, progress)
    return work.run(part, _width(part.end - part.start, workers))


def commit(
    staged: Staged,
    written: Sequence[Written],
    *,
    replaces: Replaces | None = None,
    finish: Finish | None = None,
) -> Report:
    """Make the destination appear, when every part has been written.

    `finish` is given the finished staging before it gets its name, and the CRC-32 of each file of it as it
    was written: it may read them back, raise, and return further small files. Raises ValueError where a part
    is missing or was written twice.
    """
    crcs = copy.join(staged.plan, written, staged.path, staged.dst)
    preflight.unchanged(staged.before)
    checked = compare(staged.plan.checks, [part.checks for part in written])
    files: list[Location] = [staged.path / file.path for file in staged.plan.files]
    more = finish(staged.path, dict(zip(files, crcs, strict=True))) if finish else {}
    for name, data in more.items():
        with write_errors(staged.dst):
            staging.add_file(staged.path / name, data)
    removed = judge(staged.dst, staged.force, replaces)  # again: copying may take hours
    staging.commit(staged.path, staged.dst, staged.force)
    return Report(
        dst=staged.dst,
        files=tuple(
            WrittenFile(path=file.path, nbytes=file.nbytes, crc32=crc)
            for file, crc in zip(staged.plan.files, crcs, strict=True)
        ),
        nbytes_read=sum(part.nbytes_read for part in written),
        checked=checked,
        notes=(*staged.notes, *([f"replaced {removed}"] if removed else [])),
    )


def execute(
    plan: Plan,
    dst: Path,
    *,
    source: Location | None = None,
    force: bool = False,
    replaces: Replaces | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> Report:
    """Write the plan's files at `dst`; afterwards they are whole and on disk, or `dst` is as it was.

    `source` is the file or folder that the command reads; nothing is ever written inside it. `force`
    replaces an existing `dst` atomically: a regular file or a folder, and `replaces` says in words what it
    is, or raises where that must not be. `workers` threads copy, 0 chooses. `finish` as for `commit`.
    Called from the main thread, SIGTERM and SIGHUP raise `SystemExit` while it runs, so that they clean up
    as SIGINT does.

    Raises `UsageError` where it cannot start or write, `CkptError` where the sources are damaged or
    differ from a checksum, `ValueError` for a plan that makes no sense.
    """
    with prepare(plan, dst, source=source, force=force, replaces=replaces, workers=workers) as staged:
        written = write(staged, plan.part(0, 1), workers=workers, progress=progress)
        report = commit(staged, [written], replaces=replaces, finish=finish)
    if os.path.lexists(staged.path):
        left = f"could not remove {staged.path}, which held what {staged.dst.name} was before"
        report = replace(report, notes=(*report.notes, left))
    return report


def refuse(
    plan: Plan,
    dst: Path,
    *,
    source: Location | None = None,
    force: bool = False,
    replaces: Replaces | None = None,
) -> None:
    """Raise what `execute` would raise before it writes: for runs that only show what they would do."""
    dst, ends = place(plan, dst, source)
    _refuse(plan, dst, ends, force, replaces)
    preflight.may_write(dst)


def place(plan: Plan, dst: Path, source: Location | None) -> tuple[Path, dict[Location, int]]:
    """The real destination, and the sources with the byte that each is read up to."""
    validate(plan)
    dst = preflight.real_parent(dst)
    ends = preflight.source_ends(plan)
    preflight.refuse_source(dst, [*ends, *([source] if source else [])])
    return dst, ends


def _refuse(
    plan: Plan, dst: Path, ends: Mapping[Location, int], force: bool, replaces: Replaces | None
) -> dict[Location, Fingerprint]:
    with write_errors(dst):
        judge(dst, force, replaces)
        preflight.need_space(plan, dst)
    return preflight.fingerprints(ends)


def judge(dst: Path, force: bool, replaces: Replaces | None) -> str:
    """What is going to be replaced, in words; "" for nothing. Raises UsageError where that must not be."""
    if not os.path.lexists(dst):
        return ""
    if not force:
        raise preflight.exists(dst)
    preflight.refuse_special(dst)
    return replaces() if replaces else ""


def _width(nbytes: int, workers: int) -> int:
    """How many threads: no more than there are units for them."""
    return min(threads.count(workers), 1 + nbytes // units.UNIT)
