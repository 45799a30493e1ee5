"""What an archive is made of: its structures, its records, and the bytes that torch puts around them."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from msgspec import Struct

from ckpttools.location import Location
from ckpttools.tensors import ByteRange

LOCAL = struct.Struct("<IHHHHHIIIHH")
CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
END = struct.Struct("<IHHHHIIH")
END64 = struct.Struct("<IQHHIIQQQQ")
LOCATOR64 = struct.Struct("<IIQI")
LOCAL_MAGIC, CENTRAL_MAGIC, END_MAGIC = 0x04034B50, 0x02014B50, 0x06054B50
END64_MAGIC, LOCATOR64_MAGIC, DESCRIPTOR_MAGIC = 0x06064B50, 0x07064B50, 0x08074B50
ALIGNMENT = 64
MAX_RECORDS = 1_000_000
MAX_DIRECTORY = 256 << 20
BIG = 0xFFFFFFFF
CRC_AT = 16  # the checksum's place in a directory entry
HAS_DESCRIPTOR, UTF8 = 0x0008, 0x0800
SERIALIZATION_ID = ".data/serialization_id"
STORAGE_ALIGNMENT = ".storage_alignment"


Entry = tuple[str, int, int, int, int, int, int]  # name, offset, flags, method, crc32, nbytes, size


class Record(NamedTuple):
    """One record: `start` and `nbytes` locate its data in the file. Hundreds of thousands are made."""

    name: str  # without the root
    header: int
    start: int
    nbytes: int  # as stored
    size: int  # after decompression
    crc32: int
    method: int  # 0 stored, 8 deflated
    flags: int
    end: int  # past the data and its descriptor
    predicted: bool = False  # `start` and `end` follow from torch's rules: the header was not read yet


class Archive(Struct, frozen=True, kw_only=True):
    path: Location
    size: int
    root: str
    records: dict[str, Record]  # in file order
    base: int = 0  # where the archive begins in the file at `path`

    @property
    def predicted(self) -> bool:
        """Whether some headers have not been read."""
        return any(record.predicted for record in self.records.values())

    @property
    def unchecked(self) -> bool:
        """Saved without checksums: every one is 0. (A single one may truly be 0.)"""
        return all(record.crc32 == 0 for record in self.records.values())

    def is_reserved(self, record: Record) -> bool:
        """Whether a storage alone has no checksum: saved under `torch.serialization.skip_data`, which leaves
        its bytes to be filled in later. Where a checksum was removed, the serialization id tells.
        """
        missing = not record.crc32 and record.nbytes > 0 and record.name.startswith("data/")
        return missing and not self.unchecked and SERIALIZATION_ID in self.records

    def range(self, record: Record) -> ByteRange:
        return ByteRange(self.path, self.base + record.start, record.nbytes)


# --- torch's own bytes --------------------------------------------------------------------------------


def flags_of(nbytes: int) -> int:
    return UTF8 | (HAS_DESCRIPTOR if nbytes else 0)  # torch writes no descriptor for empty records


def wide(nbytes: int, at: int) -> bool:
    """Whether torch writes a record's descriptor with 8-byte sizes: for large ones and all behind them."""
    return nbytes >= BIG or at >= BIG


def extra64_of(nbytes: int, stored: int, at: int) -> bytes:
    """The zip64 extra of a record. In its header, torch gives 0 for the size as stored."""
    if nbytes < BIG and at < BIG:  # of almost every record
        return b""
    values = [nbytes, stored] if nbytes >= BIG else []
    if at >= BIG:
        values.append(at)
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)


def header_of(raw: bytes, at: int, nbytes: int, alignment: int) -> bytes:
    """The local header, name and padding of a record that begins at byte `at`."""
    extra64 = extra64_of(nbytes, 0, at)
    pad = -(at + LOCAL.size + len(raw) + len(extra64) + 4) % alignment
    extra = extra64 + _padding(pad)
    header = LOCAL.pack(LOCAL_MAGIC, 0, flags_of(nbytes), 0, 0, 0, 0, 0, 0, len(raw), len(extra))
    return header + raw + extra


@lru_cache
def _padding(nbytes: int) -> bytes:
    return b"FB" + struct.pack("<H", nbytes) + b"Z" * nbytes


def header_nbytes(raw: bytes, at: int, nbytes: int, alignment: int) -> int:
    """The length of `header_of`, which puts the data at a multiple of the alignment."""
    least = LOCAL.size + len(raw) + len(extra64_of(nbytes, 0, at)) + 4
    return least + -(at + least) % alignment


def descriptor_nbytes(nbytes: int, at: int) -> int:
    """The length of what torch writes after a record that begins at byte `at`."""
    return (24 if wide(nbytes, at) else 16) if nbytes else 0


def descriptor_of(nbytes: int, at: int, crc32: int) -> bytes:
    """What torch writes after the data of a record that begins at byte `at`."""
    form = "<IIQQ" if wide(nbytes, at) else "<IIII"
    return struct.pack(form, DESCRIPTOR_MAGIC, crc32, nbytes, nbytes) if nbytes else b""


def entry_of(raw: bytes, nbytes: int, offset: int, crc32: int) -> bytes:
    """A directory entry."""
    extra = extra64_of(nbytes, nbytes, offset)
    size, offset = min(nbytes, BIG), min(offset, BIG)
    fields = (0, 0, flags_of(nbytes), 0, 0, 0, crc32, size, size, len(raw), len(extra), 0, 0, 0, 0, offset)
    return CENTRAL.pack(CENTRAL_MAGIC, *fields) + raw + extra


def end_of(n: int, nbytes: int, start: int) -> bytes:
    """The zip64 end record, its locator and the end record of a directory of `n` entries."""
    end64 = END64.pack(END64_MAGIC, END64.size - 12, 0x031E, 0x2D, 0, 0, n, n, nbytes, start)
    locator = LOCATOR64.pack(LOCATOR64_MAGIC, 0, start + nbytes, 1)
    short = min(n, 0xFFFF)
    return end64 + locator + END.pack(END_MAGIC, 0, 0, short, short, min(nbytes, BIG), min(start, BIG), 0)
