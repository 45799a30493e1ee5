"""Removing what is ours or was named: one file, or a checkpoint that must never be left in half.

A checkpoint gets another name first (siblings.GONE), by one rename, and is deleted then: whatever ends the
program in between leaves no half checkpoint, and the next run finds the rest by its name.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def remove_file(path: Path) -> None:
    """One file, which need not be there. Raises OSError."""
    path.unlink(missing_ok=True)


def remove_whole(path: Path, beside: Path | None = None) -> None:
    """A file, or a folder with all that is in it; `beside` is a small file that goes first, and comes back
    where the other cannot go. Raises OSError; what is left then has its name of GONE.
    """
    first = _renamed(beside) if beside is not None and beside.exists() else None
    try:
        gone = _renamed(path)
    except FileNotFoundError:  # another process was faster: nothing is left that it would speak of
        if first is not None:
            with suppress(OSError):
                delete(first)
        raise
    except OSError:
        if beside is not None and first is not None:
            first.rename(beside)
        raise
    delete(gone)
    if first is not None:
        delete(first)


def _renamed(path: Path) -> Path:
    gone = path.with_name(f".ckpt-gone-{os.urandom(8).hex()}")
    path.rename(gone)
    return gone


def delete(path: Path) -> None:
    """What already has its name of GONE; another process may be faster. Raises OSError."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def freed(files: Iterable[Path]) -> int:
    """The bytes that removing these files frees: of each whose every hard link goes."""
    names: Counter[tuple[int, int]] = Counter()
    found: dict[tuple[int, int], os.stat_result] = {}
    for file in files:
        with suppress(OSError):
            here = file.lstat()
            names[here.st_dev, here.st_ino] += 1
            found[here.st_dev, here.st_ino] = here
    return sum(here.st_size for key, here in found.items() if names[key] >= here.st_nlink)
