"""Whether an archive is another one with other data: the same directory but for checksums and the root."""

from __future__ import annotations

import re

from msgspec import Struct

from ckpttools.containers.archive.directory import hold_end
from ckpttools.containers.archive.layout import CENTRAL, STORAGE_ALIGNMENT, Archive, Entry, Record
from ckpttools.containers.archive.read import hold_beginning, read_header, read_record
from ckpttools.stores.files import File

_ROOT = re.compile(rb"[A-Za-z0-9_=+-][A-Za-z0-9_.=+-]*")


class Directory(Struct, frozen=True):
    """The directory of an archive that was read, as bytes to compare with: each entry without its checksum
    and its root, and whether it has data. `entries` are those of the records, in the directory's order.
    """

    archive: Archive
    start: int
    parts: tuple[tuple[int, bytes, bytes, bool], ...]  # where it starts, up to its checksum, up to its root
    rests: tuple[bytes, ...]  # from the root to the next entry, or to the end of the file
    looked_at: tuple[int, ...]  # entries whose header is read, too
    entries: tuple[Entry, ...]
    alignment: bytes

    @classmethod
    def of(cls, file: File, archive: Archive) -> Directory | None:
        """None for one that torch has not written with checksums."""
        start = max(record.end for record in archive.records.values())
        tail = file.read(start, archive.size - start)
        root = archive.root.encode()
        parts, rests, entries, looked_at, at = [], [], [], [], 0
        for i, record in enumerate(archive.records.values()):
            if record.method or (record.nbytes and not record.crc32):
                return None
            fields = CENTRAL.unpack_from(tail, at)
            name = at + CENTRAL.size
            raw = tail[name : name + fields[10]]
            end = name + fields[10] + fields[11] + fields[12]
            if raw != root + b"/" + record.name.encode():
                return None
            last = i + 1 == len(archive.records)
            parts.append((at, tail[at : at + 16], tail[at + 20 : name], record.nbytes > 0))
            rests.append(tail[name + len(root) : len(tail) if last else end])
            raw_name = f"{archive.root}/{record.name}"
            entries.append(
                (raw_name, record.header, record.flags, 0, record.crc32, record.nbytes, record.size)
            )
            if not record.predicted:
                looked_at.append(i)
            at = end
        stated = archive.records.get(STORAGE_ALIGNMENT)
        alignment = read_record(file, stated, 8) if stated is not None else b""
        return cls(archive, start, tuple(parts), tuple(rests), tuple(looked_at), tuple(entries), alignment)

    def of_other(self, file: File) -> dict[str, Record] | None:
        """The records of another archive that are read with its header, by name; None where it differs from
        this one in more than checksums, data and root. Raises CkptError for one that is damaged.
        """
        if file.size != self.archive.size:
            return None
        hold_end(file)
        tail = file.read(self.start, file.size - self.start)
        n = len(self.archive.root.encode())
        root = tail[CENTRAL.size : CENTRAL.size + n]
        if not _ROOT.fullmatch(root):
            return None
        crcs: list[bytes] = []
        for (place, first, second, data), rest in zip(self.parts, self.rests, strict=True):
            name = place + CENTRAL.size
            crc = tail[place + 16 : place + 20]
            if tail[place : place + 16] != first or tail[place + 20 : name] != second:
                return None
            if tail[name : name + n] != root or tail[name + n : name + n + len(rest)] != rest:
                return None
            if any(crc) != data:
                return None
            crcs.append(crc)
        hold_beginning(file, list(self.entries), self.start)
        out: dict[str, Record] = {}
        for i in self.looked_at:
            full, offset, flags, method, _, nbytes, size = self.entries[i]
            known = self.archive.records[full.partition("/")[2]]
            crc32 = int.from_bytes(crcs[i], "little")
            entry = (f"{root.decode()}/{known.name}", offset, flags, method, crc32, nbytes, size)
            record = read_header(file, entry, self.start)
            if (record.start, record.end) != (known.start, known.end):
                return None
            out[known.name] = record
        stated = out.get(STORAGE_ALIGNMENT)  # by which the other headers were predicted
        same = stated is None or read_record(file, stated, 8) == self.alignment
        return out if same else None
