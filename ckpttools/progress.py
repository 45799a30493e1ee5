"""Progress of long work: bytes, rate and time left, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told about finished work; calls come from one thread at a time."""

    def update(self, nbytes: int, /) -> object:
        """`nbytes` more bytes are done."""


@contextmanager
def progress_bar(total_nbytes: int, label: str, *, enabled: bool = True) -> Iterator[Progress | None]:
    """A bar on stderr while the block runs; None when disabled or where stderr is not a terminal."""
    if not enabled or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm  # 0.1 s to import, and of no use to a script

    with tqdm(
        total=total_nbytes, desc=label, unit="B", unit_scale=True, leave=False, dynamic_ncols=True
    ) as bar:
        yield bar
