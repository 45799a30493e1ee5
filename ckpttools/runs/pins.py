"""Pins: a small file beside a checkpoint that says who keeps it, since when and why.

    .ckpt-pin-NAME.json    {"format": "ckpttools-pin", "version": 1, "name", "who", "when", "reason"}

It is no part of the checkpoint, so no manifest and no digest knows of it. A pin on a folder keeps all that is
in it. That the file is there is enough: one that cannot be read keeps its checkpoint, too.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from ckpttools.containers import jsons
from ckpttools.errors import CkptError, UsageError
from ckpttools.location import Location, Stored
from ckpttools.siblings import PIN, THEIRS
from ckpttools.stores.files import entries, exists, is_link, local, walk
from ckpttools.stores.links import resolved

FORMAT, VERSION = "ckpttools-pin", 1


class Pin(Struct, frozen=True, kw_only=True):
    """`when` is UTC, as ISO 8601 has it; None where the file does not say."""

    path: Location
    who: str | None = None
    when: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        parts = (f"by {self.who}" if self.who else "", f"on {self.when[:10]}" if self.when else "")
        said = " ".join(("pinned", *filter(None, parts)))
        return f"{said}: {self.reason}" if self.reason else said


def dump(pin: Pin) -> bytes:
    """The file's contents."""
    values = {"name": resolved(pin.path).name, "who": pin.who, "when": pin.when, "reason": pin.reason}
    return json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=1).encode() + b"\n"


def place(path: Path) -> Path:
    """Where the note lies that keeps a checkpoint: beside it, or beside a framework's own folder."""
    return _place(resolved(path))


def _place(whole: Path) -> Path:
    if whole.parent.name in THEIRS:
        return whole.parent.with_name(f"{PIN}{whole.parent.name}-{whole.name}.json")
    return whole.with_name(f"{PIN}{whole.name}.json")


def kept_by(note: Path) -> tuple[Path, ...]:
    """What a note can keep: it lies beside a checkpoint, or beside the framework's own folder with it.

    Raises UsageError for one that names nothing.
    """
    name = note.name.removeprefix(PIN).removesuffix(".json")
    if name in ("", ".", ".."):
        raise UsageError(
            "pinned",
            "a pin names no checkpoint",
            where=note,
            why="what it is to keep cannot be told, so nothing around it is replaced or removed",
            hint=f"rename it to {PIN}NAME.json, or remove it if nothing was meant",
        )
    held = [
        note.with_name(each) / name.removeprefix(f"{each}-") for each in THEIRS if name.startswith(f"{each}-")
    ]
    return tuple(path for path in (*held, note.with_name(name)) if exists(path)) or (note.with_name(name),)


def inside(folder: Path) -> Iterator[Path]:
    """What is pinned in a folder, whose notes may lie beside it."""
    whole = resolved(folder)
    notes = [local(path) for path, entry in walk(whole) if entry.name.startswith(PIN)]
    if whole.name in THEIRS:
        notes += [whole.parent / e.name for e in entries(whole.parent) if e.name.startswith(PIN)]
    yield from (path for note in notes for path in kept_by(note) if whole in path.parents)


def of(path: Location) -> Pin | None:
    """The pin on exactly this path."""
    return None if isinstance(path, Stored) else _of(resolved(path))


def _of(path: Path) -> Pin | None:
    """The same of a path without links."""
    if not path.name:
        return None  # nothing lies beside the root
    note = _place(path)
    try:
        if not (exists(note) or is_link(note)):
            return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None  # no file can be called so
        raise
    try:
        values = jsons.read(note)
    except CkptError:
        return Pin(path=path)
    said = {key: found for key in ("who", "when", "reason") if isinstance(found := values.get(key), str)}
    return Pin(path=path, **said)


def above(path: Location, top: Location) -> Pin | None:
    """The pin on a path, or on a folder that it lies in, up to `top`."""
    if isinstance(path, Stored) or isinstance(top, Stored):
        return None  # nothing is deleted there
    path, top = resolved(path), resolved(top)
    for folder in (path, *path.parents):
        found = _of(folder)
        if found is not None or folder == top or top not in folder.parents:
            return found
    return None
