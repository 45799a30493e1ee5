"""Direct I/O: large reads and writes that go past the page cache, in whole blocks between aligned addresses.

A copy of 4 GB through the page cache costs seconds of system time and drives out what a training job beside
it has there; past it costs tenths. Whether a file can be opened so is the file system's choice: where it
refuses, everything goes through the cache, without a word.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress

BLOCK = 4096  # bytes: a multiple of what every disk of today asks for, and the page of the cache
SMALLEST_FILE = 16 * 1024 * 1024  # below, the cache is as fast
SMALLEST_READ = 128 * 1024  # below, reading ahead is worth more
_SAMPLES = 16


def aligned(nbytes: int) -> memoryview:
    """A buffer that begins at a multiple of `BLOCK`; its pages are taken as they are touched."""
    return memoryview(mmap.mmap(-1, nbytes))


def refused(error: OSError) -> bool:
    """Whether the file system said that it does not do this, rather than that something went wrong."""
    return error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def is_cached(fd: int, size: int) -> bool:
    """Whether most of a file lies in the page cache, by a few bytes of it; True where nobody can tell.

    The kernel may fetch the page of a byte that was not there: the next look is at others.
    """
    found = 0
    with suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # a look must not start to read ahead
    from random import randrange  # which loads OpenSSL, for files that are large

    try:
        byte = bytearray(1)
        for _ in range(_SAMPLES):
            try:
                found += os.preadv(fd, [byte], randrange(size), os.RWF_NOWAIT)
            except BlockingIOError:
                continue
    except OSError:
        return True
    finally:
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
    return 2 * found >= _SAMPLES


def open_cold(path: str | os.PathLike[str]) -> int:
    """A descriptor for `read`; -1 where the file is small, cached, or the file system refuses."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    if not (hasattr(os, "O_DIRECT") and hasattr(os, "RWF_NOWAIT")):
        return -1
    fd = os.open(path, flags)
    try:
        size = os.fstat(fd).st_size
        if size < SMALLEST_FILE or is_cached(fd, size):
            return -1
    finally:
        os.close(fd)
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if refused(error):
            return -1
        raise


class _Blocks(threading.local):
    """Buffers of each thread."""

    view = memoryview(b"")
    edges = memoryview(b"")


_blocks = _Blocks()


def read(fd: int, view: memoryview, start: int) -> int:
    """Fill `view` from byte `start` of the file, as far as it goes; how much was read.

    Where the view is part of an `aligned` buffer and lies in memory as the bytes do on disk, the blocks go
    there at once; all others by way of a buffer of the thread.
    """
    if isinstance(view.obj, mmap.mmap) and len(view) >= 2 * BLOCK:
        try:
            return _straight(fd, view, start)
        except OSError as error:
            if not refused(error):  # whether for the place in memory, the other way tells
                raise
    return _bounce(fd, view, start)


def _straight(fd: int, view: memoryview, start: int) -> int:
    """One call: the blocks that the view begins and ends within go to pages of the thread."""
    shift, head = start % BLOCK, -start % BLOCK
    whole = (len(view) - head) // BLOCK * BLOCK
    tail = len(view) - head - whole
    if not _blocks.edges:
        _blocks.edges = aligned(2 * BLOCK)
    first, last = _blocks.edges[:BLOCK], _blocks.edges[BLOCK:]
    parts = [*([first] if head else []), view[head : head + whole], *([last] if tail else [])]
    got = max(min(os.preadv(fd, parts, start - shift) - shift, len(view)), 0)
    view[:head] = first[shift:] if head else b""
    if tail:
        view[head + whole :] = last[:tail]
    return got


def _bounce(fd: int, view: memoryview, start: int) -> int:
    shift = start % BLOCK
    nbytes = -(-(shift + len(view)) // BLOCK) * BLOCK
    if len(_blocks.view) < nbytes:
        _blocks.view = aligned(nbytes)
    got = os.preadv(fd, [_blocks.view[:nbytes]], start - shift)
    got = max(min(got - shift, len(view)), 0)
    view[:got] = _blocks.view[shift : shift + got]
    return got
