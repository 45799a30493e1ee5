"""Whether every byte around the data is one that torch writes, and whether the records belong together."""

from __future__ import annotations

import struct

from ckpttools.containers.archive.layout import (
    ALIGNMENT,
    DESCRIPTOR_MAGIC,
    SERIALIZATION_ID,
    Archive,
    descriptor_of,
    end_of,
    entry_of,
    header_of,
)
from ckpttools.errors import escape
from ckpttools.stores.files import File

HEADER = 24 + 30 + 256 + 64  # bytes around which a record ends and the next one's data begins


def unexplained(file: File, archive: Archive) -> list[str] | None:
    """Where the bytes around the data differ from what torch (and this module) writes; None for a file
    of some other writer, such as Python's zipfile.

    torch leaves no choice in them: each header, padding, descriptor, directory entry and end record
    follows from the records' names, order, sizes and checksums. No reader looks at all of these bytes, so a
    difference is damage that loading does not show.
    """
    alignment = _alignment(file, archive)
    problems: list[str] = []
    central: list[bytes] = []
    odd = 0
    file.prefetch((r.end - 24, HEADER) for r in archive.records.values())  # a descriptor, the next header
    for record in archive.records.values():
        shown = escape(record.name)
        raw = f"{archive.root}/{record.name}".encode()
        header = header_of(raw, record.header, record.nbytes, alignment)
        if record.start - record.header != len(header) or file.read(record.header, len(header)) != header:
            odd += 1
            problems.append(f"the header or padding of record '{shown}'")
        descriptor = descriptor_of(record.nbytes, record.header, record.crc32)
        at = record.start + record.nbytes
        read = file.read(at, min(len(descriptor), record.end - at)) if archive.predicted else descriptor
        if record.method or record.end - at != len(descriptor) or read != descriptor:
            problems.append(f"the descriptor of record '{shown}'")
        central.append(entry_of(raw, record.nbytes, record.header, record.crc32))
    if odd * 2 > len(archive.records) and not archive.predicted:
        return None
    start = max(record.end for record in archive.records.values())
    at = start
    for record, entry in zip(archive.records.values(), central, strict=True):
        if at + len(entry) > file.size or file.read(at, len(entry)) != entry:
            problems.append(f"the directory entry of record '{escape(record.name)}'")
        at += len(entry)
    tail = end_of(len(central), sum(map(len, central)), start)
    if at + len(tail) != file.size or file.read(at, len(tail)) != tail:
        problems.append("the end record")
    return problems


def belong_together(file: File, archive: Archive) -> bool:
    """Whether the records are those that were saved together, by torch's serialization id (torch >= 2.1).

    Its last 20 digits fold the checksums of all records in file order, so that even an edit whose own
    checksum was mended shows. True where there is no id. Source: PyTorchStreamWriter::writeSerializationId
    and ostream_write_func in caffe2/serialize/inline_container.cc.
    """
    stated = archive.records.get(SERIALIZATION_ID)
    if stated is None or stated.nbytes != 40 or archive.unchecked:
        return True
    fold = 0
    for name, record in archive.records.items():
        if name == SERIALIZATION_ID or not record.nbytes:
            continue
        fold ^= record.crc32 + 0x9E3779B9 + (fold << 6) + (fold >> 2) & 0xFFFFFFFFFFFFFFFF
    if file.read(stated.start, 40)[20:] == b"%020d" % fold:
        return True
    # torch takes data that starts like a descriptor for one, and folds it in too: then nothing can be said
    descriptor = struct.pack("<I", DESCRIPTOR_MAGIC)
    return any(
        record.nbytes >= 8 and file.read(record.start, 4) == descriptor for record in archive.records.values()
    )


def _alignment(file: File, archive: Archive) -> int:
    # torch.utils.serialization.config.save.storage_alignment
    record = archive.records.get(".storage_alignment")
    text = file.read(record.start, record.nbytes) if record and record.nbytes <= 8 else b""
    return int(text) if text.isdigit() and int(text) else ALIGNMENT
