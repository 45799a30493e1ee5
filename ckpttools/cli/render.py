"""How results look: sizes, tables, plans, JSON. Everything that came out of a file is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from tabulate import tabulate

from ckpttools.errors import escape
from ckpttools.plan import Plan
from ckpttools.progress import Progress, progress_bar


def size(nbytes: int) -> str:
    """Bytes for people, in powers of 1000."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError


def count(n: int) -> str:
    return f"{n:,}"


def table(rows: Iterable[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """A plain table; cells are escaped, numbers kept as they are written."""
    cells = [[escape(cell, 400) for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="plain", disable_numparse=True)


def document(value: object) -> None:
    """One JSON document, ASCII only; NaN and Inf, which JSON does not have, as strings."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=True, default=str, allow_nan=False))


def _finite(value: object) -> object:
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


def say(text: str, *, quiet: bool = False) -> None:
    """A message that is not the result: to stderr."""
    if not quiet:
        click.echo(text, err=True)


@contextmanager
def bar(nbytes: int, label: str, *, enabled: bool) -> Iterator[Progress | None]:
    with progress_bar(nbytes, label, enabled=enabled) as progress:
        yield progress


def plan_text(plan: Plan, dst: Path) -> str:
    """What a plan would write."""
    rows = [
        (size(file.nbytes), f"{len(file.segments)} segments", file.path or dst.name) for file in plan.files
    ]
    lines = [f"would write {escape(dst)}: {len(plan.files)} files, {size(plan.nbytes)}", table(rows)]
    return "\n".join([*lines, *notes_text(plan.notes)])


def notes_text(notes: Iterable[str]) -> list[str]:
    return [f"note: {escape(note, 1000)}" for note in notes]


def plan_json(plan: Plan, src: Path, dst: Path, *, dry_run: bool) -> dict[str, object]:
    return {
        "ok": True,
        "dry_run": dry_run,
        "source": str(src),
        "destination": str(dst),
        "nbytes": plan.nbytes,
        "files": [{"path": file.path or dst.name, "nbytes": file.nbytes} for file in plan.files],
        "notes": list(plan.notes),
    }
