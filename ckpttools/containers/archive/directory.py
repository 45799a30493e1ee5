"""The central directory and the end records: what an archive says of its records."""

from __future__ import annotations

import struct

from ckpttools.containers.archive.layout import (
    BIG,
    CENTRAL,
    END,
    END64,
    END64_MAGIC,
    END_MAGIC,
    LOCATOR64,
    LOCATOR64_MAGIC,
    MAX_DIRECTORY,
    MAX_RECORDS,
    Entry,
)
from ckpttools.errors import CkptError, escape
from ckpttools.location import Location
from ckpttools.stores.files import File, truncated

TAIL = 1 << 16  # bytes of the end that are read at once: of most archives with the whole directory
_SHORTEST, _PART = 1 << 10, 256  # of a small archive less: a folder may hold thousands of one tensor each


def damaged(path: Location, message: str) -> CkptError:
    return CkptError(
        "zip-damaged",
        message,
        where=path,
        why="the archive's own directory contradicts its contents, so no tensor in it can be trusted",
        hint="copy the file again from where it was saved, or use an older checkpoint",
    )


def hold_end(file: File) -> None:
    """Read the end of a file by one call."""
    nbytes = end_nbytes(file.size)
    file.hold(file.size - nbytes, nbytes)


def end_nbytes(size: int) -> int:
    """How much of the end of an archive is read at once."""
    return min(size, TAIL, max(size // _PART, _SHORTEST))


def read_directory(file: File) -> tuple[list[Entry], int]:
    """The entries of the central directory and where it starts."""
    path = file.path
    hold_end(file)
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


def _entries(file: File, start: int, nbytes: int, count: int) -> list[Entry]:
    data = file.read(start, nbytes)
    out: list[Entry] = []
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
        kinds = (0, 0o10, 0o4) if name.endswith("/") and not size else (0, 0o10)
        if mode >> 28 not in kinds:  # the file type of Unix: 0 where none is stated
            raise damaged(file.path, f"record '{escape(name)}' is a link or no regular file")
        if BIG in (stored, size, offset):
            size, stored, offset = _zip64(file.path, extra, size, stored, offset)
        if method not in (0, 8) or (method == 0 and stored != size):
            raise damaged(file.path, f"record '{escape(name)}' is compressed by method {method}")
        out.append((name, offset, flags, method, crc32, stored, size))
    if at != nbytes:
        raise damaged(file.path, "the directory holds more than its entries")
    return out


def _zip64(path: Location, extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
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
