"""Carries out a plan: the only package that writes.

The files are built under a staging name beside the destination, flushed, and appear by one rename:

1. `preflight` refuses: destination exists or lies in the sources, parent missing, too little space,
   short source; `staging` removes what a killed run left behind;
2. `copy` reserves the space of every file, then moves `units` of about 1 MiB by a few `threads`, with a
   CRC-32 of every byte as it passes; the last unit of a file fills in its `Crc32` segments and flushes it;
3. `checks` compares the checksums that the sources state, `preflight` looks for sources that changed;
4. `staging` flushes the folders, renames, and flushes the parent folder.

Whatever happens before the rename leaves the destination as it was and removes the staging.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpttools.execute import preflight, staging
from ckpttools.execute.checks import SourceChecks
from ckpttools.execute.copy import Copy
from ckpttools.execute.preflight import validate
from ckpttools.execute.signals import terminating_signals
from ckpttools.execute.system import write_errors
from ckpttools.plan import Plan
from ckpttools.progress import Progress

__all__ = ["Report", "WrittenFile", "execute", "validate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """`path` as in the plan; `crc32` of the whole file, taken from the bytes as they were written."""

    path: str
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was done. `nbytes_read` counts source bytes, also those read only for a checksum or between
    the elements of a view."""

    dst: Path
    files: tuple[WrittenFile, ...]
    nbytes_written: int
    nbytes_read: int
    checked: int  # source checksums that were compared and found right
    notes: tuple[str, ...]


def execute(
    plan: Plan,
    dst: Path,
    *,
    source: Path | None = None,
    force: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
    finish: Callable[[Path], Mapping[str, bytes]] | None = None,
) -> Report:
    """Write the plan's files at `dst`; afterwards they are whole and on disk, or `dst` is as it was.

    `source` is the file or folder that the command reads; nothing is ever written inside it. `force`
    replaces an existing `dst` atomically. `workers` threads copy, 0 chooses. `finish` is given the finished
    staging folder before it gets its name: it may look at it, raise, and return further small files.
    Called from the main thread, SIGTERM and SIGHUP raise `SystemExit` while it runs, so that they clean up
    as SIGINT does.

    Raises `UsageError` where it cannot start or write, `CkptError` where the sources are damaged or
    differ from a checksum, `ValueError` for a plan that makes no sense.
    """
    validate(plan)
    dst = preflight.real_parent(dst)
    ends = preflight.source_ends(plan)
    preflight.refuse_source(dst, [*ends, *([source] if source else [])])
    with write_errors(dst):
        notes = staging.clear_stale(dst)
        if os.path.lexists(dst) and not force:
            raise preflight.exists(dst)
        preflight.need_space(plan, dst)
    before = preflight.fingerprints(ends)
    checks = SourceChecks(plan.checks)
    with terminating_signals(), staging.staging_for(dst) as staged:
        copy = Copy(plan, staged, dst, checks, progress)
        copy.run(workers or min(os.cpu_count() or 1, 8))
        preflight.unchanged(before)
        checked = checks.compare()
        for name, data in (finish(staged) if finish else {}).items():
            with write_errors(dst):
                staging.add_file(staged / name, data)
        staging.commit(staged, dst, force)
    if os.path.lexists(staged):
        notes.append(f"could not remove {staged}, which held what {dst.name} was before")
    return Report(
        dst=dst,
        files=tuple(
            WrittenFile(path=file.plan.path, nbytes=file.plan.nbytes, crc32=file.crcs.values[0])
            for file in copy.files
        ),
        nbytes_written=plan.nbytes,
        nbytes_read=copy.nbytes_read,
        checked=checked,
        notes=tuple(notes),
    )
