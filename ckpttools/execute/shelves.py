"""Where a ledger's small files lie: a folder that all workers see, or below a key of a store. A file gets its
name when it is complete.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from ckpttools.execute import system
from ckpttools.location import Location, Stored

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Shelf(Protocol):
    """Every method raises OSError."""

    @property
    def pause(self) -> float:
        """Seconds from one look to the next, of those who wait."""

    def make(self) -> None: ...
    def remove(self) -> None:
        """With all that is in it, as far as it can be removed."""

    def names(self) -> set[str]:
        """Empty where it is gone."""

    def get(self, name: str) -> bytes: ...
    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """Without `replace`, one that is there stays."""

    def delete(self, name: str) -> None: ...


def shelf(place: Location) -> Shelf:
    if not isinstance(place, Stored):
        return _OnDisk(place)
    from ckpttools.execute.sending import StoredShelf

    return StoredShelf(place)


def errors_at(place: Location) -> AbstractContextManager[None]:
    """An `OSError` of what is written at a place as a `UsageError`."""
    if not isinstance(place, Stored):
        return system.write_errors(place)
    from ckpttools.execute.sending import store_errors

    return store_errors(place)


class _OnDisk:
    pause = 0.2

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def names(self) -> set[str]:
        with suppress(FileNotFoundError):
            return {path.name for path in self._folder.iterdir() if path.name[0] != "."}
        return set()

    def get(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        new = self._folder / f".{secrets.token_hex(8)}"
        with new.open("xb") as file:
            file.write(data)
            file.flush()
            system.fsync(file.fileno())
        try:
            if not replace:
                with suppress(FileExistsError):
                    os.link(new, self._folder / name)
                new.unlink()
                return
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        new.replace(self._folder / name)

    def delete(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)
