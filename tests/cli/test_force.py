"""--force replaces what is ours, says what it was, and leaves everything else as it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from commands import Ckpt
from support import FIXTURES

ZERO = FIXTURES / "deepspeed-0.19.8" / "z2_groups_ws2"
RESHARD = ("reshard", ZERO, "{dst}", "--world-size", "3", "--force")
EXTRACT = ("extract", ZERO, "{dst}", "--force")


def contents(path: Path) -> dict[str, bytes]:
    if not path.is_dir():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def words(command: tuple[object, ...], dst: Path) -> list[object]:
    return [dst if word == "{dst}" else word for word in command]


@pytest.mark.parametrize(
    "sample",
    [
        "deepspeed-0.19.8/z2_groups_ws2",
        "hf/single",
        "hf/sharded",
        "bundle/checkpoint-200",
        "accelerate/deepspeed",
        "hf-trainer/deepspeed/checkpoint-2",
        "lightning/deepspeed/epoch=0-step=3.ckpt",
        "mmengine/run/iter_1500.pth",
    ],
)
def test_a_whole_checkpoint_is_replaced(sample: str, ckpt: Ckpt, tmp_path: Path) -> None:
    dst = shutil.copytree(FIXTURES / sample, tmp_path / "dst")
    ran = ckpt(*words(RESHARD, dst))
    assert ran.code == 0 and f"replaced {dst}, a folder with" in ran.err, ran
    assert ckpt("verify", dst).code == 0
    again = ckpt(*words(RESHARD, dst))  # its own output
    assert again.code == 0, again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "dst"]


@pytest.mark.parametrize("name", ["notes.txt", "global_step3/eval.json", "src/model.py", ".hidden", "a/b/c"])
@pytest.mark.parametrize("made", ["found", "hf", "written", "described"])
def test_a_file_of_somebodys_own_keeps_the_folder(name: str, made: str, ckpt: Ckpt, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    if made == "written":
        assert ckpt("reshard", ZERO, dst, "--world-size", "2").code == 0
    else:
        shutil.copytree(FIXTURES / "hf/single" if made == "hf" else ZERO, dst)
    (dst / name).parent.mkdir(parents=True, exist_ok=True)
    (dst / name).write_text("mine")
    if made == "described":
        assert ckpt("verify", dst, "--write-manifest").code == 0
    before = contents(dst)
    ran = ckpt(*words(RESHARD, dst))
    assert ran.code == 2 and ran.err.startswith("error[not-replaced]") and Path(name).name in ran.err, ran
    assert contents(dst) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "dst"]


def test_folders_that_are_no_checkpoint_and_folders_with_several(ckpt: Ckpt, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "config.json").write_text("{}")
    several = tmp_path / "several"
    shutil.copytree(ZERO, several)
    shutil.copytree(ZERO / "global_step3", several / "global_step9")
    runs = shutil.copytree(FIXTURES / "hf-trainer" / "deepspeed", tmp_path / "runs")
    linked = shutil.copytree(FIXTURES / "hf/single", tmp_path / "linked")
    (linked / "tokenizer.json").symlink_to(data / "config.json")
    for dst in (data, several, runs, linked):
        before = contents(dst)
        ran = ckpt(*words(RESHARD, dst))
        assert ran.code == 2 and ran.err.startswith("error[not-replaced]"), ran
        assert contents(dst) == before
    (tmp_path / "empty").mkdir()
    assert ckpt(*words(RESHARD, tmp_path / "empty")).code == 0


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize(
    ("old", "code"),
    [("safetensors", 0), ("pt", 0), ("empty", 0), ("text", 2), ("zip", 2), ("torn", 2), ("folder", 2)],
)
def test_single_files(name: str, old: str, code: int, ckpt: Ckpt, tmp_path: Path) -> None:
    dst = tmp_path / name
    match old:
        case "safetensors" | "pt":
            assert ckpt("extract", ZERO, tmp_path / f"other.{old}").code == 0
            (tmp_path / f"other.{old}").rename(dst)
            code = 0 if name.endswith(old) else 2
        case "empty":
            dst.touch()
        case "text":
            dst.write_text("my notes")
        case "zip":
            shutil.make_archive(str(tmp_path / "a"), "zip", FIXTURES / "hf" / "single")
            (tmp_path / "a.zip").rename(dst)
        case "torn":
            dst.write_bytes((FIXTURES / "hf/single/model.safetensors").read_bytes()[:-1000])
        case "folder":
            shutil.copytree(FIXTURES / "hf/single", dst)
    before = contents(dst)
    ran = ckpt(*words(EXTRACT, dst))
    assert ran.code == code, ran
    if code:
        assert ran.err.startswith("error[not-replaced]") and contents(dst) == before
    else:
        assert f"replaced {dst}, a file of {len(before[''])} bytes" in ran.err
        assert ckpt("verify", dst).code == 0


@pytest.mark.parametrize("kind", ["device", "link"])
@pytest.mark.parametrize("name", ["w.safetensors", "folder"])
def test_links_and_devices(kind: str, name: str, ckpt: Ckpt, tmp_path: Path) -> None:
    dst = tmp_path / name
    target = tmp_path / "elsewhere"
    if kind == "link":
        shutil.copytree(FIXTURES / "hf/single", target)
        dst.symlink_to(target / "model.safetensors" if "." in name else target)
    else:
        try:
            os.mknod(dst, 0o600 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    before = contents(target) if kind == "link" else None
    ran = ckpt(*words(EXTRACT, dst))
    assert ran.code == 2 and ran.err.startswith("error[not-replaced]"), ran
    assert dst.is_symlink() if kind == "link" else dst.is_char_device()
    assert before is None or contents(target) == before


def test_what_appears_while_it_copies_is_kept(
    ckpt: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = shutil.copytree(FIXTURES / "hf/single", tmp_path / "dst")
    pwrite = os.pwrite

    def write(fd: int, data: bytes, at: int) -> int:
        (dst / "results.csv").write_text("mine")
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", write)
    ran = ckpt(*words(RESHARD, dst))
    assert ran.code == 2 and "results.csv" in ran.err, ran
    assert (dst / "results.csv").read_text() == "mine" and (dst / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "dst"]
