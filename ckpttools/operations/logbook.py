"""The experiment log: a file that people keep, to which a row is added for each run.

    | date | run | against | changed | result |        FILE.md
    date,run,against,changed,result                   FILE.csv

What is there stays as it is. A run whose row is there already with the same result is not added again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.operations.experiments import Experiment
from ckpttools.stores.files import small_text

COLUMNS = ("date", "run", "against", "changed", "result")
MAX_BYTES = 16 << 20
SHOWN = 20  # changed settings of a row


def append(path: Path, found: Sequence[Experiment], parent: str | None = None) -> list[tuple[str, ...]]:
    """Add a row for each run, the oldest first; returns the rows that are new.

    `parent` is the run to tell the changes against; else the one that the run was started from, else the one
    before it. Raises UsageError where the file is of another kind, or cannot be written.
    """
    text, form = check_log(path), path.suffix.lower()
    ordered = sorted(found, key=lambda each: each.span)
    rows = [_row(each, _parent(each, ordered, parent)) for each in ordered]
    lines = {line.strip() for line in text.splitlines()}
    write = _markdown if form == ".md" else csv_line
    new = [row for row in rows if write(row).strip() not in lines]
    if not new:
        return []
    head = "" if not text or text.endswith("\n") else "\n"
    if not _has_table(text, form):
        below = "| --- | --- | --- | --- | --- |\n"  # a table of Markdown begins after an empty line
        head += (
            ("\n" * bool(text.strip()) if form == ".md" else "") + write(COLUMNS) + below * (form == ".md")
        )
    from ckpttools.execute.small import replace

    # what was there stays: it is the beginning of the text
    replace(path, (text + head + "".join(map(write, new))).encode())
    return new


def _has_table(text: str, form: str) -> bool:
    """Whether what is added goes on a table: the one that ends the text, or whose columns CSV names."""
    lines = [line for line in text.splitlines() if line.strip()]
    if form == ".md":
        return bool(lines) and lines[-1].lstrip().startswith("|")
    return any(line.startswith(csv_line(COLUMNS).strip()) for line in lines)


def check_log(path: Path) -> str:
    """What is in the log so far. Raises UsageError where the file is of another kind."""
    if path.suffix.lower() not in (".md", ".csv"):
        raise UsageError(
            "bad-usage",
            f"'{escape(path)}' is no log's name",
            where="--log",
            why="the suffix says how rows are written",
            hint="use FILE.md or FILE.csv",
        )
    return _text(path)


def _text(path: Path) -> str:
    try:
        return small_text(path, MAX_BYTES)
    except CkptError as error:
        if error.id in ("not-found", "file-empty"):
            return ""
        raise UsageError(
            "log-unreadable",
            f"the log cannot be read: {error.message}",
            where=path,
            why="a row is added to what is there, and nothing of it may be lost",
        ) from None


def _parent(each: Experiment, ordered: Sequence[Experiment], asked: str | None) -> Experiment | None:
    if asked is not None:
        found = next((other for other in ordered if other.tag == asked), None)
        return found if found is not each else None
    if each.parent is not None:
        parts = Path(each.parent).parts
        named = [other for other in ordered if other is not each and other.path.name in parts]
        if named:
            return named[-1]
    at = ordered.index(each)
    return ordered[at - 1] if at else None


def _row(each: Experiment, parent: Experiment | None) -> tuple[str, ...]:
    date = datetime.fromtimestamp(each.span[0] / 1e9, UTC).strftime("%Y-%m-%d") if each.span[0] else "?"
    against = parent.tag if parent is not None else ""
    changed = changes(parent.settings, each.settings) if parent is not None else []
    more = [f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
    return date, each.tag, against, "; ".join((*changed[:SHOWN], *more)), result(each)


def changes(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """`name old -> new` for each setting that differs; ? is what one does not say."""
    names = dict.fromkeys((*new, *old))
    pairs = [(name, old.get(name), new.get(name)) for name in names]
    return [f"{name} {_value(a)} -> {_value(b)}" for name, a, b in pairs if repr(a) != repr(b)]


def _value(value: object) -> str:
    return "?" if value is None else escape(value, 60)


def result(each: Experiment) -> str:
    """How far it came, and its losses, in words."""
    parts = [f"{each.unit} {each.step if each.step is not None else '?'}"]
    for loss in each.losses:
        at = f" at {each.unit} {loss.at:g}" if loss.at is not None else ""
        parts.append(f"{loss.name} {loss.last:.6g}, best {loss.least:.6g}{at}")
    return "; ".join(parts)


def _markdown(row: Sequence[str]) -> str:
    cells = (
        escape(cell, 4000).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in row
    )
    return "| " + " | ".join(cells) + " |\n"


def csv_line(row: Sequence[object]) -> str:
    """One line of CSV. Text that a spreadsheet would take for a formula begins with an apostrophe."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([_cell(value) for value in row])
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    text = "" if value is None else escape(value, 4000)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
