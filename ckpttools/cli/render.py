"""How results look: sizes, tables, plans, JSON. Everything that came out of a file is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckpttools.errors import counted, escape
from ckpttools.progress import Progress, progress_bar

if TYPE_CHECKING:
    from ckpttools.execute.spread import Spread
    from ckpttools.operations.writing import Written


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
    """A plain table, without padding at the end of a line; cells are escaped."""
    cells = [[escape(cell, 400).strip() for cell in row] for row in rows]
    widths = [width(header) + 2 for header in headers]
    for row in cells:
        widths += [0] * (len(row) - len(widths))
        for i, cell in enumerate(row):
            widths[i] = max(widths[i], width(cell))
    lines = [headers, *cells] if headers else cells
    return "\n".join(
        "  ".join(cell + " " * (widths[i] - width(cell)) for i, cell in enumerate(line)).rstrip()
        for line in lines
    )


def width(text: str) -> int:
    """Columns of a terminal: Chinese characters take two."""
    if text.isascii():
        return len(text)
    from unicodedata import east_asian_width

    return sum(1 + (east_asian_width(c) in "WF") for c in text)


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


def bars(*, enabled: bool) -> Callable[[int, str], AbstractContextManager[Progress | None]]:
    """Progress bars as the library asks for them."""
    return partial(progress_bar, enabled=enabled)


def notes_text(notes: Iterable[str]) -> list[str]:
    return [f"note: {escape(note, 1000)}" for note in notes]


def written(done: Written, options: Mapping[str, Any], about: Mapping[str, object] | None = None) -> None:
    """What a command wrote or, with --dry-run, would write. `about` is what it adds to --json."""
    plan, quiet = done.plan, options["quiet"]
    if done.share is not None:
        _share(done.share, done, quiet=quiet)
        return
    if options["as_json"]:
        document(_written_json(done) | dict(about or {}))
        return
    if done.seconds is None:
        rows = [
            (size(f.nbytes), counted(len(f.segments), "segment"), _name(f.path, done)) for f in plan.files
        ]
        click.echo(
            f"would write {escape(done.destination)}: {counted(len(rows), 'file')}, {size(plan.nbytes)}"
        )
        click.echo("\n".join([table(rows), *notes_text(done.notes)]))
        return
    for note in notes_text(done.notes):
        say(note, quiet=quiet)
    rate = size(int(plan.nbytes / max(done.seconds, 1e-9)))
    say(
        f"wrote {counted(len(plan.files), 'file')}, {size(plan.nbytes)} in {done.seconds:.1f} s ({rate}/s); "
        f"{counted(done.checked or 0, 'source checksum')} verified",
        quiet=quiet,
    )
    for step in done.next:
        say(f"next: {escape(step, 4000)}", quiet=quiet)
    click.echo(escape(done.destination, 4000))


def _share(share: Spread, done: Written, *, quiet: bool) -> None:
    """Of a worker that did not finish the destination: stdout belongs to the one that does."""
    left = f"; {len(share.waiting)} pieces are left to other workers" if share.waiting else ""
    say(f"wrote {share.pieces} pieces of {escape(done.destination)}{left}", quiet=quiet)


def _written_json(done: Written) -> dict[str, object]:
    files = [{"path": _name(file.path, done), "nbytes": file.nbytes} for file in done.plan.files]
    shown: dict[str, object] = {
        "ok": True,
        "dry_run": done.seconds is None,
        "source": str(done.source),
        "destination": str(done.destination),
        "nbytes": done.plan.nbytes,
        "files": files,
        "notes": list(done.notes),
        "next": list(done.next),
    }
    if done.seconds is not None:
        shown |= {"seconds": round(done.seconds, 3), "checksums_verified": done.checked}
    return shown


def _name(path: str, done: Written) -> str:
    return path or done.destination.name
