"""What is far away is read in few pieces: torch's layout predicts the headers, and verify proves them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
import torch
from stores.memory import Memory
from support import FIXTURES

import ckpttools
from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError

WRITERS = sorted(path for path in (FIXTURES / "torch-writers").rglob("*.p*") if path.is_file())
SAMPLES = ["deepspeed-0.19.8/z2_bf16_ws2", "deepspeed-0.19.8/z3_bf16_ws2", "dcp/fsdp2_ws2"]


def place(files: dict[str, bytes], *, far: bool = True) -> Memory:
    return Memory(files, name="", far=far)


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("path", WRITERS, ids=lambda path: f"{path.parent.name} {path.name}")
def test_predicted_headers_are_those_that_are_there(path: Path) -> None:
    near = read_torch_file(path)
    far = read_torch_file(place(files_of(path.parent)).root / PurePosixPath(path))
    if near.archive is None or far.archive is None:
        assert near.archive is far.archive is None
        return
    assert far.archive.records == near.archive.records


def test_torch_of_today_is_predicted(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3), "b": torch.zeros(0), "c": torch.ones(700, 700)}, path)
    read = read_torch_file(place(files_of(tmp_path)).root / PurePosixPath(path))
    assert read.archive is not None and read.archive.predicted


def verdict(files: dict[str, bytes], path: Path, *, far: bool) -> bool:
    try:
        return ckpttools.verify(place(files, far=far).root / PurePosixPath(path), quick=True).ok
    except CkptError:
        return False


def test_no_damage_of_headers_passes_for_being_far(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3), "b": torch.zeros(0), "c": torch.ones(9, 9)}, path)
    good = path.read_bytes()
    read = read_torch_file(path)
    assert read.archive is not None
    data = [
        range(r.start, r.start + r.nbytes) for n, r in read.archive.records.items() if n.startswith("data/")
    ]
    seen = set()
    for at in range(0, len(good), 5):
        if any(at in span for span in data):
            continue
        for flipped in (good[at] ^ 1, 0):
            if flipped == good[at]:
                continue
            files = {str(path): good[:at] + bytes([flipped]) + good[at + 1 :]}
            near, far = verdict(files, path, far=False), verdict(files, path, far=True)
            assert near == far, at
            seen.add(far)
    assert False in seen


@pytest.mark.parametrize("name", SAMPLES)
def test_what_far_files_hold(name: str) -> None:
    path = FIXTURES / name
    there = place(files_of(path)).root / PurePosixPath(path)
    assert ckpttools.digest(there).digests == ckpttools.digest(path).digests
    for quick in (True, False):
        far, near = ckpttools.verify(there, quick=quick), ckpttools.verify(path, quick=quick)
        assert list(map(str, far.findings)) == list(map(str, near.findings)) and far.ok
