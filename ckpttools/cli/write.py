"""What every writing command does with its plan: show it, or carry it out and say where the result is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from ckpttools.cli import render
from ckpttools.cli.sidecar import Sidecar, written_wrong
from ckpttools.errors import escape
from ckpttools.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """The common options of a writing command, as given."""

    src: Path
    dst: Path
    dry_run: bool
    force: bool
    as_json: bool
    quiet: bool
    workers: int
    no_progress: bool


def write(plan: Plan, how: Writing, label: str, about: Mapping[str, object] | None = None) -> None:
    """Carry out the plan or, with --dry-run, print it. `about` is what the command adds to --json."""
    if how.dry_run:
        if how.as_json:
            render.document(render.plan_json(plan, how.src, how.dst, dry_run=True) | dict(about or {}))
        else:
            click.echo(render.plan_text(plan, how.dst))
        return
    from ckpttools.execute import execute

    single = Sidecar(how.dst, how.workers) if plan.is_single_file else None
    started = time.monotonic()
    with render.bar(plan.nbytes, label, enabled=not (how.no_progress or how.quiet)) as progress:
        report = execute(
            plan,
            how.dst,
            source=how.src,
            force=how.force,
            workers=how.workers,
            progress=progress,
            finish=single.finish if single else lambda staged: _finish(staged, how.workers),
        )
    notes = (*report.notes, *(single.write() if single else ()))
    seconds = time.monotonic() - started
    if how.as_json:
        shown = render.plan_json(plan, how.src, how.dst, dry_run=False)
        done: dict[str, object] = {"seconds": round(seconds, 3), "checksums_verified": report.checked}
        done["notes"] = [*plan.notes, *notes]
        render.document(shown | done | dict(about or {}))
        return
    for note in render.notes_text((*plan.notes, *notes)):
        render.say(note, quiet=how.quiet)
    rate = render.size(int(plan.nbytes / max(seconds, 1e-9)))
    render.say(
        f"wrote {len(plan.files)} files, {render.size(plan.nbytes)} in {seconds:.1f} s ({rate}/s); "
        f"{report.checked} source checksums verified",
        quiet=how.quiet,
    )
    click.echo(escape(how.dst, 4000))


def _finish(staged: Path, workers: int) -> dict[str, bytes]:
    """Check what is about to appear, and give it a manifest of the bytes that are on disk now."""
    from ckpttools.checks import manifest_of

    _read_back(staged)
    place, contents = manifest_of(staged, workers=workers)
    return {place.relative_to(staged).as_posix(): contents}


def _read_back(dst: Path) -> None:
    """Header checks on what was just written: an error here is a defect of ckpttools."""
    from ckpttools.checks import verify

    bad = [f for f in verify(dst, quick=True).findings if f.severity == "error"]
    if bad:
        raise written_wrong(dst, bad[0].message, bad[0].id, bad[0].file)
