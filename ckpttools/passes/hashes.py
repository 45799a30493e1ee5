"""xxh3_128 of whole files and of byte ranges in them, from bytes that come in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

import xxhash

from ckpttools.location import Location

Ranges = Mapping[str, tuple[int, int]]  # tensor -> (start, nbytes) within its file


class Sink(Protocol):
    """Wants the bytes `start` to `end` of a file, in order."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    def update(self, block: memoryview, /) -> object: ...


Sinks = Mapping[Location, Sequence[Sink]]


class FileHash:
    """One file's digests: the bytes are given from the first to the last."""

    def __init__(self, size: int, ranges: Ranges, sinks: Sequence[Sink] = ()) -> None:
        self.size, self.at = size, 0
        self._whole = xxhash.xxh3_128()
        self._parts: dict[str, Any] = dict.fromkeys(ranges, "")  # a digest; until it is known, what makes it
        spans: list[tuple[int, int, str | Sink]] = [
            (start, start + nbytes, name) for name, (start, nbytes) in ranges.items()
        ]
        spans += [(sink.start, sink.end, sink) for sink in sinks]
        self._waiting = sorted(spans, key=itemgetter(0), reverse=True)
        self._active: list[tuple[int, int, Any]] = []

    def update(self, block: memoryview) -> None:
        """The next bytes."""
        at, end = self.at, self.at + len(block)
        self._whole.update(block)
        while self._waiting and self._waiting[-1][0] < end:
            start, last, what = self._waiting.pop()
            if isinstance(what, str) and last <= end:  # most of many small tensors
                self._parts[what] = xxhash.xxh3_128_hexdigest(block[start - at : last - at])
                continue
            if isinstance(what, str):
                self._parts[what] = xxhash.xxh3_128()
            self._active.append((start, last, self._parts[what] if isinstance(what, str) else what))
        for start, last, sink in self._active:
            sink.update(block[max(start - at, 0) : last - at])
        self._active = [span for span in self._active if span[1] > end]
        self.at = end

    def digests(self) -> tuple[str, dict[str, str]]:
        """Of the file and of its ranges, hexadecimal."""
        for _, _, what in self._waiting:  # empty, at the end of the file
            if isinstance(what, str):
                self._parts[what] = xxhash.xxh3_128()
        return self._whole.hexdigest(), {
            name: part if isinstance(part, str) else part.hexdigest() for name, part in self._parts.items()
        }
