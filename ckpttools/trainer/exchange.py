"""The folder through which the launcher and its ranks speak: among the temporary files, gone with the run.

A launcher that is killed cannot remove it: the next one does. Whether a run still goes on is told by a lock,
which the kernel takes away with the last process that holds it, torchrun after a killed launcher included.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX, LOCK = "ckpt-train-", "running.lock"


@contextlib.contextmanager
def exchange() -> Iterator[tuple[Path, int]]:
    """A new folder, and the file descriptor of its lock, which torchrun shall hold, too."""
    _clear_up()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        with (folder / f"{LOCK}.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{LOCK}.new").rename(folder / LOCK)  # never seen without its holder
            yield folder, lock.fileno()


def _clear_up() -> None:
    """Remove the folders of this user's runs that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, in use, or gone meanwhile
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
