"""Records in the file: local headers held against the directory, small records read."""

from __future__ import annotations

import struct
import zlib

from ckpttools.containers.archive.directory import damaged, read_directory
from ckpttools.containers.archive.layout import (
    ALIGNMENT,
    BIG,
    DESCRIPTOR_MAGIC,
    HAS_DESCRIPTOR,
    LOCAL,
    LOCAL_MAGIC,
    Archive,
    Record,
    descriptor_of,
    flags_of,
    header_of,
)
from ckpttools.errors import CkptError, escape
from ckpttools.stores.files import File


def is_zip(head: bytes) -> bool:
    return head[:4] == b"PK\x03\x04"


def read_archive(file: File) -> Archive:
    """Read the directory and every local header; the data is not read.

    Refuses anything that torch's writer or Python's zipfile would not produce: overlaps, gaps,
    duplicates, two roots, bytes after the end, headers that contradict the directory.
    """
    entries, directory = read_directory(file)
    entries.sort(key=lambda e: e[1])
    ends = [*(entry[1] for entry in entries[1:]), directory]
    predicted = False
    records: dict[str, Record] = {}
    roots: dict[str, None] = {}
    lowered: set[str] = set()
    at = 0
    for (name, offset, flags, method, crc32, nbytes, size), end in zip(entries, ends, strict=True):
        if offset != at:
            raise damaged(file.path, f"record '{escape(name)}' starts at byte {offset}, expected {at}")
        guess = _predicted(name, offset, flags, method, crc32, nbytes, end) if file.far else None
        predicted |= guess is not None
        record = guess or _record(file, name, offset, flags, method, crc32, nbytes, size, directory)
        root, slash, rest = name.partition("/")
        if not slash or not rest:
            raise damaged(file.path, f"record '{escape(name)}' has no archive root in its name")
        roots[root] = None
        if rest.lower() in lowered:  # torch's own reader looks names up without regard to case
            raise damaged(file.path, f"two records are named '{escape(name)}'")
        lowered.add(rest.lower())
        records[rest] = record
        at = record.end
    if at != directory:
        raise damaged(file.path, f"{directory - at} bytes before the directory belong to no record")
    if len(roots) != 1:
        raise damaged(file.path, f"the archive has {len(roots)} roots instead of one")
    root = next(iter(roots))
    return Archive(
        path=file.path, size=file.size, root=root, records=records, base=file.base, predicted=predicted
    )


def _predicted(
    name: str, offset: int, flags: int, method: int, crc32: int, nbytes: int, end: int
) -> Record | None:
    """A record as torch lays it out, where that fits up to the next one. Nothing of it was read: verify holds
    the headers against it, and the checksum of the data holds at its place only.
    """
    start = offset + len(header_of(name.encode(), offset, nbytes, ALIGNMENT))
    if method or flags != flags_of(nbytes) or (nbytes and not crc32):
        return None
    if start + nbytes + len(descriptor_of(nbytes, offset, crc32)) != end:
        return None
    return Record(
        name=name.partition("/")[2],
        header=offset,
        start=start,
        nbytes=nbytes,
        size=nbytes,
        crc32=crc32,
        method=0,
        flags=flags,
        end=end,
    )


def _record(
    file: File,
    name: str,
    offset: int,
    flags: int,
    method: int,
    crc32: int,
    nbytes: int,
    size: int,
    limit: int,
) -> Record:
    if offset + LOCAL.size > limit:
        raise damaged(file.path, f"record '{escape(name)}' lies outside the archive")
    raw = name.encode()
    head = file.read(offset, min(LOCAL.size + len(raw), limit - offset))
    magic, _, lflags, lmethod, _, _, lcrc32, lnbytes, lsize, nname, nextra = LOCAL.unpack_from(head)
    if magic != LOCAL_MAGIC or nname != len(raw) or head[LOCAL.size :] != raw:
        raise damaged(file.path, f"the header of record '{escape(name)}' contradicts the directory")
    if (lflags, lmethod) != (flags, method):
        raise damaged(file.path, f"the header of record '{escape(name)}' contradicts the directory")
    start = offset + LOCAL.size + nname + nextra
    end = start + nbytes
    if end > limit:
        raise damaged(file.path, f"record '{escape(name)}' reaches past the directory")
    if flags & HAS_DESCRIPTOR:
        if lcrc32 not in (0, crc32) or lnbytes not in (0, nbytes, BIG) or lsize not in (0, size, BIG):
            raise damaged(file.path, f"the header of record '{escape(name)}' contradicts the directory")
        end = _descriptor(file, name, end, crc32, nbytes, size, limit)
    elif lcrc32 != crc32 or lnbytes not in (nbytes, BIG) or lsize not in (size, BIG):
        raise damaged(file.path, f"the header of record '{escape(name)}' contradicts the directory")
    return Record(
        name=name.partition("/")[2],
        header=offset,
        start=start,
        nbytes=nbytes,
        size=size,
        crc32=crc32,
        method=method,
        flags=flags,
        end=end,
    )


def _descriptor(file: File, name: str, at: int, crc32: int, nbytes: int, size: int, limit: int) -> int:
    """Check the data descriptor at `at`; returns where it ends."""
    tail = file.read(at, min(24, limit - at))
    for form in ("<IIQQ", "<IIII"):
        n = struct.calcsize(form)
        if len(tail) >= n and struct.unpack_from(form, tail) == (DESCRIPTOR_MAGIC, crc32, nbytes, size):
            return at + n
    raise damaged(file.path, f"the descriptor after record '{escape(name)}' contradicts the directory")


def read_record(file: File, record: Record, limit: int) -> bytes:
    """A small record's data, its checksum verified; inflated if it was deflated."""
    if record.size > limit or record.nbytes > limit:
        raise damaged(
            file.path, f"record '{escape(record.name)}' has {record.size} bytes, over the limit of {limit}"
        )
    data = file.read(record.start, record.nbytes)
    if record.method == 8:
        inflate = zlib.decompressobj(-15)
        try:
            data = inflate.decompress(data, record.size + 1)
        except zlib.error:
            raise damaged(file.path, f"record '{escape(record.name)}' cannot be inflated") from None
        if len(data) != record.size or not inflate.eof:
            raise damaged(file.path, f"record '{escape(record.name)}' inflates to another size")
    if record.crc32 and zlib.crc32(data) != record.crc32:  # 0: perhaps saved without checksums
        raise CkptError(
            "checksum",
            f"record '{escape(record.name)}' does not match its checksum",
            where=file.path,
            why="its bytes changed after they were saved",
            hint="copy the file again from where it was saved, or use an older checkpoint",
        )
    return data
