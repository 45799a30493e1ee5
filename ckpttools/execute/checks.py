"""The checksums that the sources state for ranges of their bytes, from bytes that are read in any order.

Every byte of a used range counts exactly once, although tied weights are read several times, and some
bytes not at all: a reader *claims* what nobody has claimed before it; what is left at the end are gaps,
which are read for the checksum alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ckpttools.checksums import RangeCrcs
from ckpttools.errors import CkptError
from ckpttools.plan import SourceCheck
from ckpttools.tensors import ByteRange, Source, Zeros


class Claim(NamedTuple):
    """Source bytes whose CRC-32 the reader must add; they are `at` in the bytes that it reads."""

    at: int
    source: ByteRange


class SourceChecks:
    """All checks of a plan. Claims and gaps are made by one thread at a time, and so is `add` called."""

    def __init__(self, checks: Iterable[SourceCheck]) -> None:
        by_path: dict[Path, list[SourceCheck]] = {}
        for check in checks:
            if check.source.nbytes:
                by_path.setdefault(check.source.path, []).append(check)
        self._files = {path: _CheckedFile(found) for path, found in by_path.items()}

    def claims(self, chunks: Iterable[Source]) -> tuple[Claim, ...]:
        """What a reader of these chunks, one after the other, must add."""
        out: list[Claim] = []
        at = 0
        for chunk in chunks:
            if not isinstance(chunk, Zeros) and (file := self._files.get(chunk.path)):
                file.use(chunk.start, chunk.end)
                # A view's bytes come in another order: its ranges are read once more, in order.
                if isinstance(chunk, ByteRange):
                    for start, end in file.claim(chunk.start, chunk.end):
                        out.append(Claim(at + start - chunk.start, ByteRange(chunk.path, start, end - start)))
            at += chunk.nbytes
        return tuple(out)

    def gaps(self, nbytes: int) -> Iterator[ByteRange]:
        """The unclaimed bytes of used ranges, in parts of at most `nbytes`; to come after all `claims`."""
        for path, file in self._files.items():
            for k in sorted(file.used):
                source = file.checks[k].source
                for at in range(source.start, source.end, nbytes):
                    for start, end in file.claim(at, min(at + nbytes, source.end)):
                        yield ByteRange(path, start, end - start)

    def add(self, source: ByteRange, crc: int) -> None:
        """Account for a claim or a gap."""
        self._files[source.path].crcs.add(source.start, source.end, crc)

    def compare(self) -> int:
        """How many checksums are right: all of the used ranges. Raises `CkptError` "checksum" otherwise."""
        for file in self._files.values():
            for k in sorted(file.used):
                if file.crcs.values[k] != file.checks[k].crc32:
                    raise _mismatch(file.checks[k], file.crcs.values[k])
        return sum(len(file.used) for file in self._files.values())


class _CheckedFile:
    """One source file: its checks, which of them are used, and which bytes are claimed."""

    def __init__(self, checks: Sequence[SourceCheck]) -> None:
        self.checks = checks
        self.crcs = RangeCrcs([(check.source.start, check.source.end) for check in checks])
        self.used: set[int] = set()
        self._claimed: list[int] = []  # start, end, start, end ...: disjoint and sorted

    def use(self, start: int, end: int) -> None:
        """Bytes `start` to `end` are needed: the ranges that hold them will be verified."""
        for _, _, owners in self.crcs.spans(start, end):
            self.used.update(owners)

    def claim(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of `start` to `end` that are in a range and not yet claimed, cut as `crcs` needs it."""
        for free_start, free_end in self._claim(start, end):
            for low, high, owners in self.crcs.spans(free_start, free_end):
                if owners:
                    yield low, high

    def _claim(self, start: int, end: int) -> list[tuple[int, int]]:
        i, j = bisect_left(self._claimed, start), bisect_right(self._claimed, end)
        first = [start] if i % 2 == 0 else []  # at an odd place lies the end of a claim that holds it
        last = [end] if j % 2 == 0 else []
        free = first + self._claimed[i:j] + last
        self._claimed[i:j] = first + last
        return list(zip(free[::2], free[1::2], strict=True))


def _mismatch(check: SourceCheck, crc: int) -> CkptError:
    return CkptError(
        "checksum",
        f"{check.what}: CRC-32 is {crc:08x}, the file says {check.crc32:08x}",
        where=check.source.path,
        why=f"bytes {check.source.start} to {check.source.end} have changed since they were saved; "
        "nothing was written",
        hint="copy the file again from where it was written, or fall back to an earlier checkpoint",
    )
