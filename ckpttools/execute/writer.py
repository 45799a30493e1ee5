"""Writing the units of one thread: whole blocks past the page cache, the ends of a unit through it."""

from __future__ import annotations

import os
from functools import partial
from types import TracebackType
from typing import Self

from ckpttools.execute import system
from ckpttools.execute.units import StagedFile
from ckpttools.passes.read import Handles
from ckpttools.stores.direct import BLOCK, aligned, refused

_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Writer:
    """Open descriptors, and a buffer of `nbytes` to make units in."""

    def __init__(self, nbytes: int) -> None:
        self._buffer = aligned(nbytes + BLOCK)
        self._files = Handles(partial(os.open, flags=_FLAGS), os.close)
        self._direct = Handles(partial(os.open, flags=_FLAGS | getattr(os, "O_DIRECT", 0)), os.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._direct.close()
        self._files.close()

    def view(self, start: int, nbytes: int) -> memoryview:
        """Room for bytes that go to `start` of a file: aligned in memory as they will be on disk."""
        return self._buffer[start % BLOCK :][:nbytes]

    def write(self, file: StagedFile, view: memoryview, start: int) -> int:
        """Write a `view` of this writer; the descriptor with which the file may be finished."""
        fd = self._files[file.path]
        done = 0
        if file.direct:
            head = min(-start % BLOCK, len(view))
            self._through_cache(fd, view[:head], start)
            done = head + self._past_cache(file, view[head:], start + head)
        self._through_cache(fd, view[done:], start + done)
        return fd

    def _past_cache(self, file: StagedFile, view: memoryview, start: int) -> int:
        """Write whole blocks; how many bytes of `view` that came to."""
        nbytes = len(view) // BLOCK * BLOCK
        if not nbytes:
            return 0
        try:
            return os.pwrite(self._direct[file.path], view[:nbytes], start)
        except OSError as error:
            if not refused(error):
                raise
            file.direct = False
            return 0

    def _through_cache(self, fd: int, view: memoryview, start: int) -> None:
        if view:
            system.write(fd, view, start)
            system.start_writeback(fd, start, len(view))
