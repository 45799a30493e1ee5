"""A file that would run something when it is loaded is named first, by inspect as by verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hostile
import pytest
import torch
from commands import Ckpt
from support import FIXTURES

NAMES = ["reduce", "popped", "imported", "imported for nothing", "class of a tensor", "item of a tensor"]


def made(folder: Path, kind: str, name: str) -> Path:
    data = hostile.payloads(folder)[name]
    if kind == "zip":
        return hostile.torch_zip(folder / "a.pt", data)
    if kind == "bare":
        return hostile.written(folder / "a.pt", data)
    return hostile.written(folder / "a.pt", hostile.LEGACY + hostile.SYSTEM + data + hostile.P + b"].")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_it_is_named_first(kind: str, name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = made(tmp_path, kind, name)
    shown = ckpt("inspect", path)
    assert shown.code == 1
    assert "DANGEROUS: " in (shown.out + shown.err).splitlines()[0]
    assert "\x1b" not in shown.out + shown.err  # no colour but on a terminal
    checked = ckpt("verify", path, "--json")
    assert checked.code == 1
    findings = json.loads(checked.out)["checkpoints"][0]["findings"]
    assert findings[0]["id"] == "pickle-dangerous"
    assert not (tmp_path / hostile.MARKER).exists()


def test_beside_good_weights(tmp_path: Path, ckpt: Ckpt) -> None:
    class Bomb:
        def __reduce__(self) -> object:
            return print, ("ran",)

    path = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.ones(2)}, "extra": Bomb()}, path)
    shown = ckpt("inspect", path)
    first = "DANGEROUS: loading a.pt would run builtins.print('ran')"
    assert (shown.code, shown.out.splitlines()[0]) == (1, first)
    document = json.loads(ckpt("inspect", path, "--json").out)
    assert document["dangers"] == [{"file": str(path), "what": "would run builtins.print('ran')"}]
    assert ckpt("extract", path, tmp_path / "out.safetensors").code == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_any_file_of_a_folder(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    for source in (FIXTURES / "bundle" / "checkpoint-200" / "hf_model").iterdir():
        shutil.copy(source, folder)
    assert ckpt("inspect", folder).code == 0
    hostile.torch_zip(folder / "optimizer.pt", hostile.payloads(folder)["reduce"])
    shown = ckpt("inspect", folder)
    assert shown.code == 1 and shown.out.startswith("DANGEROUS: loading optimizer.pt would run os.system(")


@pytest.mark.parametrize("name", ["script", "script without code"])
def test_programs_of_torchscript(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = hostile.archives(tmp_path)[name]()
    for command in ("inspect", "verify"):
        done = ckpt(command, path)
        assert done.code == 1
        assert "TorchScript program" in "".join((done.out + done.err).splitlines()[:2])


@pytest.mark.parametrize("name", ["link", "link beside", "device"])
def test_members_that_are_no_records(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = hostile.archives(tmp_path)[name]()
    for command in ("inspect", "verify", "extract"):
        done = ckpt(command, path)
        assert done.code == 1 and "is a link or no regular file" in done.out + done.err


def test_a_real_program_of_torchscript(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    assert ckpt("verify", path).code == 1
