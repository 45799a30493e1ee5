"""The checksums that the sources state for ranges of their bytes, from bytes that are read in any order.

Every byte of a used range counts exactly once, although tied weights are read several times, and some
bytes not at all: a reader *claims* what nobody has claimed before it; what is left at the end are gaps,
which are read for the checksum alone. Writers of parts make the same claims, and each adds what it reads.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ckpttools.checksums import RangeCrcs, Share
from ckpttools.errors import CkptError
from ckpttools.location import Location
from ckpttools.plan import SourceCheck
from ckpttools.tensors import ByteRange, Source, spans


class Claim(NamedTuple):
    """Source bytes whose CRC-32 the reader must add; they are `at` in the bytes that it reads."""

    at: int
    source: ByteRange


class SourceChecks:
    """All checks of a plan. Claims and gaps are made by one thread at a time, and so is `add` called."""

    def __init__(self, checks: Iterable[SourceCheck]) -> None:
        by_path: dict[Location, dict[int, SourceCheck]] = {}
        for number, check in enumerate(checks):
            if check.source.nbytes:
                by_path.setdefault(check.source.path, {})[number] = check
        self._files = {path: _CheckedFile(found) for path, found in by_path.items()}
        self._touched: set[Location] = set()

    def claims(self, chunks: Iterable[Source]) -> tuple[Claim, ...]:
        """What a reader of these chunks, one after the other, must add."""
        out: list[Claim] = []
        at = 0
        for chunk in chunks:
            for span in spans(chunk):
                if file := self._files.get(span.path):
                    file.use(span.start, span.end)
                    # The bytes of views and tiles come in another order: they are read once more, in order.
                    for start, end in file.claim(span.start, span.end) if chunk is span else ():
                        out.append(Claim(at + start - span.start, ByteRange(span.path, start, end - start)))
            at += chunk.nbytes
        return tuple(out)

    def gaps(self, nbytes: int) -> Iterator[ByteRange]:
        """The bytes of used ranges that nobody claims; to come after all `claims`. Writers take turns."""
        for path, file in self._files.items():
            for k in sorted(file.used):
                for at in range(file.checks[k].source.start, file.checks[k].source.end, nbytes):
                    for start, end in file.claim(at, min(at + nbytes, file.checks[k].source.end)):
                        yield ByteRange(path, start, end - start)

    def add(self, source: ByteRange, crc: int) -> None:
        """Account for a claim or a gap."""
        self._files[source.path].crcs.add(source.start, source.end, crc)
        self._touched.add(source.path)

    def take(self) -> dict[int, Share]:
        """What was added since this was called last, by numbers in the plan."""
        out = {
            self._files[path].numbers[k]: share
            for path in self._touched
            for k, share in self._files[path].crcs.take().items()
        }
        self._touched.clear()
        return out

    def shares(self) -> dict[int, Share]:
        """Of the checks whose bytes are used, by their number in the plan: what was added so far."""
        return {
            file.numbers[k]: share
            for file in self._files.values()
            for k, share in enumerate(file.crcs.shares)
            if k in file.used
        }


def compare(checks: Sequence[SourceCheck], parts: Iterable[Mapping[int, Share]]) -> int:
    """How many checksums are right, from the shares of every part: all that are used.

    Raises `CkptError` "checksum" otherwise.
    """
    found: dict[int, Share] = {}
    for shares in parts:
        for number, (crc, nbytes) in shares.items():
            before, done = found.get(number, (0, 0))
            found[number] = before ^ crc, done + nbytes
    for number in sorted(found):
        crc, nbytes = found[number]
        if nbytes != checks[number].source.nbytes:
            raise ValueError("the parts do not make up the plan")
        if crc != checks[number].crc32:
            raise _mismatch(checks[number], crc)
    return len(found)


class _CheckedFile:
    """One source file: its checks, which of them are used, and which bytes are claimed."""

    def __init__(self, checks: Mapping[int, SourceCheck]) -> None:
        self.numbers, self.checks = list(checks), list(checks.values())
        self.crcs = RangeCrcs([(check.source.start, check.source.end) for check in self.checks])
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
