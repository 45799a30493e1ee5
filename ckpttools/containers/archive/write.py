"""An archive to be written, as segments of an output file."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from ckpttools.containers.archive.layout import ALIGNMENT, CRC_AT, descriptor_of, end_of, entry_of, header_of
from ckpttools.plan import Literal, Sealed, Segment

_SHORT = 4096  # data up to this length becomes one with what is around it


def archive_segments(root: str, records: Sequence[tuple[str, Sequence[Segment]]]) -> tuple[Segment, ...]:
    """A torch zip with these records, in this order; checksums of what is not known yet are computed while it
    is written.

    What lies between the data of two records is one segment: there may be hundreds of thousands.
    """
    out: list[Segment] = []
    own, holes = bytearray(), list[tuple[int, int, int]]()  # what follows the last segment
    directory, sums = bytearray(), list[tuple[int, int, int]]()
    at = 0
    for name, data in records:
        raw = f"{root}/{name}".encode()
        nbytes = sum(segment.nbytes for segment in data)
        header = header_of(raw, at, nbytes, ALIGNMENT)
        own += header
        crc = 0
        known = [segment.data for segment in data if isinstance(segment, Literal)]
        if len(known) == len(data):
            for each in known:
                crc = zlib.crc32(each, crc)
        if len(known) == len(data) and nbytes <= _SHORT:
            own += b"".join(known)
        elif nbytes:
            out.append(_segment(own, holes))
            own, holes = bytearray(), []
            first = len(out)
            out += data
            if len(known) < len(data):
                holes.append((4, first, len(out)))
                sums.append((len(directory) + CRC_AT, first, len(out)))
        descriptor = descriptor_of(nbytes, at, crc)
        own += descriptor
        directory += entry_of(raw, nbytes, at, crc)
        at += len(header) + nbytes + len(descriptor)
    holes += [(len(own) + place, first, last) for place, first, last in sums]
    own += directory
    own += end_of(len(records), len(directory), at)
    return (*out, _segment(own, holes))


def _segment(data: bytearray, holes: list[tuple[int, int, int]]) -> Segment:
    return Sealed(bytes(data), tuple(holes)) if holes else Literal(bytes(data))
