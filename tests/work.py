"""Work counted instead of seconds: lines of Python that run, the same number on every machine.

A clock says how busy a machine is. Whether a reader's work is bounded by what it reads is said by the number
of lines that it executes, which neither other processes nor a slower processor change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TooMuch(BaseException):
    """More lines than a test allows; nothing that the code under test catches."""


class Lines:
    """How many lines ran."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    def trace(self, _frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            self.count += 1
            if self.count > self.limit:
                raise TooMuch(f"more than {self.limit} lines")
        return self.trace


@contextmanager
def at_most(lines: int) -> Iterator[Lines]:
    """Fail, by stopping it, where the block runs more lines of Python than that in this thread."""
    counted, before = Lines(lines), sys.gettrace()
    sys.settrace(counted.trace)
    try:
        yield counted
    finally:
        sys.settrace(before)
