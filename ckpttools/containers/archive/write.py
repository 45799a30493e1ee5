"""An archive to be written, as segments of an output file."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ckpttools.containers.archive.layout import ALIGNMENT, DESCRIPTOR_MAGIC, end_of, entry_of, header_of, wide
from ckpttools.plan import Crc32, Literal, Segment


def archive_segments(root: str, records: Sequence[tuple[str, Sequence[Segment]]]) -> tuple[Segment, ...]:
    """A torch zip with these records, in this order; checksums are computed while it is written."""
    out: list[Segment] = []
    central: list[Segment] = []
    at = 0
    for name, data in records:
        raw = f"{root}/{name}".encode()
        nbytes = sum(segment.nbytes for segment in data)
        header = header_of(raw, at, nbytes, ALIGNMENT)
        out.append(Literal(header))
        first = len(out)
        out += data
        crc = Crc32(first, len(out))
        end = at + len(header) + nbytes
        if nbytes:
            sizes = struct.pack("<QQ" if wide(nbytes, at) else "<II", nbytes, nbytes)
            out += [Literal(struct.pack("<I", DESCRIPTOR_MAGIC)), crc, Literal(sizes)]
            end += 8 + len(sizes)
        entry = entry_of(raw, nbytes, at, 0)
        cut = 16  # the checksum's place in an entry
        central += [Literal(entry[:cut]), crc, Literal(entry[cut + 4 :])] if nbytes else [Literal(entry)]
        at = end
    ncentral = sum(segment.nbytes for segment in central)
    return (*out, *central, Literal(end_of(len(records), ncentral, at)))
