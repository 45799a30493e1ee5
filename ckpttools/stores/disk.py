"""The file systems of this machine: regular files only, no link followed out of the checkpoint."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ckpttools.location import Entry, NotAFile, Stat
from ckpttools.stores.direct import SMALLEST_READ, open_cold, read, refused
from ckpttools.stores.links import refuse_outside

_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}


class DiskFile:
    """A regular file by its descriptor. Large reads of what is not in the page cache go past it."""

    __slots__ = ("_cold", "_fd", "_path", "size")
    far = False

    def __init__(self, path: str, fd: int, size: int) -> None:
        self._path, self._fd, self.size = path, fd, size
        self._cold: int | None = None  # a descriptor for direct reads, -1 where there are none

    def read(self, start: int, nbytes: int) -> bytes:
        return os.pread(self._fd, nbytes, start)

    def readinto(self, view: memoryview, start: int) -> int:
        return (len(view) >= SMALLEST_READ and self._past_cache(view, start)) or os.preadv(
            self._fd, [view], start
        )

    def _past_cache(self, view: memoryview, start: int) -> int:
        """How much was read so; 0 also where the file is small or cached, or the file system refuses."""
        if self._cold is None:
            self._cold = open_cold(self._path)
        if self._cold < 0:
            return 0
        try:
            return read(self._cold, view, start)
        except OSError as error:
            if not refused(error):
                raise
            os.close(self._cold)
            self._cold = -1
            return 0

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """They are near."""

    def reads(self, ranges: Iterable[tuple[int, int]]) -> int:
        return 0

    def handed_over(self) -> BinaryIO:
        """As Python's own file, which closes it; for a library that maps it."""
        return os.fdopen(self._fd, "rb")

    def close(self) -> None:
        os.close(self._fd)
        if self._cold is not None and self._cold >= 0:
            os.close(self._cold)


class Disk:
    """Keys are paths, relative ones too."""

    name = ""

    def stat(self, key: str) -> Stat:
        found = os.stat(key)  # noqa: PTH116  a key, not always a path
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "other")
        return Stat(kind, found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino))

    def list(self, key: str) -> Iterator[Entry]:
        with os.scandir(key) as entries:
            yield from entries

    def open(self, key: str, *, known: bool = False) -> DiskFile:
        if not known:
            self.admit(key)
        # O_NONBLOCK: opening a named pipe must not wait for a writer
        fd = os.open(key, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise NotAFile
        except BaseException:
            os.close(fd)
            raise
        return DiskFile(key, fd, found.st_size)

    def admit(self, key: str) -> None:
        refuse_outside(Path(key))


DISK = Disk()


def binary(path: Path) -> BinaryIO:
    """A regular file of which a range is known already. Raises OSError, NotAFile."""
    return DISK.open(str(path), known=True).handed_over()


def look(path: Path) -> os.stat_result:
    """What a path itself is, a link included, for whoever replaces or deletes it. Raises OSError."""
    return os.lstat(path)
