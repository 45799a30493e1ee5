"""An archive to be written, as segments of an output file."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ckpttools.containers.archive.layout import ALIGNMENT, DESCRIPTOR_MAGIC, end_of, entry_of, header_of, wide
from ckpttools.plan import Crc32, Literal, Segment

_MAGIC = Literal(struct.pack("<I", DESCRIPTOR_MAGIC))
_CRC = 16  # the checksum's place in a directory entry


def archive_segments(root: str, records: Sequence[tuple[str, Sequence[Segment]]]) -> tuple[Segment, ...]:
    """A torch zip with these records, in this order; checksums are computed while it is written.

    What lies between two of them is one segment: there may be hundreds of thousands.
    """
    out: list[Segment] = []
    central: list[Segment] = []
    after, entries = bytearray(), bytearray()  # what follows the last of either, and has no segment yet
    at = ncentral = 0
    for name, data in records:
        offset = at
        raw = f"{root}/{name}".encode()
        nbytes = sum(segment.nbytes for segment in data)
        header = header_of(raw, offset, nbytes, ALIGNMENT)
        entry = entry_of(raw, nbytes, offset, 0)
        at += len(header) + nbytes
        ncentral += len(entry)
        if not nbytes:
            after += header
            entries += entry
            continue
        out.append(Literal(bytes(after + header)))
        first = len(out)
        out += data
        crc = Crc32(first, len(out))
        after = bytearray(struct.pack("<QQ" if wide(nbytes, offset) else "<II", nbytes, nbytes))
        out += [_MAGIC, crc]
        at += 8 + len(after)
        central += [Literal(bytes(entries + entry[:_CRC])), crc]
        entries = bytearray(entry[_CRC + 4 :])
    end = end_of(len(records), ncentral, at)
    return (*out, Literal(bytes(after)), *central, Literal(bytes(entries + end)))
