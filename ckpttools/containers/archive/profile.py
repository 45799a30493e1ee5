"""Whether every byte around the data is one that torch writes, and whether the records belong together."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ckpttools.containers.archive.layout import (
    DESCRIPTOR_MAGIC,
    SERIALIZATION_ID,
    STORAGE_ALIGNMENT,
    Archive,
    Record,
    descriptor_of,
    end_of,
    entry_of,
    header_of,
)
from ckpttools.containers.archive.read import prove, stated_alignment
from ckpttools.errors import CkptError, escape
from ckpttools.stores.files import File


def unexplained(file: File, archive: Archive) -> list[str] | None:
    """Where the bytes around the data differ from what torch (and this module) writes; None for a file
    of some other writer, such as Python's zipfile.

    torch leaves no choice in them: each header, padding, descriptor, directory entry and end record
    follows from the records' names, order, sizes and checksums. No reader looks at all of these bytes, so a
    difference is damage that loading does not show.
    """
    alignment = stated_alignment(file, archive.records.get(STORAGE_ALIGNMENT))
    problems: list[str] = []
    of_directory: list[str] = []
    odd = 0
    is_torch = False
    start = max(record.end for record in archive.records.values())
    directory, at = file.read(start, file.size - start), 0
    for record, (header, after) in zip(archive.records.values(), _around(file, archive), strict=True):
        raw = f"{archive.root}/{record.name}".encode()
        if header != header_of(raw, record.header, record.nbytes, alignment):
            odd += 1
            problems.append(f"the header or padding of record '{escape(record.name)}'")
            is_torch = is_torch or not _is_proven(file, archive, record)
        if record.method or (
            record.nbytes and after != descriptor_of(record.nbytes, record.header, record.crc32)
        ):
            problems.append(f"the descriptor of record '{escape(record.name)}'")
        entry = entry_of(raw, record.nbytes, record.header, record.crc32)
        if not directory.startswith(entry, at):
            of_directory.append(f"the directory entry of record '{escape(record.name)}'")
        at += len(entry)
    if odd * 2 > len(archive.records) and not is_torch:
        return None
    problems += of_directory
    if directory[at:] != end_of(len(archive.records), at, start):
        problems.append("the end record")
    return problems


def _around(file: File, archive: Archive) -> Iterator[tuple[bytes, bytes]]:
    """The bytes before and after the data of each record, as many as torch writes; a few reads for many."""
    pieces = file.pieces(around(archive))
    yield from zip(pieces, pieces, strict=True)


def around(archive: Archive) -> list[tuple[int, int]]:
    """Where the bytes before and after each record's data lie: (start, nbytes), in ascending order."""
    wanted: list[tuple[int, int]] = []
    for record in archive.records.values():
        wanted += [
            (record.header, record.start - record.header),
            (record.start + record.nbytes, record.end - record.start - record.nbytes),
        ]
    return wanted


def _is_proven(file: File, archive: Archive, record: Record) -> bool:
    """Whether a header that torch does not write says what was taken for granted: another writer's."""
    try:
        prove(file, archive, record)
    except CkptError:
        return False
    return True


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
