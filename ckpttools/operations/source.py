"""Which checkpoint a path means, and which one to name where it means several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.formats import Source, locate
from ckpttools.formats.locate import Several
from ckpttools.location import Location, below
from ckpttools.stores.files import is_folder, named

if TYPE_CHECKING:
    from ckpttools import runs


def find(path: str | Location, tag: str | None = None) -> Source:
    """The one checkpoint at or below a path. Raises UsageError naming the newest where there are several."""
    path = named(path)
    try:
        return locate(path, tag)
    except Several:
        found = _found(path)
    except UsageError as error:
        if error.id != "not-a-checkpoint" or not is_folder(path):
            raise
        found = _found(path)
        if not found:
            raise
    if len(found) == 1:
        inner = locate(found[0].path)
        return replace(inner, how=f"the only checkpoint below {escape(path)}; {inner.how}")
    raise _several(path, found)


def tags_for(paths: Sequence[Location], tags: Sequence[str]) -> list[str | None]:
    """Which tag is for which path: one tag is for every folder, several are in the order of the paths, ""
    for none. Raises UsageError where they are not as many."""
    if len(tags) <= 1:
        return [tags[0] if tags and is_folder(path) else None for path in paths]
    if len(tags) != len(paths):
        raise UsageError(
            "bad-usage",
            f"{len(tags)} tags for {len(paths)} checkpoints",
            where="--tag",
            why="which of them belongs to which checkpoint is not known",
            hint="give --tag once for all, or once for each in their order ('' for one without tags)",
        )
    return [tag or None for tag in tags]


def _found(path: Location) -> tuple[runs.Entry, ...]:
    from ckpttools import runs  # not needed where the path says which one

    return runs.find(path)


def _several(path: Location, found: tuple[runs.Entry, ...]) -> Several:
    from ckpttools import runs

    try:
        newest = runs.newest(path)
        hint = "\n".join((f"name one of them; the newest is {escape(newest.path)}", *newest.notes))
    except CkptError as error:  # a pointer that leads nowhere
        hint = f"name one of them; {error.message}: {error.hint}"
    names = [f"{escape(below(entry.path, path))}{f' ({entry.at})' * bool(entry.at)}" for entry in found]
    return Several(path, [entry.path for entry in found], names, hint)
