"""Where a file or folder is: a path of this machine, or a key in a store.

Both are small values with the same pure operations (`/`, name, suffix, parent, relative_to, str). What is
there, and what it holds, only `ckpttools.stores` says.
"""

from __future__ import annotations

from collections.abc import Iterable
from errno import EINVAL
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple, Protocol

from msgspec import Struct


class Stat(NamedTuple):
    """What is at a place. Two equal ones mean that nobody wrote to it in between."""

    kind: str  # "file", "folder" or "other"
    size: int
    mtime_ns: int
    tag: object  # the inode, a version, an ETag


class Entry(Protocol):
    """What a listing says of one name; an os.DirEntry is one."""

    @property
    def name(self) -> str: ...
    def is_file(self, *, follow_symlinks: bool = True) -> bool: ...
    def is_dir(self, *, follow_symlinks: bool = True) -> bool: ...
    def is_symlink(self) -> bool: ...


class Listed(Struct, frozen=True):
    """A name in a store that has no links."""

    name: str
    folder: bool

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return not self.folder

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self.folder

    def is_symlink(self) -> bool:
        return False


class NotAFile(OSError):
    """What is there is a folder, a device or a pipe."""

    def __init__(self) -> None:
        super().__init__(EINVAL, "not a regular file")


class Handle(Protocol):
    """A file opened for reading at offsets. What fails raises OSError; at the end there are fewer bytes."""

    @property
    def size(self) -> int: ...
    @property
    def far(self) -> bool:
        """Whether each read takes so long that it should be few and large ones."""

    def read(self, start: int, nbytes: int) -> bytes: ...
    def readinto(self, view: memoryview, start: int) -> int: ...
    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """These (start, nbytes) are going to be read."""

    def reads(self, ranges: Iterable[tuple[int, int]]) -> int:
        """How many requests that would take."""

    def close(self) -> None: ...


class Store(Protocol):
    """Where bytes lie. Every method raises OSError as the system's calls do."""

    @property
    def name(self) -> str:
        """What stands in front of a key where a place is shown: `s3://bucket`."""

    def stat(self, key: str) -> Stat: ...
    def list(self, key: str) -> Iterable[Entry]: ...
    def open(self, key: str, *, known: bool = False) -> Handle:
        """Raises CkptError where the store's policy keeps the file from being read; not for a `known` one,
        which was opened before.
        """

    def admit(self, key: str) -> None:
        """Raise as `open` does, without opening."""


class Stored(Struct, frozen=True):
    """A key in a store; keys are absolute, `/run/model.pt`."""

    store: Store
    key: PurePosixPath

    def __str__(self) -> str:
        return f"{self.store.name}{self.key}"

    def __repr__(self) -> str:
        """The same in every process: plans are compared by it."""
        return f"Stored({str(self)!r})"

    def __lt__(self, other: Stored) -> bool:
        return (self.store.name, self.key) < (other.store.name, other.key)

    def __truediv__(self, name: str | PurePath) -> Stored:
        return Stored(self.store, self.key / name)

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def suffix(self) -> str:
        return self.key.suffix

    @property
    def stem(self) -> str:
        return self.key.stem

    @property
    def parts(self) -> tuple[str, ...]:
        return self.key.parts

    @property
    def parent(self) -> Stored:
        return Stored(self.store, self.key.parent)

    @property
    def parents(self) -> tuple[Stored, ...]:
        return tuple(Stored(self.store, key) for key in self.key.parents)

    def with_name(self, name: str) -> Stored:
        return Stored(self.store, self.key.with_name(name))

    def absolute(self) -> Stored:
        return self


Location = Path | Stored


def below(path: Location, folder: Location) -> str:
    """The path from a folder, with `/`; raises ValueError where it does not lie below."""
    if isinstance(path, Stored) and isinstance(folder, Stored) and path.store == folder.store:
        return path.key.relative_to(folder.key).as_posix()
    if isinstance(path, Stored) or isinstance(folder, Stored):
        raise ValueError(f"{path} does not lie below {folder}")
    return path.relative_to(folder).as_posix()
