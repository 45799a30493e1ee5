"""The operating system: calls that `os` lacks or that need care, and its errors in words for people."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpttools.errors import UsageError

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_SYNC_FILE_RANGE_WRITE = 2
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_libc = ctypes.CDLL(None, use_errno=True)


class WriteFailed(UsageError):
    """The system refused to write."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """An `OSError` of the destination as a `UsageError`; it happened at `path`."""
    try:
        yield
    except OSError as error:
        id, hint = {
            errno.ENOSPC: ("no-space", "free some space, or choose a destination on another file system"),
            errno.EDQUOT: ("no-space", "free some of your quota, or choose another file system"),
            errno.EFBIG: ("file-too-big", "raise the limit (ulimit -f), or write smaller files"),
            errno.EACCES: ("no-permission", "choose a folder that you may write to"),
            errno.EPERM: ("no-permission", "choose a folder that you may write to"),
            errno.EROFS: ("no-permission", "choose a destination on a writable file system"),
        }.get(error.errno or 0, ("write-failed", "check the disk, or choose another file system"))
        raise WriteFailed(
            id,
            f"cannot write: {error.strerror or error}",
            where=path,
            why="the destination is as it was; what had been written was removed",
            hint=hint,
        ) from error


def write(fd: int, view: memoryview, start: int) -> None:
    """All of `view`, at byte `start`."""
    done = 0
    while done < len(view):
        n = os.pwrite(fd, view[done:], start + done)
        if not n:
            raise OSError(errno.EIO, "a write wrote nothing")
        done += n


def fsync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def fsync_folder(path: Path) -> None:
    _fsync_at(path, os.O_RDONLY | os.O_DIRECTORY)


def fsync_file(path: Path) -> None:
    _fsync_at(path, os.O_WRONLY | os.O_NOFOLLOW)


def _fsync_at(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def renameat2(old: Path, new: Path, flags: int) -> bool:
    at_fdcwd = -100
    return _call("renameat2", at_fdcwd, os.fsencode(old), at_fdcwd, os.fsencode(new), ctypes.c_uint(flags))


def fallocate(fd: int, nbytes: int) -> bool:
    """Not `os.posix_fallocate`: where the file system cannot, glibc writes to every block."""
    return _call("fallocate", fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))


def start_writeback(fd: int, start: int, nbytes: int) -> None:
    """Begin to write to disk now, so that the fsync at the end finds little to do."""
    _call("sync_file_range", fd, ctypes.c_int64(start), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


def _call(name: str, *args: object) -> bool:
    """False where this system or file system does not have the call; raises `OSError` as `os` does."""
    function = getattr(_libc, name, None)
    if function is None:
        return False
    while function(*args):
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
