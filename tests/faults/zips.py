"""Faults within the zip archives of torch.save, from single bits to records, checksums mended or not."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from .core import Copy, Expectation, fault, has_checksums, names_file, only_by_manifest, pick
from .layout import Region, contents, records, regions

LEVEL = "zip"


def _flip(path: Path, region: Region, rng: Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(region.start, region.end)] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def _flip_in(copy: Copy, rng: Random, wanted: Callable[[Region], bool], *, named: bool) -> Expectation | None:
    path = pick(rng, copy.zips)
    region = pick(rng, (r for r in regions(path.read_bytes()) if wanted(r))) if path else None
    if path is None or region is None:
        return None
    checked = has_checksums(path)
    _flip(path, region, rng)
    if region.what == "data" and not checked:
        return only_by_manifest(path)
    # without its first bytes the file is not even a zip: then there is no record to be named
    named = named and bool(region.start or region.what != "header")
    return names_file(path, parts=[region.record] if named and region.record else ())


@fault(LEVEL)
def bit_flipped_in_tensor_data(copy: Copy, rng: Random) -> Expectation | None:
    return _flip_in(copy, rng, lambda r: r.what == "data" and r.record.startswith("data/"), named=True)


@fault(LEVEL)
def bit_flipped_in_the_pickle(copy: Copy, rng: Random) -> Expectation | None:
    return _flip_in(copy, rng, lambda r: r.what == "data" and r.record == "data.pkl", named=True)


@fault(LEVEL)
def bit_flipped_in_a_small_record(copy: Copy, rng: Random) -> Expectation | None:
    """version, byteorder, serialization_id: hardly anybody reads them."""
    return _flip_in(copy, rng, lambda r: r.what == "data" and not r.record.startswith("data"), named=True)


@fault(LEVEL)
def bit_flipped_in_a_local_header(copy: Copy, rng: Random) -> Expectation | None:
    return _flip_in(copy, rng, lambda r: r.what == "header", named=True)


@fault(LEVEL)
def bit_flipped_in_a_record_name(copy: Copy, rng: Random) -> Expectation | None:
    return _flip_in(copy, rng, lambda r: r.what in ("name", "entry name"), named=False)


@fault(LEVEL)
def bit_flipped_in_padding(copy: Copy, rng: Random) -> Expectation | None:
    return _flip_in(copy, rng, lambda r: r.what == "padding", named=True)


@fault(LEVEL)
def bit_flipped_in_a_descriptor(copy: Copy, rng: Random) -> Expectation | None:
    return _flip_in(copy, rng, lambda r: r.what == "descriptor", named=True)


@fault(LEVEL)
def bit_flipped_in_the_directory(copy: Copy, rng: Random) -> Expectation | None:
    return _flip_in(copy, rng, lambda r: r.what == "entry", named=False)


@fault(LEVEL)
def bit_flipped_in_the_end_records(copy: Copy, rng: Random) -> Expectation | None:
    return _flip_in(copy, rng, lambda r: r.what.startswith(("end", "locator")) and not r.record, named=False)


@fault(LEVEL)
def bits_flipped_all_over(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, copy.zips)
    if path is None:
        return None
    raw = bytearray(path.read_bytes())
    for _ in range(rng.randrange(2, 200)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return names_file(path)


def _written(path: Path, raw: bytearray, record: str) -> Expectation:
    """With other data in a record, its checksum as it was, if it has any."""
    checked = has_checksums(path)
    path.write_bytes(raw)
    return names_file(path, parts=[record]) if checked else only_by_manifest(path)


def _large(raw: bytes) -> dict[str, tuple[int, int]]:
    return {name: span for name, span in records(raw).items() if name.startswith("data/")}


@fault(LEVEL)
def tensor_data_zeroed(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, copy.zips)
    found = _large(path.read_bytes()) if path else {}
    name = pick(rng, found)
    if path is None or name is None:
        return None
    raw = bytearray(path.read_bytes())
    start, end = found[name]
    if not any(raw[start:end]):
        return None
    raw[start:end] = bytes(end - start)
    return _written(path, raw, name)


@fault(LEVEL)
def tensor_data_of_records_swapped(copy: Copy, rng: Random) -> Expectation | None:
    """Two records of one size; their headers and checksums stay."""
    path = pick(rng, copy.zips)
    pair = _same_size(path, rng) if path else None
    if path is None or pair is None:
        return None
    raw = bytearray(path.read_bytes())
    (one, (a, b)), (_, (c, d)) = pair
    raw[a:b], raw[c:d] = raw[c:d], raw[a:b]
    return _written(path, raw, one)


_Pair = tuple[tuple[str, tuple[int, int]], tuple[str, tuple[int, int]]]


def _same_size(path: Path, rng: Random) -> _Pair | None:
    raw = path.read_bytes()
    found = list(_large(raw).items())
    pairs = [
        (x, y)
        for i, x in enumerate(found)
        for y in found[i + 1 :]
        if x[1][1] - x[1][0] == y[1][1] - y[1][0] and raw[slice(*x[1])] != raw[slice(*y[1])]
    ]
    return pick(rng, pairs)


def _has_id(raw: bytes) -> bool:
    """torch 2.1 and later write a hash over all checksums."""
    return ".data/serialization_id" in records(raw)


def _mend(raw: bytearray, name: str) -> None:
    """Make a record's checksum right again, in its descriptor and in the directory."""
    found = regions(bytes(raw))
    data = next(r for r in found if r.record == name and r.what == "data")
    crc = struct.pack("<I", zlib.crc32(raw[data.start : data.end]))
    for region in found:
        if region.record == name and region.what == "descriptor":
            raw[region.start + 4 : region.start + 8] = crc
        if region.record == name and region.what == "entry":
            raw[region.start + 16 : region.start + 20] = crc


def _mended(path: Path, raw: bytearray, *names: str) -> Expectation:
    has_id = _has_id(bytes(raw))
    checked = has_checksums(path)
    for name in names:
        _mend(raw, name)
    path.write_bytes(raw)
    return names_file(path) if has_id and checked else only_by_manifest(path)


@fault(LEVEL)
def tensor_edited_and_its_checksum_mended(copy: Copy, rng: Random) -> Expectation | None:
    """An edit on purpose: only torch's hash over all checksums is left to tell."""
    path = pick(rng, copy.zips)
    found = _large(path.read_bytes()) if path else {}
    name = pick(rng, found)
    if path is None or name is None:
        return None
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(*found[name])] ^= 1 << rng.randrange(8)
    return _mended(path, raw, name)


@fault(LEVEL)
def records_swapped_and_their_checksums_mended(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, copy.zips)
    pair = _same_size(path, rng) if path else None
    if path is None or pair is None:
        return None
    raw = bytearray(path.read_bytes())
    (one, (a, b)), (two, (c, d)) = pair
    raw[a:b], raw[c:d] = raw[c:d], raw[a:b]
    return _mended(path, raw, one, two)


@fault(LEVEL)
def pickle_edited_and_its_checksum_mended(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, copy.zips)
    if path is None:
        return None
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(*records(bytes(raw))["data.pkl"])] ^= 1 << rng.randrange(8)
    return _mended(path, raw, "data.pkl")


@fault(LEVEL)
def checksums_changed(copy: Copy, rng: Random) -> Expectation | None:
    """The directory's and the descriptor's copy of a checksum alike: the data are what they were."""
    path = pick(rng, copy.zips)
    name = pick(rng, _large(path.read_bytes())) if path else None
    if path is None or name is None:
        return None
    raw = bytearray(path.read_bytes())
    if not has_checksums(path):
        return None
    wrong = rng.choice([b"\0\0\0\0", rng.randbytes(4)])
    for region in regions(bytes(raw)):
        if region.record == name and region.what == "descriptor":
            raw[region.start + 4 : region.start + 8] = wrong
        if region.record == name and region.what == "entry":
            raw[region.start + 16 : region.start + 20] = wrong
    path.write_bytes(raw)
    return names_file(path, parts=[name])


def _rebuilt(path: Path, change: Callable[[list[tuple[str, bytes]]], object], method: int) -> None:
    """The archive written anew by Python's zipfile, with its records changed."""
    found = contents(path.read_bytes())
    change(found)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in found:
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    path.write_bytes(out.getvalue())


@fault(LEVEL)
def archive_compressed(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, copy.zips)
    if path is None:
        return None
    _rebuilt(path, lambda found: None, zipfile.ZIP_DEFLATED)
    return names_file(path, parts=["compressed"], warning=True)  # torch loads it, and wrongly with mmap


@fault(LEVEL)
def record_lost(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, copy.zips)
    name = pick(rng, _large(path.read_bytes())) if path else None
    if path is None or name is None:
        return None

    def lose(found: list[tuple[str, bytes]]) -> None:
        found[:] = [(n, data) for n, data in found if n.partition("/")[2] != name]

    _rebuilt(path, lose, zipfile.ZIP_STORED)
    return names_file(path, parts=[name, f"storage {name.removeprefix('data/')}"])


@fault(LEVEL)
def record_added(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, copy.zips)
    if path is None:
        return None

    def add(found: list[tuple[str, bytes]]) -> None:
        root = found[0][0].partition("/")[0]
        found.append((f"{root}/data/9999", rng.randbytes(64)))

    _rebuilt(path, add, zipfile.ZIP_STORED)
    return names_file(path, parts=["9999"], warning=True)  # torch loads it


@fault(LEVEL)
def record_shortened(copy: Copy, rng: Random) -> Expectation | None:
    path = pick(rng, copy.zips)
    name = pick(rng, _large(path.read_bytes())) if path else None
    if path is None or name is None:
        return None

    def cut(found: list[tuple[str, bytes]]) -> None:
        found[:] = [(n, d[:-4] if n.partition("/")[2] == name else d) for n, d in found]

    _rebuilt(path, cut, zipfile.ZIP_STORED)
    return names_file(path, parts=[name, f"storage {name.removeprefix('data/')}"])


@fault(LEVEL)
def root_renamed(copy: Copy, rng: Random) -> Expectation | None:
    """One record under another root: a part of some other archive."""
    path = pick(rng, copy.zips)
    if path is None:
        return None

    def rename(found: list[tuple[str, bytes]]) -> None:
        at = rng.randrange(len(found))
        found[at] = (f"other/{found[at][0].partition('/')[2]}", found[at][1])

    _rebuilt(path, rename, zipfile.ZIP_STORED)
    return names_file(path)
