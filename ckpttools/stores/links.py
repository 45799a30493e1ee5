"""Symbolic links inside a checkpoint: followed within it and into a Hugging Face cache, else refused.

A link that leads elsewhere makes a command read, and a reshard copy, files that nobody named: a checkpoint
from somebody else must not choose what is read on this machine. The path that the user gives may itself be
a link, and so may anything above it.

Hugging Face's cache keeps each file once and links to it (`huggingface_hub`, file_download.py):

    models--ORG--NAME/blobs/HASH
    models--ORG--NAME/snapshots/REVISION/NAME -> ../../blobs/HASH     deeper for names with folders

A file may be read where it lies in the folder that its path names. What more belongs to the checkpoint, and
whether the user wants every link followed, only the caller knows: `within` and `followed` carry it to where
files are opened, in this context and the threads that `in_threads` starts. Who forgets them is refused more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from ckpttools.errors import CkptError, escape
from ckpttools.location import Location, Stored
from ckpttools.stores.once import is_kept, kept

_places: ContextVar[tuple[str, ...] | None] = ContextVar("places", default=None)
Place = TypeVar("Place", Path, Stored, Location)
_follow: ContextVar[bool] = ContextVar("follow", default=False)


@contextmanager
def within(path: Location) -> Iterator[None]:
    """Files opened meanwhile belong to the checkpoint at `path`, which the user named.

    For a single file, what lies beside it may be read too. Other stores have no links.
    """
    if isinstance(path, Stored):
        yield
        return
    real = _real(path)
    places = None if real is None else (real,) if path.is_dir() else (real, _real(path.parent) or real)
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


@contextmanager
def inside(path: Location) -> Iterator[None]:
    """`within`, unless a caller has said already what is read: for readers of folders in folders."""
    if _places.get():
        yield
        return
    with within(path):
        yield


@contextmanager
def followed() -> Iterator[None]:
    """Every link is followed meanwhile, wherever it leads: the user said so."""
    token = _follow.set(True)
    try:
        yield
    finally:
        _follow.reset(token)


def leads_out(path: Location) -> bool:
    """Whether the file or folder at `path` really lies outside of the checkpoint that is being read."""
    if isinstance(path, Stored) or _follow.get():
        return False
    real = _real(path)
    if real is None:  # opening it will say what is wrong
        return False
    places = _places.get() or (_real(path.parent) or "",)
    return not any(_below(real, place) for place in places) and not _is_blob(path, real)


def refuse_outside(path: Location) -> None:
    """Raise CkptError where the path leads out of the checkpoint."""
    if not isinstance(path, Stored) and leads_out(path):
        raise CkptError(
            "link-outside",
            f"a symbolic link leads out of the checkpoint, to {escape(_real(path) or '', 500)}",
            where=path,
            why="a checkpoint from elsewhere must not choose which files of this machine are read",
            hint="if you made the link, add --follow-symlinks; else copy the file itself into the folder",
        )


def resolved(path: Place) -> Place:
    """Where a place really is, every link followed. Raises OSError or RuntimeError for links in circles."""
    if isinstance(path, Stored):
        return path
    real = _real(path) if is_kept() else None
    return path.resolve() if real is None else Path(real)


def absolute(path: Place) -> Place:
    """A place from the root on, with its links as they are; a path's start may be the working directory."""
    return path.absolute()


def _real(path: Path) -> str | None:
    """Where a path really is; None where that cannot be said."""
    if not is_kept() or path.name in ("", ".."):
        return _whole(path)
    folder = _whole(path.parent)
    try:
        alone = folder is None or path.is_symlink()
    except OSError:
        return None
    return _whole(path) if alone else f"{'' if folder == '/' else folder}/{path.name}"


@kept
def _whole(path: Path) -> str | None:
    try:
        return str(path.resolve())
    except (OSError, RuntimeError, ValueError):  # also for links in circles
        return None


def _below(real: str, place: str) -> bool:
    return real == place or real.startswith(place.rstrip("/") + "/")


def _is_blob(path: Path, real: str) -> bool:
    """Whether a file of a snapshot in Hugging Face's cache leads to that cache's own blobs."""
    folder = _real(path.parent) or ""
    cache, snapshots, _ = folder.rpartition("/snapshots/")
    return bool(snapshots) and real.rpartition("/")[0] == f"{cache}/blobs"


def plain_name(name: str, where: Location) -> str:
    """A file name that came out of a file: a plain base name, or CkptError."""
    if (
        not name
        or name in (".", "..")
        or len(name) > 255
        or any(c in "/\\" or not c.isprintable() for c in name)
    ):
        raise CkptError(
            "name-unsafe",
            f"'{escape(name)}' is not a plain file name",
            where=where,
            why="a name inside a checkpoint must not lead out of its folder",
        )
    return name
