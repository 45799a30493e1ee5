"""One page of a run, of runs side by side, or of two checkpoints, for somebody who has only a browser."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import Struct

from ckpttools import pages
from ckpttools.errors import UsageError
from ckpttools.execute.small import check_place, put
from ckpttools.location import Location
from ckpttools.operations import report_pair, report_runs
from ckpttools.operations.writing import Bar
from ckpttools.pages.sections import Section
from ckpttools.stores.files import named

OURS = (pages.SIGNATURE.encode(),)


class Report(Struct, frozen=True, kw_only=True):
    """The page that was written. `damaged` counts the checkpoints in it that are, as far as was looked."""

    destination: Path
    nbytes: int
    damaged: int


def report(
    *paths: str | Location,
    dst: str | Path,
    keep_last: int = 3,
    new_bs: int | None = None,
    verify: bool = False,
    force: bool = False,
    workers: int = 0,
    bar: Bar | None = None,
) -> Report:
    """Write a page of the runs below one path, or of two checkpoints, as one HTML file.

    It shows what `ckpt prune --keep-last` would remove, and the learning rate that is to come, with `new_bs`
    also that of a rebase. With `verify` every byte of every checkpoint is read; else headers, and the newest.
    Raises UsageError where there is no checkpoint, or `dst` is somebody's own.

    >>> report("fixtures/hf-trainer/plain", dst=out / "run.html").damaged
    0
    """
    dst = Path(dst)
    pages.check()
    given = [named(path) for path in paths]
    check_place(dst, OURS, force=force)
    match given:
        case [folder]:
            made = report_runs.gather(
                folder, keep_last=keep_last, new_bs=new_bs, verify=verify, workers=workers, bar=bar
            )
        case [left, right]:
            made = report_pair.gather(left, right, workers=workers, bar=bar)
        case _:
            raise UsageError(
                "bad-usage",
                f"a report is of one folder, or of two checkpoints, and {len(given)} paths are given",
                where=", ".join(map(str, given)),
                why="more than two are not set side by side layer by layer",
                hint="ckpt report RUN, ckpt report RUNS, or ckpt report A B",
            )
    sections = [section for section in made.sections if not section.is_empty]
    html = pages.render(
        {
            "title": made.title,
            "path": ", ".join(map(str, given)),
            "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "how": made.how,
            "nav": [(section.id, section.title) for section in sections],
            "sections": list(map(_plain, sections)),
        }
    )
    put(dst, html, OURS, force=force)
    return Report(destination=dst, nbytes=len(html), damaged=made.damaged)


def _plain(section: Section) -> dict[str, Any]:
    return {name: getattr(section, name) for name in ("id", "title", "text", "charts", "tables", "findings")}
