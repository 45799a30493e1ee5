"""What every operation that writes does with its plan: carry it out, read it back, give it a manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ckpttools import manifest
from ckpttools.launch import Worker, worker
from ckpttools.location import Location, below
from ckpttools.operations.sidecar import Sidecar, written_wrong
from ckpttools.plan import Plan
from ckpttools.progress import Progress

if TYPE_CHECKING:
    from ckpttools.execute.spread import Spread

__all__ = ["Bar", "Writing", "Written", "carry_out", "worker"]

# total bytes and a label -> a progress bar
Bar = Callable[[int, str], AbstractContextManager[Progress | None]]
# what was written and has no name yet, a manifest of it and that one's place -> what to tell, the manifest
Check = Callable[[Path, bytes, Path], tuple[str, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How to write. `dry_run` makes the plan and stops; `workers` threads copy, 0 chooses; `spread`: which of
    the many processes that write the same this is.
    """

    dry_run: bool = False
    force: bool = False
    workers: int = 0
    bar: Bar | None = None
    spread: Worker | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What an operation wrote at `destination`, or, where `seconds` is None, would write.

    `checked` counts the checksums of the source that were compared and found right; `next` are the commands
    and settings to go on with. `share` is what this process did where another one finished the whole.
    """

    source: Location
    destination: Path
    plan: Plan
    notes: tuple[str, ...]
    next: tuple[str, ...] = ()
    seconds: float | None = None
    checked: int | None = None
    share: Spread | None = None


class Options(TypedDict):
    source: Location
    force: bool
    workers: int
    progress: Progress | None
    replaces: Callable[[], str]


def carry_out(
    src: Location,
    dst: Path,
    plan: Plan,
    how: Writing,
    *,
    label: str,
    next: tuple[str, ...] = (),
    check: Check | None = None,
) -> Written:
    """The end of every writing operation: `dst` is whole and checked afterwards, or as it was.

    `check` looks at what was written, may raise, and may add to its manifest.
    Raises UsageError where it cannot be written, CkptError where the source is damaged.
    """
    from ckpttools.execute import execute, refuse
    from ckpttools.operations.replacing import replaceable

    def replaces() -> str:
        return replaceable(dst, plan)

    if how.dry_run:
        refuse(plan, dst, source=src, force=how.force, replaces=replaces)
        return Written(source=src, destination=dst, plan=plan, notes=plan.notes, next=next)
    told: list[str] = []
    single = Sidecar(dst, how.workers) if plan.is_single_file else None

    def finish(staged: Path, crcs: Mapping[Path, int], digest: str = "") -> Mapping[str, bytes]:
        def more(contents: bytes, place: Path) -> bytes:
            if check is not None:
                text, contents = check(staged, contents, place)
                told.append(text)
            return manifest.with_plan(contents, digest) if digest else contents

        if single:
            return single.finish(staged, crcs, more)
        return _finish(staged, crcs, how.workers, more)

    started = time.monotonic()
    with how.bar(plan.nbytes, label) if how.bar else nullcontext() as progress:
        options: Options = {
            "source": src,
            "force": how.force,
            "workers": how.workers,
            "progress": progress,
            "replaces": replaces,
        }
        if how.spread:
            from ckpttools.execute.spread import Job, spread

            job = Job(worker=how.spread, is_result=manifest.is_result)
            share = spread(plan, dst, job, finish=lambda digest: partial(finish, digest=digest), **options)
            if share.report is None:
                return Written(source=src, destination=dst, plan=plan, notes=plan.notes, share=share)
            report = share.report
        else:
            report = execute(plan, dst, finish=finish, **options)
    after = single.write() if single else ()
    return Written(
        source=src,
        destination=dst,
        plan=plan,
        notes=(*plan.notes, *report.notes, *told, *after),
        next=next,
        seconds=time.monotonic() - started,
        checked=report.checked,
    )


def _finish(
    staged: Path, crcs: Mapping[Path, int], workers: int, more: Callable[[bytes, Path], bytes]
) -> dict[str, bytes]:
    """Read back what is about to appear, and give it a manifest, to which `more` adds.

    The headers are checked, every byte is held against its file's CRC-32: an error is a defect of ckpttools.
    """
    from ckpttools.checks import verify

    verdict = verify(staged, quick=True, describe=True, workers=workers, crcs=crcs)
    for finding in verdict.findings:
        if finding.severity == "error":
            raise written_wrong(staged, finding.message, finding.id, finding.file)
    assert verdict.manifest is not None
    place, contents = verdict.manifest
    assert isinstance(place, Path)
    return {below(place, staged): more(contents, place)}
