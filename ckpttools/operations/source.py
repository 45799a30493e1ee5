"""Which checkpoint a path means, and which one to name where it means several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckpttools import runs
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.formats import Source, locate
from ckpttools.formats.locate import Several


def find(path: str | Path, tag: str | None = None) -> Source:
    """The one checkpoint at or below a path. Raises UsageError naming the newest where there are several."""
    path = Path(path)
    try:
        return locate(path, tag)
    except Several:
        found = runs.find(path)
    except UsageError as error:
        if error.id != "not-a-checkpoint" or not path.is_dir():
            raise
        found = runs.find(path)
        if not found:
            raise
    if len(found) == 1:
        inner = locate(found[0].path)
        return replace(inner, how=f"the only checkpoint below {escape(path)}; {inner.how}")
    raise _several(path, found)


def _several(path: Path, found: tuple[runs.Entry, ...]) -> Several:
    try:
        newest = runs.newest(path)
        hint = "\n".join((f"name one of them; the newest is {escape(newest.path)}", *newest.notes))
    except CkptError as error:  # a pointer that leads nowhere
        hint = f"name one of them; {error.message}: {error.hint}"
    names = [f"{escape(entry.path.relative_to(path))}{f' ({entry.at})' * bool(entry.at)}" for entry in found]
    return Several(path, [entry.path for entry in found], names, hint)
