"""What came of an object of a store so far."""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from typing import Any

from ckpttools.location import Stat


class Fetched:
    """One version of an object and the parts of it that were fetched, as (start, bytes), by their starts."""

    def __init__(self, size: int, etag: str | None, at: float) -> None:
        self.size, self.etag, self.at = size, etag, at
        self.parts: list[tuple[int, bytes]] = []
        self._lock = threading.Lock()

    def add(self, start: int, data: bytes) -> None:
        with self._lock:
            insort(self.parts, (start, data), key=_start)

    def find(self, start: int, nbytes: int) -> bytes | None:
        with self._lock:
            for i in range(bisect_right(self.parts, start, key=_start) - 1, -1, -1):
                low, data = self.parts[i]
                if start + nbytes <= low + len(data):
                    return data[start - low : start - low + nbytes]
        return None


def _start(part: tuple[int, bytes]) -> int:
    return part[0]


def stat_of(meta: Any) -> Stat:
    # a listing has milliseconds, an answer for one object has not
    return Stat("file", meta["size"], int(meta["last_modified"].timestamp()) * 10**9, tag_of(meta["e_tag"]))


def tag_of(etag: str | None) -> str | None:
    """To be compared: Azure's listings leave the quotes out."""
    return etag and etag.strip('"')
