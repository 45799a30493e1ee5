"""A small file that is drawn or printed, not a checkpoint: written whole, and never over somebody's own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpttools.errors import UsageError, escape
from ckpttools.execute import execute
from ckpttools.execute.preflight import exists, refuse_special
from ckpttools.plan import Literal, OutputFile, Plan

# how pictures that ckpt draws begin
PICTURES = (b'<svg xmlns="http://www.w3.org/2000/svg" class="chart"', b"\x89PNG", b"%PDF")


def check_place(dst: Path, ours: Sequence[bytes], *, force: bool) -> None:
    """Raises UsageError where nothing may be written at `dst`: found out before anything is read. With
    `force` a file that begins as one of `ours` is replaced, or an empty one.
    """
    if not dst.parent.is_dir():
        raise UsageError("not-found", "there is no such folder", where=dst.parent, hint="make it first")
    if os.path.lexists(dst):
        if not force:
            raise exists(dst)
        _replaceable(dst, ours)


def put(dst: Path, data: bytes, ours: Sequence[bytes] = PICTURES, *, force: bool = False) -> None:
    """Write a whole file, by one rename. Raises UsageError as `check_place` does, or where it cannot be."""
    execute(_plan(data), dst, force=force, replaces=lambda: _replaceable(dst, ours))


def replace(dst: Path, data: bytes, *, unseen: bool = False) -> None:
    """Write a whole file whose name is ours alone (a manifest, a pin), by one rename, over an older one.
    With `unseen` the folder keeps its times: some frameworks choose by them.
    """
    times = dst.parent.stat() if unseen else None
    execute(_plan(data), dst, force=True)
    if times is not None:
        with suppress(OSError):  # in a folder of somebody else
            os.utime(dst.parent, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """One process at a time: the others wait. The file stays, for who locks next."""
    with place.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _plan(data: bytes) -> Plan:
    return Plan(files=(OutputFile(path="", segments=(Literal(data),)),))


def _replaceable(dst: Path, ours: Sequence[bytes]) -> str:
    refuse_special(dst)
    if dst.is_file():
        with dst.open("rb") as file:
            head = file.read(400)
        if not head or any(head.startswith(start) for start in ours):
            return f"{escape(dst)}, a file of {dst.stat().st_size} bytes"
    raise UsageError(
        "not-replaced",
        "--force does not replace this: it is nothing that ckpt has drawn",
        where=dst,
        why="what is there would be lost",
        hint="choose another destination, or move away what is there",
    )
