"""Records in the file: local headers held against the directory, small records read."""

from __future__ import annotations

import struct
import zlib

from ckpttools.containers.archive.directory import damaged, hold_end, read_directory
from ckpttools.containers.archive.layout import (
    ALIGNMENT,
    BIG,
    DESCRIPTOR_MAGIC,
    END,
    HAS_DESCRIPTOR,
    LOCAL,
    LOCAL_MAGIC,
    STORAGE_ALIGNMENT,
    Archive,
    Entry,
    Record,
    descriptor_nbytes,
    flags_of,
    header_nbytes,
)
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.stores.files import File

MAX_HELD = (256 << 20) + (1 << 20)  # a pickle of the largest size that is read, and its neighbours


def is_zip(head: bytes) -> bool:
    return head[:4] == b"PK\x03\x04"


def ends_like_zip(file: File) -> bool:
    """Whether the end record is where torch writes it: the last bytes of the file."""
    hold_end(file)
    return file.size > END.size and file.read(file.size - END.size, 4) == b"PK\x05\x06"


def read_archive(file: File) -> Archive:
    """Read the directory; the data is not read, and of local headers only those around the pickle.

    torch pads every header so that the data begins at a multiple of the alignment: where the rest begins is
    known, as long as what follows begins where it then must. `unexplained` proves it. The headers of other
    writers are read.

    Refuses anything that torch's writer or Python's zipfile would not produce: overlaps, gaps,
    duplicates, two roots, bytes after the end, headers that contradict the directory. Folders, which other
    programs list too, are passed over. Raises UsageError for an archive of NumPy's.
    """
    entries, directory = read_directory(file)
    if entries and all("/" not in entry[0] and entry[0].endswith(".npy") for entry in entries):
        raise UsageError(
            "not-a-checkpoint",
            "a NumPy archive (.npz), not a file of torch.save",
            where=file.path,
            why="every record is a .npy array: no tensor of torch is in it",
            hint="numpy.load opens it",
        )
    entries.sort(key=lambda entry: entry[1])
    hold_beginning(file, entries, directory)
    records: dict[str, Record] = {}
    roots: dict[str, None] = {}
    lowered: set[str] = set()
    at, alignment = 0, ALIGNMENT
    for i, entry in enumerate(entries):
        name, offset = entry[:2]
        following = entries[i + 1][1] if i + 1 < len(entries) else directory
        if offset != at:
            raise damaged(file.path, f"record '{escape(name)}' starts at byte {offset}, expected {at}")
        # where there is no checksum, nothing would prove that the data begins there
        record = _predicted(file, entry, following, alignment) or read_header(file, entry, directory)
        root, slash, rest = name.partition("/")
        if not slash or not (rest or record.size == 0):
            raise damaged(file.path, f"record '{escape(name)}' has no archive root in its name")
        roots[root] = None
        at = record.end
        if name.endswith("/"):
            continue
        if rest.lower() in lowered:  # torch's own reader looks names up without regard to case
            raise damaged(file.path, f"two records are named '{escape(name)}'")
        lowered.add(rest.lower())
        records[rest] = record
        if rest == STORAGE_ALIGNMENT:
            alignment = stated_alignment(file, record)
    if at != directory:
        raise damaged(file.path, f"{directory - at} bytes before the directory belong to no record")
    if len(roots) != 1:
        raise damaged(file.path, f"the archive has {len(roots)} roots instead of one")
    root = next(iter(roots))
    return Archive(path=file.path, size=file.size, root=root, records=records, base=file.base)


def hold_beginning(file: File, entries: list[Entry], directory: int) -> None:
    """The pickle, and what torch puts between it and the storages, by one call."""
    first = next((i for i, entry in enumerate(entries) if entry[0].endswith("/data.pkl")), None)
    if first is None:
        return
    stored = (i for i in range(first + 1, len(entries)) if "/data/" in entries[i][0])
    last = next(stored, len(entries))
    start, end = entries[first][1], entries[last][1] if last < len(entries) else directory
    if 0 <= start < end <= min(file.size, start + MAX_HELD):
        file.hold(start, min(end + 24, file.size) - start)  # with what `_descriptor` looks at


def _predicted(file: File, entry: Entry, following: int, alignment: int) -> Record | None:
    """A record that torch wrote, without a look at its header; None where that has been read, or must be."""
    name, offset, flags, method, crc32, nbytes, _ = entry
    raw = name.encode()
    if method or flags != flags_of(nbytes) or bool(nbytes) != bool(crc32):
        return None
    if file.holds(offset, LOCAL.size + len(raw)):
        return None
    start = offset + header_nbytes(raw, offset, nbytes, alignment)
    if start + nbytes + descriptor_nbytes(nbytes, offset) != following:
        return None
    return _made(entry, start, following, predicted=True)


def _made(entry: Entry, start: int, end: int, *, predicted: bool = False) -> Record:
    name, header, flags, method, crc32, nbytes, size = entry
    rest = name.partition("/")[2]
    return Record(rest, header, start, nbytes, size, crc32, method, flags, end, predicted)


def read_header(file: File, entry: Entry, limit: int) -> Record:
    """The record of a directory entry, its local header read. Raises CkptError where they disagree."""
    name, offset, flags, method, crc32, nbytes, size = entry
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
    return _made(entry, start, end)


def _descriptor(file: File, name: str, at: int, crc32: int, nbytes: int, size: int, limit: int) -> int:
    """Check the data descriptor at `at`; returns where it ends."""
    tail = file.read(at, min(24, limit - at))
    for form in ("<IIQQ", "<IIII"):
        n = struct.calcsize(form)
        if len(tail) >= n and struct.unpack_from(form, tail) == (DESCRIPTOR_MAGIC, crc32, nbytes, size):
            return at + n
    raise damaged(file.path, f"the descriptor after record '{escape(name)}' contradicts the directory")


def prove(file: File, archive: Archive, record: Record) -> None:
    """Hold the local header and the descriptor of a predicted record against it. Raises CkptError."""
    if record.predicted:
        raw = f"{archive.root}/{record.name}"
        entry = (raw, record.header, record.flags, record.method, record.crc32, record.nbytes, record.size)
        read = read_header(file, entry, record.end)
        if (read.start, read.end) != (record.start, record.end):
            raise damaged(
                file.path, f"the header of record '{escape(raw)}' is not as long as its padding must be"
            )


def stated_alignment(file: File, record: Record | None) -> int:
    """What torch.utils.serialization.config.save.storage_alignment was, from its record."""
    text = file.read(record.start, record.nbytes) if record and record.nbytes <= 8 else b""
    return int(text) if text.isdigit() and int(text) else ALIGNMENT


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
