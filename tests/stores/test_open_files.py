"""What is opened is closed: no command leaves a descriptor behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support import FIXTURES

import ckpttools
from ckpttools.errors import CkptError
from ckpttools.passes.read import Reader
from ckpttools.stores import direct

ZERO = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("path", [ZERO, FIXTURES / "dcp/fsdp2_ws2", FIXTURES / "hf/sharded"], ids=str)
def test_no_descriptor_is_left(path: Path, tmp_path: Path) -> None:
    ckpttools.verify(path)  # what is loaded once may stay open
    before = descriptors()
    ckpttools.inspect(path)
    ckpttools.verify(path)
    ckpttools.verify(path, quick=True)
    ckpttools.digest(path)
    ckpttools.extract(path, tmp_path / "out")
    assert descriptors() == before


def test_none_is_left_by_what_is_refused(tmp_path: Path) -> None:
    shutil.copytree(ZERO, tmp_path / "run")
    (rank,) = (tmp_path / "run").rglob("*rank_0_*optim_states.pt")
    before = descriptors()
    rank.write_bytes(b"")
    assert not ckpttools.verify(tmp_path / "run").ok
    rank.unlink()
    rank.mkdir()
    with pytest.raises(CkptError):
        ckpttools.digest(tmp_path / "run")
    rank.rmdir()
    os.mkfifo(rank)
    with pytest.raises(CkptError):
        ckpttools.digest(tmp_path / "run")
    assert descriptors() == before


def test_direct_reads_close_both_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(direct.SMALLEST_READ * 2))
    monkeypatch.setattr(direct, "SMALLEST_FILE", 1)
    monkeypatch.setattr(direct, "is_cached", lambda fd, size: False)
    before = descriptors()
    view = memoryview(bytearray(direct.SMALLEST_READ))
    with Reader() as reader:
        reader.read(view, path, 17)
    assert bytes(view) == path.read_bytes()[17 : 17 + len(view)]
    assert descriptors() == before
