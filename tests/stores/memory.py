"""A store that holds its files in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from errno import ENOENT, ENOTDIR
from pathlib import PurePosixPath

from ckpttools.location import Entry, Listed, NotAFile, Stat, Stored


class MemoryFile:
    """The bytes of one file."""

    __slots__ = ("_data", "far", "size")

    def __init__(self, data: bytes, far: bool) -> None:
        self._data, self.size, self.far = data, len(data), far

    def read(self, start: int, nbytes: int) -> bytes:
        return self._data[start : start + nbytes]

    def readinto(self, view: memoryview, start: int) -> int:
        part = self._data[start : start + len(view)]
        view[: len(part)] = part
        return len(part)

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """They are here."""

    def reads(self, ranges: Iterable[tuple[int, int]]) -> int:
        return 0

    def close(self) -> None:
        """There is nothing to close."""


class Memory:
    """Files by key, `/run/model.pt`; folders are what the keys say. Two stores are never equal. `far`: to be
    read as a store whose every read takes long.
    """

    def __init__(self, files: Mapping[str, bytes], name: str = "memory:", *, far: bool = False) -> None:
        self.name, self.far = name, far
        self.files = dict(files)

    @property
    def root(self) -> Stored:
        return Stored(self, PurePosixPath("/"))

    def stat(self, key: str) -> Stat:
        data = self.files.get(key)
        if data is not None:
            return Stat("file", len(data), 0, id(data))
        if not any(self._below(key)):
            raise FileNotFoundError(ENOENT, "there is no such key", key)
        return Stat("folder", 0, 0, key)

    def list(self, key: str) -> Iterable[Entry]:
        if key in self.files:
            raise NotADirectoryError(ENOTDIR, "not a folder", key)
        found = {name: bool(deeper) for name, _, deeper in (n.partition("/") for n in self._below(key))}
        if not found:
            raise FileNotFoundError(ENOENT, "there is no such key", key)
        return [Listed(name, folder) for name, folder in found.items()]

    def open(self, key: str, *, known: bool = False) -> MemoryFile:
        if self.stat(key).kind == "folder":
            raise NotAFile
        return MemoryFile(self.files[key], self.far)

    def admit(self, key: str) -> None:
        """There are no links."""

    def _below(self, key: str) -> Iterator[str]:
        folder = key.rstrip("/") + "/"
        return (name[len(folder) :] for name in self.files if name.startswith(folder))
