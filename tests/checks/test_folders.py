"""A folder means everything in it; what is asked for must be there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES

PLAIN = FIXTURES / "hf-trainer/plain"
SAMPLE = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
FULL = FIXTURES / "monolithic/full/epoch_2_step_40.pt"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    shutil.copytree(PLAIN, tmp_path / "run")
    return tmp_path / "run"


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[: len(raw) // 2])


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(" ")]


def test_a_run_is_every_checkpoint_in_it(two: Path) -> None:
    done = run("verify", two)
    assert done.code == 0
    first, second, totals = lines(done.out)
    assert first.startswith(f"{two / 'checkpoint-4'}: good (") and second.startswith(
        str(two / "checkpoint-2")
    )
    assert totals == "2 of 2 checkpoints are good"
    damage(two / "checkpoint-2/model.safetensors")
    done = run("verify", two)
    assert done.code == 1 and "checkpoint-2: BAD: 1 error (" in done.out
    assert lines(done.out)[-1] == "1 of 2 checkpoints are good"
    document = json.loads(run("verify", "--json", two).out)
    assert document["ok"] is False
    assert {Path(c["path"]).name: c["ok"] for c in document["checkpoints"]} == {
        "checkpoint-4": True,
        "checkpoint-2": False,
    }


def test_newest_is_one(two: Path) -> None:
    damage(two / "checkpoint-2/model.safetensors")
    done = run("verify", "--newest", two)
    assert done.code == 0 and done.out.startswith(f"{two / 'checkpoint-4'}: good")
    assert len(lines(done.out)) == 1


def test_tags_of_a_save_folder(tmp_path: Path) -> None:
    shutil.copytree(SAMPLE, tmp_path / "save")
    shutil.copytree(tmp_path / "save/global_step3", tmp_path / "save/global_step1")
    done = run("verify", tmp_path / "save")
    assert done.code == 0 and lines(done.out)[-1] == "2 of 2 checkpoints are good"
    (tmp_path / "save/latest").write_text("global_step9")
    done = run("verify", tmp_path / "save")
    assert done.code == 1 and "global_step9" in done.out and "pointer-dangling" in done.out


def test_a_tree_of_runs(tmp_path: Path) -> None:
    shutil.copytree(PLAIN, tmp_path / "a/first")
    shutil.copytree(SAMPLE, tmp_path / "b/save")
    done = run("verify", tmp_path)
    assert done.code == 0, done.out + done.err
    assert lines(done.out)[-1] == "3 of 3 checkpoints are good"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_no_damage(two: Path) -> None:
    (two / "checkpoint-2/model.safetensors").chmod(0)
    assert run("verify", two / "checkpoint-2").code == 2
    done = run("verify", two)
    assert done.code == 2 and "1 could not be checked" in done.out


def test_what_is_required(tmp_path: Path) -> None:
    assert run("verify", FULL, "--require", "optimizer,scheduler,epoch,val_loss").code == 0
    state = torch.load(FULL, weights_only=False)
    del state["scheduler_state_dict"], state["val_loss"]
    torch.save(state, tmp_path / FULL.name)
    assert run("verify", tmp_path / FULL.name).code == 0
    done = run("verify", tmp_path / FULL.name, "--require", "optimizer,scheduler,epoch,val_loss")
    assert done.code == 1
    found = json.loads(
        run("verify", "--json", tmp_path / FULL.name, "--require", "optimizer,scheduler,val_loss").out
    )["checkpoints"][0]["findings"]
    assert [f["where"] for f in found if f["severity"] == "error"] == ["scheduler", "val_loss"]
    assert run("verify", FULL, "--require", "optimiser").code == 2


def test_the_trainers_log_counts(tmp_path: Path) -> None:
    assert (
        run("verify", PLAIN / "checkpoint-4", "--require", "optimizer,scheduler,epoch,train_loss").code == 0
    )
    assert run("verify", PLAIN / "checkpoint-4", "--require", "val_loss").code == 1


@pytest.mark.parametrize("several", [False, True])
def test_what_a_training_checkpoint_lacks_is_said(tmp_path: Path, several: bool) -> None:
    state = torch.load(FULL, weights_only=False)
    del state["scheduler_state_dict"]
    torch.save(state, tmp_path / FULL.name)
    weights = FIXTURES / "monolithic/bf16/weights.pt"
    done = run("verify", tmp_path / FULL.name, *([FULL, weights] if several else []))
    assert done.code == 0 and "; no scheduler; " in lines(done.out)[0]
    assert not any("; no " in line for line in lines(done.out)[1:])
    found = json.loads(run("verify", "--json", tmp_path / FULL.name).out)["checkpoints"][0]["findings"]
    assert [f["severity"] for f in found if f["id"] == "training-lacks"] == ["info"]
