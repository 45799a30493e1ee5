"""Symbolic links: followed within a checkpoint and into a Hugging Face cache, refused elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run
from support import FIXTURES

from ckpttools import formats
from ckpttools.checks import verify
from ckpttools.errors import CkptError
from ckpttools.stores.links import followed

ZERO = FIXTURES / "deepspeed-0.19.8/z2_groups_ws2"
MODEL = "global_step3/mp_rank_00_model_states.pt"
RANK = "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"


def move_out(folder: Path, name: str) -> None:
    """Move a file or folder of a checkpoint elsewhere and leave a link to it."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (folder / name).rename(outside / Path(name).name)
    (folder / name).symlink_to(outside / Path(name).name)


def bundle(folder: Path) -> None:
    shutil.copytree(next((FIXTURES / "bundle").iterdir()), folder)


def hf(folder: Path) -> None:
    shutil.copytree(FIXTURES / "hf/sharded", folder)


def zero(folder: Path) -> None:
    shutil.copytree(ZERO, folder)


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "model file": (zero, MODEL),
    "rank file": (zero, RANK),
    "tag folder": (zero, "global_step3"),
    "latest": (zero, "latest"),
    "shard": (hf, "model-00001-of-00002.safetensors"),
    "index": (hf, "model.safetensors.index.json"),
    "the bundle's folder": (bundle, "deepspeed"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_link_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    make, file = CASES[name]
    make(tmp_path / "run")
    if not (tmp_path / "run" / file).exists():
        file = next(p.name for p in sorted((tmp_path / "run").iterdir()) if p.match("*-of-*"))
    move_out(tmp_path / "run", file)
    with pytest.raises(CkptError) as error:
        formats.open_checkpoint(tmp_path / "run")
    assert error.value.id == "link-outside" and error.value.where == str(tmp_path / "run" / file)
    ran = run("verify", tmp_path / "run")
    assert ran.code == 1 and "ERROR[link-outside]" in ran.out and "--follow-symlinks" in ran.out, ran
    for command in (["inspect"], ["extract", tmp_path / "out"]):
        ran = run(command[0], tmp_path / "run", *command[1:])
        assert ran.code == 1 and ran.err.startswith("error[link-outside]"), ran
    assert run("verify", "--follow-symlinks", tmp_path / "run").code == 0
    assert run("inspect", "--follow-symlinks", tmp_path / "run").code == 0
    assert run("extract", "--follow-symlinks", tmp_path / "run", tmp_path / "out", "-q").code == 0
    with followed():
        assert verify(tmp_path / "run").ok
    assert not verify(tmp_path / "run").ok, "the permission ends with its block"


def test_reshard_copies_nothing_that_lies_outside(tmp_path: Path) -> None:
    zero(tmp_path / "run")
    (tmp_path / "secret").write_text("what nobody asked for")
    (tmp_path / "run/notes.txt").symlink_to(tmp_path / "secret")
    ran = run("reshard", tmp_path / "run", tmp_path / "out", "--world-size", "3")
    assert ran.code == 1 and "link-outside" in ran.err and not (tmp_path / "out").exists()
    ran = run("reshard", tmp_path / "run", tmp_path / "out", "--world-size", "3", "--follow-symlinks")
    assert ran.code == 0 and (tmp_path / "out/notes.txt").read_text() == "what nobody asked for"
    assert run("verify", tmp_path / "run").code == 0, "verify does not read it"


def test_extract_copies_no_configuration_from_outside(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf/single", tmp_path / "model")
    move_out(tmp_path / "model", "config.json")
    ran = run("extract", tmp_path / "model", tmp_path / "out")
    assert ran.code == 1 and "link-outside" in ran.err and not (tmp_path / "out").exists()


def test_extract_looks_for_no_configuration_outside(tmp_path: Path) -> None:
    zero(tmp_path / "run")
    (tmp_path / "run/hf_model").symlink_to(FIXTURES / "hf/single")
    ran = run("extract", tmp_path / "run", tmp_path / "out")
    assert ran.code == 1 and "link-outside" in ran.err and not (tmp_path / "out").exists()
    asked = ["--hf-config", tmp_path / "run/hf_model"]
    assert run("extract", tmp_path / "run", tmp_path / "out", *asked).code == 0, "the user named it"


@pytest.mark.parametrize("beside", ["scheduler.pt", "last_checkpoint", "ckpt-manifest.json"])
def test_what_lies_beside_the_weights(beside: str, tmp_path: Path) -> None:
    zero(tmp_path / "run")
    assert run("verify", tmp_path / "run", "--write-manifest").code == 0
    (tmp_path / "other").write_text("{}")
    place = tmp_path / "run" / ("global_step3" if beside.startswith("ckpt") else "") / beside
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "other")
    findings = [f for f in verify(tmp_path / "run").findings if f.severity == "error"]
    assert [(f.id, f.file) for f in findings] == [("link-outside", str(place))]


def test_a_link_in_a_run_folder(tmp_path: Path) -> None:
    """Candidates are what lies in the folder; a link elsewhere is none, until links are followed."""
    (tmp_path / "run").mkdir()
    zero(tmp_path / "elsewhere")
    (tmp_path / "run/best").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CkptError) as error:
        formats.locate(tmp_path / "run")
    assert error.value.id == "link-outside"
    assert verify(tmp_path / "run/best").ok, "it was named by the user"
    with followed():
        assert formats.locate(tmp_path / "run").target.name == "global_step3"


def test_links_of_frameworks(tmp_path: Path) -> None:
    """MMCV's latest.pth, Lightning's last.ckpt and a link to the newest folder: within their run folder."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    shutil.copyfile(FIXTURES / "monolithic/full/epoch_2_step_40.pt", run_folder / "epoch_2_step_40.pt")
    (run_folder / "latest.pth").symlink_to("epoch_2_step_40.pt")
    (run_folder / "last.ckpt").symlink_to(run_folder / "epoch_2_step_40.pt")
    hf(run_folder / "hf-10")
    (run_folder / "hf-latest").symlink_to("hf-10")
    for name in ("latest.pth", "last.ckpt", "hf-latest"):
        assert verify(run_folder / name).ok, name
    zero(tmp_path / "save")
    (tmp_path / "save" / RANK).rename(tmp_path / "save/rank0")
    (tmp_path / "save" / RANK).symlink_to("../rank0")
    assert verify(tmp_path / "save").ok
    # the tag folder alone is another checkpoint: its rank file lies outside of it
    assert {f.id for f in verify(tmp_path / "save/global_step3").findings if f.severity == "error"} == {
        "link-outside"
    }


def hub(cache: Path) -> Path:
    """Hugging Face's cache of a model, as huggingface_hub lays it out; returns the snapshot."""
    snapshot = cache / "models--org--name/snapshots/0123abcd"
    hf(snapshot)
    (cache / "models--org--name/blobs").mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        blob = cache / f"models--org--name/blobs/{i:040x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return snapshot


def test_the_cache_of_hugging_face(tmp_path: Path) -> None:
    snapshot = hub(tmp_path / "hub")
    assert run("verify", snapshot).code == 0
    assert run("extract", snapshot, tmp_path / "out", "-q").code == 0
    weights = next(snapshot.glob("*.safetensors"))
    assert verify(weights).ok
    # a blob of another model's cache is outside
    other = tmp_path / "hub/models--org--other/blobs"
    other.mkdir(parents=True)
    weights.resolve().rename(other / "x")
    weights.unlink()
    weights.symlink_to(other / "x")
    assert run("verify", snapshot).code == 1


def test_a_path_through_links(tmp_path: Path) -> None:
    """What the user names may itself be a link, and so may folders above it."""
    zero(tmp_path / "real/save")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "save").symlink_to("link/save")
    for path in (tmp_path / "link/save", tmp_path / "save", tmp_path / "save/global_step3"):
        assert verify(path).ok, path


def test_links_in_circles_and_to_nowhere(tmp_path: Path) -> None:
    hf(tmp_path / "model")
    shard = next((tmp_path / "model").glob("*.safetensors"))
    for target in (shard.name, "nowhere", "/nowhere/at/all"):
        shard.unlink()
        shard.symlink_to(target)
        ran = run("verify", tmp_path / "model")
        assert ran.code in (1, 2) and shard.name in ran.out + ran.err, (target, ran)


@pytest.mark.parametrize("name", ["new.json", "new.yaml", "new.py"])
def test_a_configuration_that_the_user_names_may_be_a_link(name: str, tmp_path: Path) -> None:
    zero(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    texts = {
        ".json": '{"train_micro_batch_size_per_gpu": 2}',
        ".yaml": "OPTIMIZATION: {BATCH_SIZE_PER_GPU: 2}",
        ".py": "train_dataloader = dict(batch_size=2)",
    }
    (tmp_path / "elsewhere" / name).write_text(texts[Path(name).suffix])
    (tmp_path / "here" / name).symlink_to(tmp_path / "elsewhere" / name)
    ran = run("resume-check", tmp_path / "run", "--config", tmp_path / "here" / name)
    same = run("resume-check", tmp_path / "run", "--config", tmp_path / "elsewhere" / name)
    assert ran.code == same.code and ran.out == same.out and "link-outside" not in ran.err
