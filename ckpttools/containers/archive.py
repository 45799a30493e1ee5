"""The zip container of torch.save, read strictly and written as torch writes it.

Layout (torch's PyTorchStreamWriter over miniz; PKWARE APPNOTE 6.3 for the fields):

    for each record   local header, name, extra ("FB" padding so that the data starts at a multiple of 64),
                      data (stored), data descriptor (16 bytes, 24 for records that are larger than or
                      begin behind 4 GiB; none for empty records)
    central directory one entry per record, with the CRC-32
    zip64 end record, zip64 locator, end record; nothing after it

A record that is larger than or begins behind 4 GiB has a zip64 extra, in its header as in the directory.
Record names are `<root>/<name>`, where the root is the file's stem at the time of saving. A CRC-32 of 0
for a record that is not empty means that it was saved without checksums (`compute_crc32=False`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpttools.errors import CkptError, escape
from ckpttools.plan import Crc32, Literal, Segment
from ckpttools.stores.files import File, truncated
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
HAS_DESCRIPTOR, UTF8 = 0x0008, 0x0800
MAX_INFLATED = 256 << 20
SERIALIZATION_ID = ".data/serialization_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record: `start` and `nbytes` locate its data in the file."""

    name: str  # without the root
    header: int
    start: int
    nbytes: int  # as stored
    size: int  # after decompression
    crc32: int
    method: int  # 0 stored, 8 deflated
    flags: int
    end: int  # past the data and its descriptor


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    path: Path
    size: int
    root: str
    records: dict[str, Record]  # in file order
    base: int = 0  # where the archive begins in the file at `path`

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


def damaged(path: Path, message: str) -> CkptError:
    return CkptError(
        "zip-damaged",
        message,
        where=path,
        why="the archive's own directory contradicts its contents, so no tensor in it can be trusted",
        hint="copy the file again from where it was saved, or use an older checkpoint",
    )


def is_zip(head: bytes) -> bool:
    return head[:4] == b"PK\x03\x04"


def read_archive(file: File) -> Archive:
    """Read the directory and every local header; the data is not read.

    Refuses anything that torch's writer or Python's zipfile would not produce: overlaps, gaps,
    duplicates, two roots, bytes after the end, headers that contradict the directory.
    """
    entries, directory = _directory(file)
    records: dict[str, Record] = {}
    roots: dict[str, None] = {}
    lowered: set[str] = set()
    at = 0
    for name, offset, flags, method, crc32, nbytes, size in sorted(entries, key=lambda e: e[1]):
        if offset != at:
            raise damaged(file.path, f"record '{escape(name)}' starts at byte {offset}, expected {at}")
        record = _record(file, name, offset, flags, method, crc32, nbytes, size, directory)
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
    return Archive(path=file.path, size=file.size, root=root, records=records, base=file.base)


_Entry = tuple[str, int, int, int, int, int, int]  # name, offset, flags, method, crc32, nbytes, size


def _directory(file: File) -> tuple[list[_Entry], int]:
    """The entries of the central directory and where it starts."""
    path = file.path
    if file.size < END.size:
        raise truncated(path, f"{file.size} bytes hold no zip end record")
    magic, disk, disk0, here, count, nbytes, start, comment = END.unpack(
        file.read(file.size - END.size, END.size)
    )
    if magic != END_MAGIC or comment:
        tail = file.read(max(file.size - 65558, 0), min(file.size, 65558))
        at = tail.rfind(b"PK\x05\x06")
        if 0 <= at <= len(tail) - END.size:
            raise damaged(path, "bytes follow the end of the archive, or it carries a comment")
        raise truncated(path, "the zip end record is missing")
    end = file.size - END.size
    if end >= LOCATOR64.size + END64.size:
        at = end - LOCATOR64.size
        lmagic, ldisk, end64, disks = LOCATOR64.unpack(file.read(at, LOCATOR64.size))
        if lmagic == LOCATOR64_MAGIC:
            if end64 != at - END64.size or ldisk or disks > 1:
                raise damaged(path, "the zip64 locator points elsewhere")
            magic64, rest, _, _, d64, d064, here64, count64, nbytes64, start64 = END64.unpack(
                file.read(end64, END64.size)
            )
            if magic64 != END64_MAGIC or rest != END64.size - 12 or d64 or d064 or here64 != count64:
                raise damaged(path, "the zip64 end record is malformed")
            for small, big, limit in (
                (count, count64, 0xFFFF),
                (nbytes, nbytes64, BIG),
                (start, start64, BIG),
            ):
                if small not in (big, limit):
                    raise damaged(path, "the two end records contradict each other")
            here = count = count64
            nbytes, start, end = nbytes64, start64, end64
    if disk or disk0 or here != count or count > MAX_RECORDS or start + nbytes != end:
        raise damaged(path, "the end record does not fit the file")
    if nbytes > MAX_DIRECTORY:
        raise damaged(path, f"a directory of {nbytes} bytes is over the limit of {MAX_DIRECTORY}")
    return _entries(file, start, nbytes, count), start


def _entries(file: File, start: int, nbytes: int, count: int) -> list[_Entry]:
    data = file.read(start, nbytes)
    out: list[_Entry] = []
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > nbytes or data[at : at + 4] != b"PK\x01\x02":
            raise damaged(file.path, "the directory has fewer entries than it says")
        (
            _, _, _, flags, method, _, _, crc32, stored, size, nname, nextra, ncomment, disk, _, mode, offset,
        ) = CENTRAL.unpack_from(data, at)  # fmt: skip
        raw = data[at + CENTRAL.size : at + CENTRAL.size + nname]
        extra = data[at + CENTRAL.size + nname : at + CENTRAL.size + nname + nextra]
        at += CENTRAL.size + nname + nextra + ncomment
        if at > nbytes or ncomment or disk or flags & 0x2041:
            raise damaged(
                file.path, "a directory entry is malformed, commented, encrypted or on another disk"
            )
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(file.path, "a record's name is not UTF-8") from None
        if not name.isprintable() or "\\" in name or name.startswith("/") or ".." in name.split("/"):
            raise damaged(file.path, f"a record is named '{escape(name)}'")
        if mode >> 28 not in (0, 0o10):  # the file type of Unix: 0 where none is stated
            raise damaged(file.path, f"record '{escape(name)}' is a link or no regular file")
        if BIG in (stored, size, offset):
            size, stored, offset = _zip64(file.path, extra, size, stored, offset)
        if method not in (0, 8) or (method == 0 and stored != size):
            raise damaged(file.path, f"record '{escape(name)}' is compressed by method {method}")
        out.append((name, offset, flags, method, crc32, stored, size))
    if at != nbytes:
        raise damaged(file.path, "the directory holds more than its entries")
    return out


def _zip64(path: Path, extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, n = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + n]
        at += 4 + n
        if kind != 1:
            continue
        values = [struct.unpack_from("<Q", body, i)[0] for i in range(0, len(body) - 7, 8)]
        try:
            size = values.pop(0) if size == BIG else size
            stored = values.pop(0) if stored == BIG else stored
            offset = values.pop(0) if offset == BIG else offset
        except IndexError:
            break
        return size, stored, offset
    raise damaged(path, "a zip64 size is missing")


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


# --- torch's own bytes --------------------------------------------------------------------------------


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
    for record in archive.records.values():
        shown = escape(record.name)
        raw = f"{archive.root}/{record.name}".encode()
        header = _header(raw, record.header, record.nbytes, alignment)
        if record.start - record.header != len(header) or file.read(record.header, len(header)) != header:
            odd += 1
            problems.append(f"the header or padding of record '{shown}'")
        after = record.end - record.start - record.nbytes
        wide = _wide(record.nbytes, record.header)
        if record.method or after != (0 if not record.nbytes else 24 if wide else 16):
            problems.append(f"the descriptor of record '{shown}'")
        central.append(_entry(raw, record.nbytes, record.header, record.crc32))
    if odd * 2 > len(archive.records):
        return None
    start = max(record.end for record in archive.records.values())
    at = start
    for record, entry in zip(archive.records.values(), central, strict=True):
        if at + len(entry) > file.size or file.read(at, len(entry)) != entry:
            problems.append(f"the directory entry of record '{escape(record.name)}'")
        at += len(entry)
    tail = _end(len(central), sum(map(len, central)), start)
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


# --- writing ------------------------------------------------------------------------------------------


def archive_segments(root: str, records: Sequence[tuple[str, Sequence[Segment]]]) -> tuple[Segment, ...]:
    """A torch zip with these records, in this order; checksums are computed while it is written."""
    out: list[Segment] = []
    central: list[Segment] = []
    at = 0
    for name, data in records:
        raw = f"{root}/{name}".encode()
        nbytes = sum(segment.nbytes for segment in data)
        header = _header(raw, at, nbytes, ALIGNMENT)
        out.append(Literal(header))
        first = len(out)
        out += data
        crc = Crc32(first, len(out))
        end = at + len(header) + nbytes
        if nbytes:
            sizes = struct.pack("<QQ" if _wide(nbytes, at) else "<II", nbytes, nbytes)
            out += [Literal(struct.pack("<I", DESCRIPTOR_MAGIC)), crc, Literal(sizes)]
            end += 8 + len(sizes)
        entry = _entry(raw, nbytes, at, 0)
        cut = 16  # the checksum's place in an entry
        central += [Literal(entry[:cut]), crc, Literal(entry[cut + 4 :])] if nbytes else [Literal(entry)]
        at = end
    ncentral = sum(segment.nbytes for segment in central)
    return (*out, *central, Literal(_end(len(records), ncentral, at)))


def _flags(nbytes: int) -> int:
    return UTF8 | (HAS_DESCRIPTOR if nbytes else 0)  # torch writes no descriptor for empty records


def _wide(nbytes: int, at: int) -> bool:
    """Whether torch writes a record's descriptor with 8-byte sizes: for large ones and all behind them."""
    return nbytes >= BIG or at >= BIG


def _extra64(nbytes: int, stored: int, at: int) -> bytes:
    """The zip64 extra of a record. In its header, torch gives 0 for the size as stored."""
    values = [nbytes, stored] if nbytes >= BIG else []
    if at >= BIG:
        values.append(at)
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _header(raw: bytes, at: int, nbytes: int, alignment: int) -> bytes:
    """The local header, name and padding of a record that begins at byte `at`."""
    extra64 = _extra64(nbytes, 0, at)
    pad = -(at + LOCAL.size + len(raw) + len(extra64) + 4) % alignment
    extra = extra64 + b"FB" + struct.pack("<H", pad) + b"Z" * pad
    header = LOCAL.pack(LOCAL_MAGIC, 0, _flags(nbytes), 0, 0, 0, 0, 0, 0, len(raw), len(extra))
    return header + raw + extra


def _entry(raw: bytes, nbytes: int, offset: int, crc32: int) -> bytes:
    """A directory entry."""
    extra = _extra64(nbytes, nbytes, offset)
    size, offset = min(nbytes, BIG), min(offset, BIG)
    fields = (0, 0, _flags(nbytes), 0, 0, 0, crc32, size, size, len(raw), len(extra), 0, 0, 0, 0, offset)
    return CENTRAL.pack(CENTRAL_MAGIC, *fields) + raw + extra


def _end(n: int, nbytes: int, start: int) -> bytes:
    """The zip64 end record, its locator and the end record of a directory of `n` entries."""
    end64 = END64.pack(END64_MAGIC, END64.size - 12, 0x031E, 0x2D, 0, 0, n, n, nbytes, start)
    locator = LOCATOR64.pack(LOCATOR64_MAGIC, 0, start + nbytes, 1)
    short = min(n, 0xFFFF)
    return end64 + locator + END.pack(END_MAGIC, 0, 0, short, short, min(nbytes, BIG), min(start, BIG), 0)
