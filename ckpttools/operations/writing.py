"""What every operation that writes does with its plan: carry it out, read it back, give it a manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from msgspec import Struct

from ckpttools import manifest
from ckpttools.launch import Worker, worker
from ckpttools.location import Location, Stored, below
from ckpttools.operations.sidecar import Sidecar, written_wrong
from ckpttools.plan import Plan
from ckpttools.progress import Progress
from ckpttools.siblings import MANIFEST, SPREAD

if TYPE_CHECKING:
    from ckpttools.checkpoint import Checkpoint
    from ckpttools.checks import SinksOf
    from ckpttools.checks.contents import Passing
    from ckpttools.execute import Finish, Report
    from ckpttools.execute.spread import Spread
    from ckpttools.passes.hashes import Sinks

__all__ = ["Bar", "Writing", "Written", "carry_out", "worker"]

# total bytes and a label -> a progress bar
Bar = Callable[[int, str], AbstractContextManager[Progress | None]]


class Check(Protocol):
    """Looks at what was written and has no name yet."""

    def sinks(self, staged: Location, made: Checkpoint) -> Sinks:
        """Who wants the bytes that are read back of what is at `staged`; `made` is how its headers read."""

    def __call__(self, staged: Location, contents: bytes, place: Location) -> tuple[str, bytes]:
        """After that: of a manifest and its place, what to tell, and the manifest. May raise CkptError."""


class Writing(Struct, frozen=True, kw_only=True):
    """How to write. `dry_run` makes the plan and stops; `workers` threads copy, 0 chooses; `spread`: which of
    the many processes that write the same this is.
    """

    dry_run: bool = False
    force: bool = False
    workers: int = 0
    bar: Bar | None = None
    spread: Worker | None = None


class Written(Struct, frozen=True, kw_only=True):
    """What an operation wrote at `destination`, or, where `seconds` is None, would write.

    `checked` counts the checksums of the source that were compared and found right; `next` are the commands
    and settings to go on with. `share` is what this process did where another one finished the whole.
    """

    source: Location
    destination: Location
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
    dst: Location,
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
    if how.dry_run:
        refuse(plan, dst, src, how)
        return Written(source=src, destination=dst, plan=plan, notes=plan.notes, next=next)
    from ckpttools.operations.replacing import replaceable

    told: list[str] = []
    single = Sidecar(dst, how.workers) if plan.is_single_file else None

    who = how.spread if check is None and single is None else None
    reads = who is not None and who.waits and who.world > 1

    def finish(
        staged: Location,
        crcs: Mapping[Location, int],
        digest: str = "",
        look: Callable[[], None] = lambda: None,
    ) -> Mapping[str, bytes]:
        def more(contents: bytes, place: Location) -> bytes:
            if check is not None:
                text, contents = check(staged, contents, place)
                told.append(text)
            return manifest.with_plan(contents, digest) if digest else contents

        sinks = partial(check.sinks, staged) if check is not None else None
        if single:
            return single.finish(staged, crcs, more, sinks)
        passing = None
        if who is not None and reads:
            from ckpttools.operations.verify_spread import Shared

            passing = Shared(who, dst.with_name(dst.name + SPREAD), look=look)
        return _finish(staged, crcs, how.workers, more, sinks, passing)

    started = time.monotonic()
    with how.bar(plan.nbytes, label) if how.bar else nullcontext() as progress:
        options: Options = {
            "source": src,
            "force": how.force,
            "workers": how.workers,
            "progress": progress,
            "replaces": partial(replaceable, dst, plan),
        }
        if how.spread is None:
            report = _alone(plan, dst, options, finish)
        else:
            share = _shared(plan, dst, how.spread, options, finish, reads)
            if share.report is None:
                return Written(source=src, destination=dst, plan=plan, notes=plan.notes, share=share)
            report = share.report
    after = single.write() if single and isinstance(dst, Path) else ()
    return Written(
        source=src,
        destination=dst,
        plan=plan,
        notes=(*plan.notes, *report.notes, *told, *after),
        next=next,
        seconds=time.monotonic() - started,
        checked=report.checked,
    )


def refuse(plan: Plan, dst: Location, src: Location, how: Writing) -> None:
    """Raise what would be raised before a byte is written."""
    from ckpttools.operations.replacing import replaceable

    replaces = partial(replaceable, dst, plan)
    if isinstance(dst, Stored):
        from ckpttools.execute import upload

        upload.refuse(plan, dst, source=src, force=how.force, replaces=replaces)
    else:
        from ckpttools import execute

        execute.refuse(plan, dst, source=src, force=how.force, replaces=replaces)


def _alone(plan: Plan, dst: Location, options: Options, finish: Finish) -> Report:
    if isinstance(dst, Stored):
        from ckpttools.execute.upload import upload

        return upload(plan, dst, finish=finish, is_last=is_last, **options)
    from ckpttools.execute import execute

    return execute(plan, dst, finish=finish, **options)


def _shared(
    plan: Plan,
    dst: Location,
    who: Worker,
    options: Options,
    finish: Callable[..., Mapping[str, bytes]],
    reads: bool,
) -> Spread:
    """This worker's share; `finish` is also given what `others.Finishes` is."""
    from ckpttools.execute.others import Job

    def of(digest: str, look: Callable[[], None]) -> Finish:
        return partial(finish, digest=digest, look=look)

    job = Job(worker=who, is_result=manifest.is_result, reads=reads)
    if isinstance(dst, Stored):
        from ckpttools.execute.spread_upload import spread_upload

        return spread_upload(plan, dst, job, finish=of, is_last=is_last, **options)
    from ckpttools.execute.spread import spread

    return spread(plan, dst, job, finish=of, **options)


def is_last(name: str) -> bool:
    """Whether a file of a plan is one of those that make the others a checkpoint."""
    from ckpttools.frameworks import POINTERS

    base = name.rpartition("/")[2]
    return base in POINTERS or base.endswith((".index.json", ".metadata", MANIFEST))


def _finish(
    staged: Location,
    crcs: Mapping[Location, int],
    workers: int,
    more: Callable[[bytes, Location], bytes],
    sinks: SinksOf | None,
    passing: Passing | None,
) -> dict[str, bytes]:
    """Read back what is about to appear, by `passing`, and give it a manifest, to which `more` adds; nothing
    where another worker does that.

    The headers are checked, every byte is held against its file's CRC-32: an error is a defect of ckpttools.
    """
    from ckpttools.checks import verify
    from ckpttools.checks.verdict import Delivered

    try:
        verdict = verify(
            staged, quick=True, describe=True, workers=workers, crcs=crcs, sinks=sinks, passing=passing
        )
    except Delivered:
        return {}
    for finding in verdict.findings:
        if finding.severity == "error":
            raise written_wrong(staged, finding.message, finding.id, finding.file)
    assert verdict.manifest is not None
    place, contents = verdict.manifest
    return {below(place, staged): more(contents, place)}
