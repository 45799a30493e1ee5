"""Archives that torch loads although torch.save did not write them so: repacked, deflated, with strays."""

from __future__ import annotations

import shutil
import struct
import subprocess
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from commands import run as ckpt

from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError
from ckpttools.stores.inflated import Deflated, InflatedFile


def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 300)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, folder / "orig.pt")
    return folder / "orig.pt"


def repacked(source: Path, target: Path, method: int = zipfile.ZIP_DEFLATED, *, folders: bool = True) -> Path:
    """As `unzip` and `zip -r` leave it: the folders are members too, and records are deflated."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        if folders:
            for name in ("orig/", "orig/data/"):
                new.mkdir(name) if hasattr(new, "mkdir") else new.writestr(name, b"")
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return target


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("folders", [False, True])
def test_a_repacked_file_is_read_like_the_one_that_torch_wrote(
    method: int, folders: bool, tmp_path: Path
) -> None:
    source = saved(tmp_path)
    path = repacked(source, tmp_path / "again.pt", method, folders=folders)
    assert list(torch.load(path)) == ["model", "optimizer", "epoch"]
    ran = ckpt("verify", path)
    assert ran.code == 0 and "good" in ran.out and "zip-other-writer" in ran.out, ran
    ran = ckpt("inspect", path, "--tensors")
    assert ran.code == 0 and "0.weight" in ran.out, ran
    for name in (source, path):
        assert ckpt("extract", name, tmp_path / f"{name.stem}.safetensors").code == 0
    one, other = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("orig", "again"))
    assert one == other
    digests = [ckpt("digest", name).out.split()[0] for name in (source, path)]
    assert digests[0] == digests[1]


@pytest.mark.skipif(not shutil.which("zip") or not shutil.which("unzip"), reason="no zip program here")
def test_the_zip_program(tmp_path: Path) -> None:
    source = saved(tmp_path)
    (tmp_path / "u").mkdir()
    for options in ("-r", "-rD", "-0r"):
        subprocess.run(["unzip", "-qo", source], cwd=tmp_path / "u", check=True)
        subprocess.run(
            ["zip", "-q", options, tmp_path / f"z{options}.pt", "orig"], cwd=tmp_path / "u", check=True
        )
        assert list(torch.load(tmp_path / f"z{options}.pt")) == ["model", "optimizer", "epoch"]
        assert ckpt("verify", tmp_path / f"z{options}.pt").code == 0


@pytest.mark.parametrize("where", [0.2, 0.5, 0.9])
def test_a_damaged_deflated_storage_is_found(where: float, tmp_path: Path) -> None:
    path = repacked(saved(tmp_path), tmp_path / "again.pt")
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("orig/data/0")  # of the first weight
    data = bytearray(path.read_bytes())
    header = info.header_offset + 30 + len(info.filename)
    data[header + int(where * info.compress_size)] ^= 0x20
    path.write_bytes(data)
    ran = ckpt("verify", path)
    assert ran.code == 1 and ("checksum" in ran.out or "zip-damaged" in ran.out), ran
    ran = ckpt("extract", path, tmp_path / "out.safetensors")
    assert ran.code == 1 and not (tmp_path / "out.safetensors").exists(), ran


def lying(path: Path, size: int) -> Path:
    """The largest record claims to inflate to `size` bytes, in the directory and in its header."""
    with zipfile.ZipFile(path) as file:
        info = max(file.infolist(), key=lambda i: i.compress_size)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 22 : info.header_offset + 26] = struct.pack("<I", size)
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(info.filename)] != info.filename.encode():
        at = data.index(b"PK\x01\x02", at + 1)
    data[at + 24 : at + 28] = struct.pack("<I", size)
    path.write_bytes(data)
    return path


def test_sizes_that_a_record_claims_are_held_against_the_file(tmp_path: Path) -> None:
    path = repacked(saved(tmp_path), tmp_path / "again.pt")
    for size in (8, (1 << 32) - 1):
        ran = ckpt("verify", lying(path, size))
        assert ran.code == 1 and "zip-damaged" in ran.out + ran.err, ran


def test_so_much_from_so_little_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the limit, from a file that is 200 times smaller, is not inflated: exit code 2, and why."""
    from ckpttools.containers.torch_file import zip as zips

    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "orig.pt")
    path = repacked(tmp_path / "orig.pt", tmp_path / "again.pt")
    assert path.stat().st_size * zips.RATIO < 4 << 20
    assert ckpt("verify", path).code == 0
    monkeypatch.setattr(zips, "MAX_INFLATED", 1 << 20)
    ran = ckpt("verify", path)
    assert ran.code == 2 and "storage-compressed" in ran.err, ran


def test_inflated_bytes_are_the_same_wherever_reading_begins(tmp_path: Path) -> None:
    from ckpttools.stores.files import bytes_of

    source = saved(tmp_path)
    path = repacked(source, tmp_path / "again.pt")
    storages = read_torch_file(path).storages
    for key, storage in read_torch_file(source).storages.items():
        (here,), (there,) = storage.chunks, storages[key].chunks
        whole = bytes_of(here)  # type: ignore[arg-type]
        for start, end in ((0, len(whole)), (len(whole) // 2, len(whole)), (1, len(whole) // 3), (0, 1)):
            assert bytes_of(there.cut(start, end - start)) == whole[start:end]  # type: ignore[union-attr, arg-type]


def test_storages_that_belong_to_no_tensor_are_a_warning(tmp_path: Path) -> None:
    source = saved(tmp_path)
    with warnings.catch_warnings(), zipfile.ZipFile(source, "a") as file:
        for i in range(300):
            file.writestr(f"orig/data/stray{i}", zlib.compress(b"x" * 50))
        file.writestr("orig/notes", b"of somebody")
    assert list(torch.load(source)) == ["model", "optimizer", "epoch"]
    ran = ckpt("verify", source)
    assert ran.code == 0 and "warning[storage-stray]" in ran.out and "300 storages" in ran.out, ran
    assert ckpt("extract", source, tmp_path / "out.safetensors").code == 0


def test_reading_backwards_does_not_inflate_it_all_again() -> None:
    data = bytes(range(256)) * (24 << 12)  # 24 MiB
    deflated = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflated.compress(data) + deflated.flush()
    inflated = 0

    class Counted:
        size = len(packed)

        def read(self, start: int, nbytes: int) -> bytes:
            return packed[start : start + nbytes]

    class Watched(InflatedFile):
        def _next(self, limit: int) -> bytes:
            nonlocal inflated
            part = super()._next(limit)
            inflated += len(part)
            return part

    file = Watched(Counted(), Deflated(0, len(packed), len(data)), CkptError)  # type: ignore[arg-type]
    for at in range(len(data) - 1, 0, -len(data) // 100):
        assert file.read(at, 1) == data[at : at + 1]
    assert inflated < 6 * len(data)  # 50 times, where each read begins anew
