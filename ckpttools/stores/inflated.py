"""Deflated records of an archive as files: inflated while they are read, in memory that does not grow.

Whoever unpacks and repacks a torch file with an ordinary zip program gets these; torch loads them. Reading
goes forward; a read before the last one goes on from the nearest of a few places that are remembered.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from errno import ENOENT, ENOTDIR
from typing import NamedTuple

from ckpttools.errors import CkptError
from ckpttools.location import Entry, Handle, Location, Stat

_STEP = 1 << 18  # compressed bytes that are read at once
_PLACES = 64  # that are remembered of a record, 50 kB each


class Deflated(NamedTuple):
    """A record: `nbytes` compressed bytes from `start` of the file, `size` bytes when inflated."""

    start: int
    nbytes: int
    size: int


class InflatedFile:
    """The bytes of one record."""

    far = False  # it is read from front to back

    __slots__ = ("_apart", "_at", "_damaged", "_file", "_inflate", "_places", "_read", "_record", "size")

    def __init__(self, file: Handle, record: Deflated, damaged: Callable[[], CkptError]) -> None:
        self._file, self._record, self._damaged, self.size = file, record, damaged, record.size
        self._inflate = zlib.decompressobj(-15)
        self._at = self._read = 0
        self._apart = max(self.size // _PLACES, 4 * _STEP)
        self._places = [(0, 0, self._inflate.copy())]

    def _back(self, start: int) -> None:
        """To the last remembered place that is not behind `start`."""
        place = bisect_right(self._places, start, key=lambda place: place[0]) - 1
        self._at, self._read, inflate = self._places[place]
        self._inflate = inflate.copy()

    def _remember(self) -> None:
        if self._at >= self._places[-1][0] + self._apart:
            self._places.append((self._at, self._read, self._inflate.copy()))

    def read(self, start: int, nbytes: int) -> bytes:
        buffer = bytearray(min(nbytes, max(self.size - start, 0)))
        return bytes(buffer[: self.readinto(memoryview(buffer), start)])

    def readinto(self, view: memoryview, start: int) -> int:
        if start < self._at:
            self._back(start)
        while self._at < start:
            self._next(min(start - self._at, _STEP))
        part = self._next(min(len(view), _STEP, max(self.size - start, 0)))
        view[: len(part)] = part
        return len(part)

    def _next(self, limit: int) -> bytes:
        """The next bytes, at most `limit` of them; none only for a limit of 0."""
        part = b""
        try:
            while limit and not part:
                rest = self._inflate.unconsumed_tail
                if not rest:
                    rest = self._file.read(
                        self._record.start + self._read, min(_STEP, self._record.nbytes - self._read)
                    )
                    self._read += len(rest)
                part = self._inflate.decompress(rest, limit)
                if not part and (self._inflate.eof or not rest):
                    raise self._damaged()  # it ends before its size
        except zlib.error:
            raise self._damaged() from None
        self._at += len(part)
        self._remember()
        return part

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Nothing can be read before what lies in front of it."""

    def reads(self, ranges: Iterable[tuple[int, int]]) -> int:
        return 0

    def close(self) -> None:
        self._file.close()


class Inflated:
    """The deflated records of the archive at `path` by key, `/data/0`."""

    def __init__(
        self,
        path: Location,
        records: Mapping[str, Deflated],
        *,
        opening: Callable[[Location], Handle],
        stat: Callable[[Location], Stat],
        damaged: Callable[[str], CkptError],
    ) -> None:
        self.name = f"{path}:"
        self._path, self._records = path, records
        self._opening, self._stat, self._damaged = opening, stat, damaged

    def _record(self, key: str) -> Deflated:
        try:
            return self._records[key]
        except KeyError:
            raise FileNotFoundError(ENOENT, "the archive has no such record", key) from None

    def stat(self, key: str) -> Stat:
        found = self._stat(self._path)
        return Stat("file", self._record(key).size, found.mtime_ns, (found.tag, found.size))

    def list(self, key: str) -> Iterable[Entry]:
        raise NotADirectoryError(ENOTDIR, "not a folder", key)

    def open(self, key: str, *, known: bool = False) -> InflatedFile:
        record = self._record(key)
        return InflatedFile(self._opening(self._path), record, lambda: self._damaged(key))

    def admit(self, key: str) -> None:
        """Whoever made this store has opened the archive."""
