"""The manifest: what it says, what it finds, when it is written, and what it is never carried to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from commands import Ckpt
from safetensors.torch import load_file, save_file
from support import FIXTURES

ZERO = FIXTURES / "deepspeed-0.19.8" / "z2_groups_ws2"
NAME = "ckpt-manifest.json"


def test_it_states_sizes_and_digests(ckpt: Ckpt, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf" / "sharded", tmp_path / "hf")
    os.utime(tmp_path / "hf", (1_000_000, 1_000_000))
    assert ckpt("verify", tmp_path / "hf", "--write-manifest").code == 0
    assert (tmp_path / "hf").stat().st_mtime == 1_000_000  # frameworks choose checkpoints by time
    stated = json.loads((tmp_path / "hf" / NAME).read_text())["files"]
    assert stated.keys() == {p.name for p in (tmp_path / "hf").iterdir()} - {NAME}
    for name, entry in stated.items():
        raw = (tmp_path / "hf" / name).read_bytes()
        assert entry["size"] == len(raw)
        assert entry["xxh3_128"] == xxhash.xxh3_128_hexdigest(raw)
        if name.endswith(".safetensors"):
            tensors = load_file(tmp_path / "hf" / name)
            assert entry["tensors"] == {
                k: xxhash.xxh3_128_hexdigest(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                for k, t in tensors.items()
            }
    assert ckpt("verify", tmp_path / "hf").code == 0


def test_a_changed_weight_in_safetensors_is_named(ckpt: Ckpt, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf" / "single", tmp_path / "hf")
    ckpt("verify", tmp_path / "hf", "--write-manifest")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    ran = ckpt("verify", tmp_path / "hf")
    assert ran.code == 1 and "ERROR[manifest-mismatch]" in ran.out and f"changed: {name}" in ran.out
    # a checkpoint with an error gets no new manifest
    before = (tmp_path / "hf" / NAME).read_bytes()
    assert ckpt("verify", tmp_path / "hf", "--write-manifest").code == 1
    assert (tmp_path / "hf" / NAME).read_bytes() == before


def test_an_edit_with_right_checksums_is_found(ckpt: Ckpt, tmp_path: Path) -> None:
    """A moment changed and saved by torch anew: checksums, sizes and master weights all agree."""
    shutil.copytree(ZERO, tmp_path / "run")
    ckpt("verify", tmp_path / "run", "--write-manifest")
    path = next((tmp_path / "run").glob("*/*rank_1*"))
    state = torch.load(path, weights_only=False)
    state["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["exp_avg"][2] += 1e-3
    torch.save(state, path)
    ran = ckpt("verify", tmp_path / "run")
    assert ran.code == 1
    assert "state[1].exp_avg" in ran.out and "state[0].exp_avg" not in ran.out
    (path.parent / NAME).unlink()
    assert ckpt("verify", tmp_path / "run").code == 0


@pytest.mark.parametrize("edit", ["remove", "grow", "unlisted", "garbage"])
def test_files_against_the_manifest(edit: str, ckpt: Ckpt, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf" / "single", tmp_path / "hf")
    ckpt("verify", tmp_path / "hf", "--write-manifest")
    config = tmp_path / "hf" / "config.json"
    match edit:
        case "remove":
            config.unlink()
        case "grow":
            config.write_text(config.read_text() + "\n")
        case "unlisted":
            (tmp_path / "hf" / "note.txt").write_text("later")
        case "garbage":
            (tmp_path / "hf" / NAME).write_text('{"format": "other"}')
    for options in ([], ["--quick"]):
        ran = ckpt("verify", tmp_path / "hf", *options)
        expected = {"unlisted": "note[manifest-unlisted]", "garbage": "ERROR[manifest-damaged]"}
        assert expected.get(edit, "ERROR[manifest-mismatch]") in ran.out, ran
        assert ran.code == (0 if edit == "unlisted" else 1)


@pytest.mark.parametrize("contents", ["", '{"format": "ckpttools-manifest", "version": 2, "files": []}'])
def test_a_manifest_that_says_nothing_condemns_no_checkpoint(
    contents: str, ckpt: Ckpt, tmp_path: Path
) -> None:
    folder = shutil.copytree(FIXTURES / "trainer/z2_bf16_2/iter_000003.pth", tmp_path / "iter_000003.pth")
    (folder / NAME).write_text(contents)
    for words in (["verify", folder], ["verify", folder, "--quick"], ["resume-check", folder]):
        ran = ckpt(*words)
        assert ran.code == 0, (words, ran.out)
    assert "note[manifest-unusable]" in ckpt("verify", folder).out
    assert "cannot be used, because" in ckpt("verify", folder).out
    copied = ckpt("copy", folder, tmp_path / "copy")
    assert copied.code == 0 and "cannot be used" in copied.err, copied.err
    shard = next(folder.glob("*rank_1*"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    assert ckpt("verify", folder).code == 1
    assert ckpt("verify", tmp_path / "copy", "--write-manifest").code == 0
    assert "cannot be used" not in ckpt("verify", tmp_path / "copy").out


def test_a_single_file_has_its_own_manifest(ckpt: Ckpt, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "monolithic" / "run", run)
    first, second = sorted(run.iterdir())
    for path in (first, second):
        assert ckpt("verify", path, "--write-manifest").code == 0
        stated = json.loads(Path(f"{path}.{NAME}").read_text())["files"]
        assert stated.keys() == {path.name}
        assert stated[path.name]["xxh3_128"] == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert sorted(run.iterdir()) == [first, Path(f"{first}.{NAME}"), second, Path(f"{second}.{NAME}")]
    # file and manifest may be renamed together
    renamed = first.rename(run / "best.pt")
    Path(f"{first}.{NAME}").rename(f"{renamed}.{NAME}")
    assert ckpt("verify", renamed).code == 0
    _change_a_weight(renamed)
    ran = ckpt("verify", renamed)
    assert ran.code == 1 and "ERROR[manifest-mismatch]" in ran.out, ran
    assert ckpt("verify", second).code == 0


def _change_a_weight(path: Path) -> None:
    """Saved by torch anew: every checksum is right."""
    state = torch.load(path, weights_only=False)
    weights = state.get("model_state_dict", state)
    next(t for t in weights.values() if t.is_floating_point()).view(-1)[0] += 1
    torch.save(state, path)


def test_a_manifest_of_the_folder_covers_a_single_file(ckpt: Ckpt, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf" / "single", tmp_path / "hf")
    weights = tmp_path / "hf/model.safetensors"
    ckpt("verify", tmp_path / "hf", "--write-manifest")
    assert ckpt("verify", weights).code == 0
    tensors = load_file(weights)
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert ckpt("verify", weights).code == 1


def test_the_folder_and_a_file_in_it_have_manifests(ckpt: Ckpt, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf" / "single", tmp_path / "hf")
    weights = tmp_path / "hf/model.safetensors"
    assert ckpt("verify", weights, "--write-manifest").code == 0
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    ran = ckpt("verify", tmp_path / "hf")
    assert ran.code == 1 and f"changed: {name}" in ran.out, ran
    Path(f"{weights}.{NAME}").unlink()
    assert ckpt("verify", tmp_path / "hf", "--write-manifest").code == 0
    stated = json.loads((tmp_path / "hf" / NAME).read_text())["files"]
    assert weights.name in stated and not any("manifest" in name for name in stated)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin"])
def test_a_single_file_that_is_written_gets_one(name: str, ckpt: Ckpt, tmp_path: Path) -> None:
    dst = tmp_path / name
    place = Path(f"{dst}.{NAME}")
    place.write_text("of a file that is gone")
    assert ckpt("extract", ZERO, dst).code == 0
    entry = json.loads(place.read_text())["files"][name]
    assert entry["size"] == dst.stat().st_size
    assert entry["xxh3_128"] == xxhash.xxh3_128_hexdigest(dst.read_bytes())
    assert len(entry["tensors"]) >= 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", name, place.name]
    before = entry["xxh3_128"]
    assert ckpt("extract", ZERO, dst, "--force", "--dtype", "bf16").code == 0
    assert json.loads(place.read_text())["files"][name]["xxh3_128"] != before
    assert ckpt("verify", dst).code == 0


def test_a_manifest_that_cannot_be_written_is_said(ckpt: Ckpt, tmp_path: Path) -> None:
    dst = tmp_path / "w.safetensors"
    Path(f"{dst}.{NAME}").mkdir()
    ran = ckpt("extract", ZERO, dst)
    assert ran.code == 2 and ran.err.startswith("error[") and not dst.exists(), ran


def test_it_is_not_carried_to_files_that_differ(ckpt: Ckpt, tmp_path: Path) -> None:
    shutil.copytree(ZERO, tmp_path / "run")
    ckpt("verify", tmp_path / "run", "--write-manifest")
    manifest = next((tmp_path / "run").glob(f"*/{NAME}"))
    before = hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert ckpt("reshard", tmp_path / "run", tmp_path / "out", "--world-size", "3").code == 0
    assert ckpt("verify", tmp_path / "out").code == 0
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() == before


def test_a_file_of_any_name_is_described(ckpt: Ckpt, tmp_path: Path) -> None:
    """What was written under such a name was BAD by its own manifest."""
    path = tmp_path / "a\nb\x1b[31m\\.pt"
    for value in (0.0, 1.0):
        torch.save({"model": {"a.weight": torch.full((9,), value)}}, tmp_path / f"{value}")
    (tmp_path / "0.0").rename(path)
    assert ckpt("verify", path, "--write-manifest").code == 0 and ckpt("verify", path).code == 0
    (tmp_path / "1.0").rename(path)
    ran = ckpt("verify", path)
    assert ran.code == 1 and "manifest-mismatch" in ran.out and "\x1b" not in ran.out
