"""Opening files of a checkpoint: regular files only, every read checked, no link followed out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.stores.links import refuse_outside
from ckpttools.tensors import ByteRange

LFS_MAGIC = b"version https://git-lfs"
MAX_ENTRIES = 100_000


class File:
    """A regular file opened for reading at offsets, or a window of one: a file within the file.

    `base` is where it begins in the file at `path`; all other offsets count from there.
    """

    __slots__ = ("_fd", "base", "path", "size")

    def __init__(self, path: Path, fd: int, size: int, base: int = 0) -> None:
        self.path, self._fd, self.size, self.base = path, fd, size, base

    def window(self, start: int, nbytes: int) -> File:
        """The file that lies in these bytes; raises CkptError where this one is shorter."""
        if start < 0 or nbytes < 0 or start + nbytes > self.size:
            raise truncated(self.path, f"bytes {start} to {start + nbytes} of {self.size}")
        return File(self.path, self._fd, nbytes, self.base + start)

    def range(self, start: int, nbytes: int) -> ByteRange:
        """Bytes of this file as a range of the whole file at `path`."""
        return ByteRange(self.path, self.base + start, nbytes)

    def read(self, start: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `start`; raises CkptError where the file is shorter."""
        if start < 0 or nbytes < 0 or start + nbytes > self.size:
            raise truncated(self.path, f"bytes {start} to {start + nbytes} of {self.size}")
        parts: list[bytes] = []
        while nbytes:
            try:
                part = os.pread(self._fd, nbytes, self.base + start)
            except OSError as error:
                raise CkptError(
                    "read-error",
                    f"reading at byte {self.base + start} failed: {escape(error.strerror)}",
                    where=self.path,
                    why="the disk or the network file system could not deliver the bytes",
                    hint="look at the system's log; copy the file from another place",
                ) from None
            if not part:
                raise truncated(self.path, f"byte {start} is past the end")
            parts.append(part)
            start += len(part)
            nbytes -= len(part)
        return b"".join(parts)

    def head(self, nbytes: int) -> bytes:
        """The first bytes, fewer if the file is shorter."""
        return self.read(0, min(nbytes, self.size))


def truncated(path: Path, detail: str) -> CkptError:
    return CkptError(
        "file-truncated",
        f"the file is shorter than its own structure says: {detail}",
        where=path,
        why="an interrupted save, a full disk or a broken copy leaves such files",
        hint="copy the file again from where it was saved, or use an older checkpoint",
    )


@contextmanager
def opened(path: Path) -> Iterator[File]:
    """Open a regular file. Devices, pipes, folders, empty files and git-lfs pointers are refused, and links
    that lead out of the checkpoint.
    """
    refuse_outside(path)
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UsageError("not-found", "there is no such file", where=path, hint="check the path") from None
    except PermissionError:
        raise UsageError(
            "no-permission", "the file may not be read", where=path, hint="ask its owner for read permission"
        ) from None
    except (OSError, ValueError) as error:  # a loop of links, a socket, a name that is too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError("not-readable", f"cannot be opened: {escape(reason)}", where=path) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CkptError(
                "not-a-file",
                "not a regular file",
                where=path,
                why="a checkpoint is made of regular files; devices and pipes are never read",
            )
        file = File(path, fd, info.st_size)
        if file.size == 0:
            raise CkptError(
                "file-empty",
                "the file has 0 bytes",
                where=path,
                why="a save that was killed or ran out of disk leaves such files; it restores nothing",
                hint="copy it again from where it was saved, or use an older checkpoint",
            )
        if file.size < 1024 and file.head(len(LFS_MAGIC)) == LFS_MAGIC:
            raise CkptError(
                "lfs-pointer",
                "a git-lfs pointer, not the file itself",
                where=path,
                why="the repository was cloned without its large files",
                hint="run `git lfs pull` in the repository that it came from",
            )
        yield file
    finally:
        os.close(fd)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name. Raises UsageError where it cannot be listed."""
    found: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as scan:
            for entry in scan:
                found.append(entry)
                if len(found) > MAX_ENTRIES:
                    raise UsageError("too-many-files", f"more than {MAX_ENTRIES} entries", where=folder)
    except PermissionError:
        raise UsageError(
            "no-permission",
            "the folder may not be listed",
            where=folder,
            hint="ask its owner for read and execute permission",
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            "not-found", "there is no such folder", where=folder, hint="check the path"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError("not-readable", f"cannot be listed: {escape(reason)}", where=folder) from None
    return sorted(found, key=lambda entry: entry.name)


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one; a link that leads in circles is not."""
    try:
        return entry.is_file()
    except OSError:
        return False


def is_folder(entry: os.DirEntry[str]) -> bool:
    """The same for folders."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def small_text(path: Path, limit: int) -> str:
    """A text file of at most `limit` bytes, such as `latest`."""
    with opened(path) as file:
        if file.size > limit:
            raise CkptError(
                "text-too-long", f"{file.size} bytes where at most {limit} make sense", where=path
            )
        raw = file.head(limit)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CkptError("text-damaged", "the file is not UTF-8 text", where=path) from None


def plain_name(name: str, where: Path) -> str:
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


def size_of(path: Path) -> int:
    """The size of a file that is going to be read or copied."""
    refuse_outside(path)
    return path.stat().st_size
