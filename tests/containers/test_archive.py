"""The zip container: torch's and Python's readers accept ours, and no byte of torch's goes unexplained."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from faults.layout import regions
from support import FIXTURES

from ckpttools.checks import verify
from ckpttools.containers import archive as zips
from ckpttools.containers.archive import (
    archive_segments,
    belong_together,
    read_archive,
    read_record,
    unexplained,
)
from ckpttools.errors import CkptError
from ckpttools.execute import execute
from ckpttools.plan import Literal, OutputFile, Plan, Segment
from ckpttools.stores.files import opened
from ckpttools.tensors import ByteRange, Zeros


def torch_zip(folder: Path, name: str = "small.pt") -> Path:
    path = folder / name
    torch.save({"a": torch.arange(5.0), "empty": torch.zeros(0), "n": 3}, path)
    return path


def write(path: Path, records: list[tuple[str, list[Segment]]]) -> Path:
    execute(Plan(files=(OutputFile(path="", segments=archive_segments(path.stem, records)),)), path)
    return path


def check(path: Path) -> list[str]:
    """Everything that can be found out: header, every checksum, every byte around the data."""
    with opened(path) as file:
        archive = read_archive(file)
        for record in archive.records.values():
            read_record(file, record, 1 << 20)
        problems = unexplained(file, archive)
    return ["written by something else"] if problems is None else problems


def flagged(path: Path) -> bool:
    try:
        return bool(check(path))
    except CkptError:
        return True


# --- reading ------------------------------------------------------------------------------------------


def test_a_torch_file(tmp_path: Path) -> None:
    path = torch_zip(tmp_path)
    with opened(path) as file:
        archive = read_archive(file)
        with zipfile.ZipFile(path) as oracle:
            assert [f"small/{name}" for name in archive.records] == oracle.namelist()
            for name, record in archive.records.items():
                entry = oracle.getinfo(f"small/{name}")
                assert (record.size, record.crc32, record.header) == (
                    entry.file_size,
                    entry.CRC,
                    entry.header_offset,
                )
                assert read_record(file, record, 1 << 20) == oracle.read(entry)
        assert archive.root == "small"
    assert check(path) == []


@pytest.mark.parametrize("alignment", [64, 128, 4096])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    config = pytest.importorskip("torch.utils.serialization").config
    with config.patch("save.storage_alignment", alignment):
        path = torch_zip(tmp_path)
    assert check(path) == []


def test_a_file_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = torch_zip(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert check(path) == []
    with opened(path) as file:
        assert read_archive(file).unchecked


@pytest.mark.parametrize("name", ["модель.pt", "a b.pt", "x.y.z.pt", "no_suffix"])
def test_other_roots(tmp_path: Path, name: str) -> None:
    assert check(torch_zip(tmp_path, name)) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_other_writers_are_no_damage(tmp_path: Path, method: int) -> None:
    path = tmp_path / "python.pt"
    with zipfile.ZipFile(torch_zip(tmp_path)) as source, zipfile.ZipFile(path, "w", method) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert check(path) == ["written by something else"]


def test_a_writer_that_cannot_seek(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: object) -> int:
            raise io.UnsupportedOperation

        def tell(self) -> int:
            raise io.UnsupportedOperation

    out = Pipe()
    with zipfile.ZipFile(out, "w") as target:
        target.writestr("r/data.pkl", b"N.")
    path = tmp_path / "pipe.pt"
    path.write_bytes(out.getvalue())
    assert check(path) == ["written by something else"]


# --- damage -------------------------------------------------------------------------------------------


def test_every_truncation_is_found(tmp_path: Path) -> None:
    data = torch_zip(tmp_path).read_bytes()
    path = tmp_path / "cut.pt"
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(CkptError):
            check(path)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    data = bytearray(torch_zip(tmp_path).read_bytes())
    path = tmp_path / "flipped.pt"
    path.write_bytes(data)
    missed = []
    with path.open("r+b", buffering=0) as out:
        for at in range(len(data)):
            for bit in range(8):
                out.seek(at)
                out.write(bytes([data[at] ^ 1 << bit]))
                if not flagged(path):
                    missed.append((at, bit))
            out.seek(at)
            out.write(data[at : at + 1])
    assert missed == []
    assert len(data) > 1500


def test_an_empty_record_with_a_checksum_is_found(tmp_path: Path) -> None:
    """It has no bytes that would be held against it, so the directory alone says that it is wrong."""
    path = tmp_path / "flipped.pt"
    data = (FIXTURES / "torch-writers/1.13.1/weights.pt").read_bytes()
    entry = data.rindex(b"weights/data/1") - 46  # the last place is the directory's; its CRC-32 is at 16
    assert data[entry : entry + 4] == b"PK\x01\x02" and data[entry + 16 : entry + 28] == bytes(12)
    for bit in range(32):
        changed = bytearray(data)
        changed[entry + 16 + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with opened(path) as file, pytest.raises(CkptError):
            read_archive(file)


def test_inserted_and_appended_bytes_are_found(tmp_path: Path) -> None:
    data = torch_zip(tmp_path).read_bytes()
    path = tmp_path / "longer.pt"
    for at in range(0, len(data) + 1, 7):
        path.write_bytes(data[:at] + b"\0" + data[at:])
        assert flagged(path)
    path.write_bytes(data + data)
    assert flagged(path)


def patched(data: bytes, find: bytes, fields: Callable[[bytearray, int], None], nth: int = 0) -> bytes:
    raw = bytearray(data)
    at = -1
    for _ in range(nth + 1):
        at = raw.index(find, at + 1)
    fields(raw, at)
    return bytes(raw)


def put(form: str, offset: int, *values: int) -> Callable[[bytearray, int], None]:
    return lambda raw, at: struct.pack_into(form, raw, at + offset, *values)


LOCAL, CENTRAL, END, END64, LOCATOR = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
TRICKS: dict[str, Callable[[bytes], bytes]] = {
    "comment": lambda d: patched(d, END, put("<H", 20, 4)) + b"note",
    "prepended bytes": lambda d: b"#!/bin/sh\n" + d,
    "prepended pickle": lambda d: b"\x80\x02cos\nsystem\nU\x02id\x85R." + d,
    "two archives": lambda d: d + d,
    "other local name": lambda d: patched(d, b"small/data/0", put("<B", 11, ord("9"))),
    "local method": lambda d: patched(d, LOCAL, put("<H", 8, 8)),
    "local flags": lambda d: patched(d, LOCAL, put("<H", 6, 1)),
    "local sizes": lambda d: patched(d, LOCAL, put("<II", 18, 5, 5)),
    "local crc": lambda d: patched(d, LOCAL, put("<I", 14, 5)),
    "extra longer": lambda d: patched(d, LOCAL, put("<H", 28, 24)),
    "encrypted": lambda d: patched(d, CENTRAL, put("<H", 8, 0x809)),
    "strong encryption": lambda d: patched(d, CENTRAL, put("<H", 8, 0x848)),
    "method 12": lambda d: patched(d, CENTRAL, put("<H", 10, 12)),
    "central offset": lambda d: patched(d, CENTRAL, put("<I", 42, 64)),
    "central size": lambda d: patched(d, CENTRAL, put("<II", 20, 9999, 9999)),
    "central comment": lambda d: patched(d, CENTRAL, put("<H", 32, 5)),
    "other disk": lambda d: patched(d, CENTRAL, put("<H", 34, 1)),
    "symlink": lambda d: patched(d, CENTRAL, put("<HI", 36, 0, 0o120777 << 16)),
    "count": lambda d: patched(d, END, put("<HH", 8, 3, 3)),
    "zip64 count": lambda d: patched(d, END64, put("<QQ", 24, 2**40, 2**40)),
    "zip64 offset": lambda d: patched(d, END64, put("<Q", 48, 2**62)),
    "zip64 size": lambda d: patched(d, END64, put("<Q", 40, 2**63)),
    "locator elsewhere": lambda d: patched(d, LOCATOR, put("<Q", 8, 0)),
    "directory of 4 GiB": lambda d: patched(d, END, put("<II", 12, 0xFFFFFFFE, 0)),
    "disk": lambda d: patched(d, END, put("<H", 4, 1)),
    "descriptor": lambda d: patched(d, b"PK\7\x08", put("<I", 8, 7)),
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trick.pt"
    path.write_bytes(TRICKS[name](torch_zip(tmp_path).read_bytes()))
    assert flagged(path)


def python_zip(path: Path, names: list[str], data: bytes = b"N.") -> Path:
    with zipfile.ZipFile(path, "w") as target:
        for name in names:
            target.writestr(zipfile.ZipInfo(name), data)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "names",
    [
        ["r/data.pkl", "r/data.pkl"],
        ["r/data.pkl", "r/DATA.PKL"],
        ["r/data.pkl", "s/version"],
        ["data.pkl"],
        ["r/"],
        ["/r/data.pkl"],
        ["r/../data.pkl"],
        ["../r/data.pkl"],
        ["r\\data.pkl/x"],
        ["r/a\nb"],
        ["r/\u202eb"],
    ],
    ids=str,
)
def test_names_that_no_torch_file_has(tmp_path: Path, names: list[str]) -> None:
    with opened(python_zip(tmp_path / "r.pt", names)) as file, pytest.raises(CkptError) as caught:
        read_archive(file)
    assert caught.value.id == "zip-damaged"
    assert str(caught.value).isprintable()


def test_overlap_and_gap(tmp_path: Path) -> None:
    # the second entry points at the first one's bytes; then a hole between two
    data = python_zip(tmp_path / "r.pt", ["r/a", "r/b"]).read_bytes()
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    raw = bytearray(data)
    struct.pack_into("<I", raw, second + 42, 0)
    path = tmp_path / "bad.pt"
    path.write_bytes(raw)
    assert flagged(path)


def test_bombs_are_refused_before_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("r/data.pkl", bytes(50 << 20))
    with opened(path) as file:
        record = read_archive(file).records["data.pkl"]
        with pytest.raises(CkptError, match="over the limit"):
            read_record(file, record, 1 << 20)
    raw = bytearray(path.read_bytes())  # one that lies about its size
    for magic, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        struct.pack_into("<I", raw, raw.index(magic) + offset, 1000)
    path.write_bytes(raw)
    with opened(path) as file:
        record = read_archive(file).records["data.pkl"]
        with pytest.raises(CkptError, match="another size"):
            read_record(file, record, 1 << 20)


def test_a_checksum_of_zero_among_others_is_checked(tmp_path: Path) -> None:
    """It may be the true one (once in 2^32), or the storage was saved under skip_data: the id tells."""
    data = bytearray(torch_zip(tmp_path).read_bytes())
    path = tmp_path / "small.pt"
    at = data.index(b"small/data/0")
    descriptor = data.index(b"PK\7\x08", at)
    entry = data.index(b"PK\1\2", data.rindex(b"small/data/0") - 46)
    struct.pack_into("<I", data, descriptor + 4, 0)
    struct.pack_into("<I", data, entry + 16, 0)
    path.write_bytes(data)
    assert check(path) == []
    errors = {f.id: f.text for f in verify(path).findings if f.severity == "error"}
    assert errors.keys() == {"records-edited"} and "data/0 has lost its own" in errors["records-edited"]


def test_a_checksum_of_zero_in_a_file_of_an_older_torch(tmp_path: Path) -> None:
    """Without a serialization id there is no skip_data either: the pass over the bytes tells."""
    raw = bytearray((FIXTURES / "torch-writers/2.0.1/weights.pt").read_bytes())
    for region in regions(bytes(raw)):
        if region.record == "data/0" and region.what == "descriptor":
            raw[region.start + 4 : region.start + 8] = bytes(4)
        if region.record == "data/0" and region.what == "entry":
            raw[region.start + 16 : region.start + 20] = bytes(4)
    (tmp_path / "weights.pt").write_bytes(raw)
    findings = verify(tmp_path / "weights.pt").findings
    assert {f.where for f in findings if f.id == "checksum"} == {"record data/0"}


def test_an_edit_whose_checksum_was_mended_is_found(tmp_path: Path) -> None:
    """torch's serialization id folds the checksums of all records."""
    path = torch_zip(tmp_path)
    with opened(path) as file:
        archive = read_archive(file)
        assert belong_together(file, archive)
        record = archive.records["data/0"]
    data = bytearray(path.read_bytes())
    data[record.start] ^= 1
    crc = zlib.crc32(data[record.start : record.start + record.nbytes])
    struct.pack_into("<I", data, record.start + record.nbytes + 4, crc)
    entry = data.index(b"PK\1\2", data.rindex(b"small/data/0") - 46)
    struct.pack_into("<I", data, entry + 16, crc)
    path.write_bytes(data)
    assert check(path) == []
    with opened(path) as file:
        assert not belong_together(file, read_archive(file))
    assert "records-edited" in {f.id for f in verify(path).findings}


# --- writing ------------------------------------------------------------------------------------------


def test_ours_are_as_torch_writes_them(tmp_path: Path) -> None:
    source = torch_zip(tmp_path)
    with opened(source) as file:
        archive = read_archive(file)
        records: list[tuple[str, list[Segment]]] = [
            (name, [Literal(read_record(file, record, 1 << 20))] if record.nbytes else [])
            for name, record in archive.records.items()
        ]
    (tmp_path / "out").mkdir()
    ours = write(tmp_path / "out" / "small.pt", records)
    assert ours.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("known", [True, False], ids=["known", "computed"])
def test_70_000_records(tmp_path: Path, known: bool) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 70_000)
    data: list[Segment] = [Literal(b"x") if known else ByteRange(source, i, 1) for i in range(70_000)]
    records: list[tuple[str, list[Segment]]] = [(f"data/{i}", [each]) for i, each in enumerate(data)]
    path = write(tmp_path / "many.pt", [*records, ("version", [Literal(b"3\n")])])
    assert check(path) == []
    with zipfile.ZipFile(path) as oracle:
        assert len(oracle.namelist()) == 70_001
        assert oracle.read("many/data/69999") == b"x"
    reader = torch._C.PyTorchFileReader(str(path))
    assert len(reader.get_all_records()) == 70_001


@pytest.mark.parametrize("big", [zips.BIG - 1, zips.BIG, (5 << 30) + 17])
@pytest.mark.heavy
def test_more_than_4_gib(tmp_path: Path, big: int) -> None:
    path = write(
        tmp_path / "big.pt",
        [
            ("data/0", [Literal(b"abc")]),
            ("data/1", [Literal(b"x"), Zeros(big - 1)]),
            ("data/2", []),
            ("version", [Literal(b"3\n")]),
        ],
    )
    with zipfile.ZipFile(path) as oracle:
        assert oracle.testzip() is None
        assert oracle.getinfo("big/data/1").file_size == big
        assert oracle.read("big/version") == b"3\n"
    with opened(path) as file:
        archive = read_archive(file)
        assert unexplained(file, archive) == []
        assert archive.records["data/1"].nbytes == big
        crc = zlib.crc32(b"x")  # 2**32 - 1 zeros alone have the checksum 0
        for _ in range((big - 1) >> 24):
            crc = zlib.crc32(bytes(1 << 24), crc)
        assert archive.records["data/1"].crc32 == zlib.crc32(bytes((big - 1) & 0xFFFFFF), crc)
    reader = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record("version") == b"3\n"
    path.unlink()


@pytest.mark.parametrize("name", ["arrays.npz", "arrays.pt"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_of_numpy_is_not_called_damaged(
    name: str, save: Callable[..., None], tmp_path: Path
) -> None:
    with (tmp_path / name).open("wb") as file:
        save(file, a=np.ones(3), b=np.zeros(2))
    for command in ("inspect", "verify"):
        ran = run(command, tmp_path / name)
        assert ran.code == 2 and "error[not-a-checkpoint]" in ran.err and "NumPy" in ran.err
