"""Where the parts of a file lie, found without the package: from zipfile and json alone."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes `start` to `end` of a torch zip; `record` is the record's name without the root."""

    what: str  # header, name, padding, data, descriptor, entry, entry name, end64, locator, end
    record: str
    start: int
    end: int


def regions(raw: bytes) -> list[Region]:
    """Every byte of a zip, in order, without gaps."""
    out: list[Region] = []
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        found = sorted(archive.infolist(), key=lambda info: info.header_offset)
        directory = archive.start_dir
    starts = [info.header_offset for info in found] + [directory]
    for info, after in zip(found, starts[1:], strict=True):
        name = info.filename.partition("/")[2]
        at = info.header_offset
        nname, nextra = struct.unpack_from("<HH", raw, at + 26)
        cuts = [at, at + 30, at + 30 + nname, at + 30 + nname + nextra]
        cuts += [cuts[-1] + info.compress_size, after]
        parts = ("header", "name", "padding", "data", "descriptor")
        out += [Region(w, name, a, b) for w, a, b in zip(parts, cuts, cuts[1:], strict=False) if a < b]
    at = directory
    while raw[at : at + 4] == b"PK\x01\x02":
        nname, nextra, ncomment = struct.unpack_from("<HHH", raw, at + 28)
        name = raw[at + 46 : at + 46 + nname].decode().partition("/")[2]
        out.append(Region("entry", name, at, at + 46))
        out.append(Region("entry name", name, at + 46, at + 46 + nname))
        if nextra:
            out.append(Region("entry", name, at + 46 + nname, at + 46 + nname + nextra))
        at += 46 + nname + nextra + ncomment
    if raw[at : at + 4] == b"PK\x06\x06":
        out += [Region("end64", "", at, at + 56), Region("locator", "", at + 56, at + 76)]
        at += 76
    out.append(Region("end", "", at, len(raw)))
    return out


def records(raw: bytes) -> dict[str, tuple[int, int]]:
    """Where each record's data begins and ends."""
    return {r.record: (r.start, r.end) for r in regions(raw) if r.what == "data"}


def contents(raw: bytes) -> list[tuple[str, bytes]]:
    """Each record's full name and data; unlike zipfile, also of archives without checksums."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        root = archive.namelist()[0].partition("/")[0]
    spans = {r.record: b"" for r in regions(raw) if r.what == "name"}
    spans |= {name: raw[start:end] for name, (start, end) in records(raw).items()}
    return [(f"{root}/{name}", data) for name, data in spans.items()]


def safetensors_header(raw: bytes) -> dict[str, dict[str, object]]:
    n = int.from_bytes(raw[:8], "little")
    header: dict[str, dict[str, object]] = json.loads(raw[8 : 8 + n])
    return header


def safetensors_spans(raw: bytes) -> list[tuple[str, int, int]]:
    """Name, start and end of each tensor's data in the file."""
    data = 8 + int.from_bytes(raw[:8], "little")
    out = []
    for name, entry in safetensors_header(raw).items():
        if name != "__metadata__":
            offsets = entry["data_offsets"]
            assert isinstance(offsets, list)
            out.append((name, data + offsets[0], data + offsets[1]))
    return sorted(out, key=lambda span: span[1])
