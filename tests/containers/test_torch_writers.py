"""Files of older torch versions, and of torch's ways to write an archive that is not the usual one."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from faults.core import verdict_of
from faults.layout import contents, regions
from support import FIXTURES
from torch.serialization import skip_data

from ckpttools.checks import verify
from ckpttools.containers.archive import SERIALIZATION_ID, belong_together, read_archive, unexplained
from ckpttools.formats import open_checkpoint
from ckpttools.stores.files import opened

WRITERS = FIXTURES / "torch-writers"
FILES = sorted(path for path in WRITERS.rglob("*.pt"))
ZIPS = [path for path in FILES if path.read_bytes()[:2] == b"PK"]


def name(path: Path) -> str:
    return path.relative_to(WRITERS).as_posix()


def serious(path: Path) -> list[str]:
    return [f.id for f in verify(path).findings if f.severity != "info"]


def test_the_versions_at_hand() -> None:
    found = {path.parent.name for path in FILES}
    assert {"1.13.1", "2.0.1", "2.2.2", "2.4.1", "2.6.0"} <= found
    assert len(FILES) > len(ZIPS), "one is in the older serialization"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_of_an_older_torch_is_good(path: Path) -> None:
    assert serious(path) == []
    tensors = open_checkpoint(path).tensors
    loaded = torch.load(path, weights_only=False)
    expected = loaded.get("model_state_dict", loaded)
    assert {n: tuple(t.shape) for n, t in expected.items()} == {n: r.shape for n, r in tensors.items()}


@pytest.mark.parametrize("path", ZIPS, ids=name)
def test_every_byte_of_its_archive_is_explained(path: Path) -> None:
    with opened(path) as file:
        archive = read_archive(file)
        assert unexplained(file, archive) == []
        assert belong_together(file, archive)
    major, minor = map(int, path.parent.name.split(".")[:2])
    assert (SERIALIZATION_ID in archive.records) == ((major, minor) >= (2, 1))


@pytest.mark.heavy
@pytest.mark.parametrize("path", [p for p in ZIPS if p.name == "weights.pt"], ids=name)
def test_every_single_bit_of_it(path: Path, tmp_path: Path) -> None:
    good, copy = path.read_bytes(), tmp_path / path.name
    missed = []
    for bit in range(8 * len(good)):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(raw)
        if not any(f.severity == "error" for f in verdict_of(copy)[0]):
            missed.append(bit)
    assert not missed


STATE = {"state_dict": {"a": torch.arange(40.0), "b": torch.ones(3, 4), "none": torch.empty(0)}}


def filled(path: Path) -> Path:
    """Saved under skip_data, and the tensors written into the room that torch left."""
    torch.save(STATE, path)
    whole = path.read_bytes()
    with skip_data():
        torch.save(STATE, path)
    raw = bytearray(path.read_bytes())
    for region in regions(whole):
        if region.what == "data" and region.record.startswith("data/"):
            raw[region.start : region.end] = whole[region.start : region.end]
    path.write_bytes(raw)
    assert torch.equal(torch.load(path)["state_dict"]["a"], STATE["state_dict"]["a"])
    return path


def test_data_that_was_skipped_and_filled_in_later(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.pt")
    found = {f.id: f for f in verify(path).findings}
    assert found.keys() == {"storage-unchecked"} and "of 2 storages" in found["storage-unchecked"].text


def test_data_that_was_skipped_and_never_filled_in(tmp_path: Path) -> None:
    with skip_data():
        torch.save(STATE, tmp_path / "a.pt")
    assert serious(tmp_path / "a.pt") == ["storage-unfilled"]


def test_a_checksum_that_was_taken_away_is_no_skipped_data(tmp_path: Path) -> None:
    """Zeroed in both places that hold it, and the data changed: the serialization id still tells."""
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    raw = bytearray(path.read_bytes())
    for region in regions(bytes(raw)):
        if region.record == "data/0":
            if region.what == "descriptor":
                raw[region.start + 4 : region.start + 8] = bytes(4)
            if region.what == "entry":
                raw[region.start + 16 : region.start + 20] = bytes(4)
            if region.what == "data":
                raw[region.start + 3] ^= 0x40
    path.write_bytes(raw)
    (finding,) = [f for f in verify(path).findings if f.severity == "error"]
    assert finding.id == "records-edited" and "data/0" in finding.text


def test_no_checksums_at_all(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert serious(tmp_path / "a.pt") == []


def packed_again(source: Path, path: Path, *, tensors: bool) -> Path:
    found = contents(source.read_bytes())
    with zipfile.ZipFile(path, "w") as archive:
        for full, data in found:
            deflate = tensors or not full.partition("/")[2].startswith("data/")
            archive.writestr(full, data, zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
    return path


def test_small_records_that_another_tool_compressed(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    path = packed_again(tmp_path / "a.pt", tmp_path / "b.pt", tensors=False)
    assert torch.equal(torch.load(path)["state_dict"]["a"], STATE["state_dict"]["a"])
    assert serious(path) == []
    raw = bytearray(path.read_bytes())
    region = next(r for r in regions(bytes(raw)) if r.what == "data" and r.record == "version")
    raw[region.start + 1] ^= 1
    path.write_bytes(raw)
    assert {f.severity for f in verify(path).findings} >= {"error"}


def test_tensors_that_another_tool_compressed(tmp_path: Path) -> None:
    """torch loads them, and wrong values with mmap: they are read, and that is said."""
    torch.save(STATE, tmp_path / "a.pt")
    path = packed_again(tmp_path / "a.pt", tmp_path / "b.pt", tensors=True)
    assert torch.equal(torch.load(path)["state_dict"]["a"], STATE["state_dict"]["a"])
    assert not torch.equal(torch.load(path, mmap=True)["state_dict"]["a"], STATE["state_dict"]["a"])
    verdict = verify(path)
    (found,) = (f for f in verdict.findings if f.id == "storage-deflated")
    assert verdict.ok and found.severity == "warning" and "mmap" in found.message
