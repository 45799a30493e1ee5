"""A plan: the output files of a command as data, before a byte is written.

Each file is a sequence of segments without holes or overlaps; offsets are prefix sums. `--dry-run`
prints a plan, `execute` carries it out; nothing in between can make them differ.
"""

from __future__ import annotations

from functools import cached_property

from msgspec import Struct

from ckpttools.location import Location
from ckpttools.tensors import ByteRange, Cast, Chunk, Literal, Mean, Source, Strided, Tiles, Zeros


class Sealed(Struct, frozen=True):
    """Bytes that no file holds, with checksums among them: an archive's headers and its directory.

    A hole (at, first, last) is four zeros at `at`, for the CRC-32, little-endian, of segments `first` to
    `last` (exclusive) of the same file. Holes are in order and do not meet.
    """

    data: bytes
    holes: tuple[tuple[int, int, int], ...]

    @property
    def nbytes(self) -> int:
        return len(self.data)


__all__ = [
    "Literal",
    "OutputFile",
    "Part",
    "Plan",
    "Sealed",
    "Segment",
    "SourceCheck",
    "copy_file",
    "reads",
]
Segment = Chunk | Sealed


class OutputFile(Struct, frozen=True, kw_only=True, dict=True):
    """One file. `path` is relative to the destination, with `/`; "" is the destination itself.

    The checksums of `Sealed` segments are of segments that are not `Sealed` themselves.
    """

    path: str
    segments: tuple[Segment, ...]

    @cached_property  # of hundreds of thousands of segments, asked for again and again
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)


class SourceCheck(Struct, frozen=True):
    """A checksum that the source states for one of its byte ranges; `what` names it for a message."""

    source: ByteRange
    crc32: int
    what: str


class Part(Struct, frozen=True, kw_only=True):
    """One writer's share of a plan: the work that begins in bytes `start` to `end` of its files, one file
    after another. The parts of all ranks of a world make the plan.
    """

    rank: int
    world: int
    start: int
    end: int


class Plan(Struct, frozen=True, kw_only=True):
    """What a command will write.

    `notes` name everything that is dropped, recomputed or rounded. `checks` are verified while the
    sources are copied: every byte of a checked range that is used is also checked.
    """

    files: tuple[OutputFile, ...]
    notes: tuple[str, ...] = ()
    checks: tuple[SourceCheck, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def is_single_file(self) -> bool:
        return len(self.files) == 1 and self.files[0].path == ""

    def part(self, rank: int, world: int) -> Part:
        """What writer `rank` of `world` writes: the same in every process that makes this plan."""
        if not 0 <= rank < world:
            raise ValueError(f"writer {rank} of {world}")
        end = self.nbytes * (rank + 1) // world + (rank == world - 1)  # the last one takes empty files too
        return Part(rank=rank, world=world, start=self.nbytes * rank // world, end=end)


def copy_file(source: Location, path: str, nbytes: int) -> OutputFile:
    """An output file that is a copy of a whole source file of `nbytes` bytes."""
    return OutputFile(path=path, segments=(ByteRange(source, 0, nbytes),) if nbytes else ())


def reads(segment: Segment) -> tuple[Source, ...]:
    """The chunks that a segment copies, casts or takes the mean of, in order."""
    match segment:
        case Cast():
            return segment.chunks
        case Mean():
            return tuple(chunk for term in segment.terms for chunk in term.chunks)
        case ByteRange() | Strided() | Tiles() | Zeros():
            return (segment,)
        case Literal() | Sealed():  # no bytes of a source
            return ()
