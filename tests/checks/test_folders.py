"""A folder means everything in it; what is asked for must be there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
    assert "good and older" not in done.out
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


def test_the_trainers_final_model_hides_no_checkpoint(two: Path) -> None:
    """`save_model` leaves the last weights in the run's own folder, beside checkpoint-N/."""
    for name in ("model.safetensors", "config.json"):
        shutil.copy(two / "checkpoint-4" / name, two)
    damage(two / "checkpoint-2/model.safetensors")
    done = run("verify", two)
    assert done.code == 1 and lines(done.out)[-1] == "2 of 3 checkpoints are good"
    forecast = json.loads(run("resume-check", two, "--json").out)
    assert Path(forecast["path"]) == two / "checkpoint-4" and forecast["resumes"] is True


def test_what_is_no_checkpoint_is_not_called_unreadable(tmp_path: Path) -> None:
    torch.save({"x": 1}, tmp_path / "numbers.pt")
    shutil.copy(FULL, tmp_path)
    done = run("verify", tmp_path)
    assert done.code == 2 and f"{tmp_path / 'numbers.pt'}: could not be checked\n" in done.out
    damage(tmp_path / FULL.name)  # damage is what counts, whatever else cannot be checked
    assert run("verify", tmp_path).code == run("verify", tmp_path / FULL.name, tmp_path / "none").code == 1


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


def test_a_damaged_newest_names_the_good_one_before_it(two: Path) -> None:
    damage(two / "checkpoint-4/model.safetensors")
    done = run("verify", two)
    assert done.code == 1 and lines(done.out)[-1] == f"good and older: {two / 'checkpoint-2'}"
    assert (
        f"older, and its headers are good: {two / 'checkpoint-2'}" in run("verify", two / "checkpoint-4").out
    )
    damage(two / "checkpoint-2/model.safetensors")
    for path in (two, two / "checkpoint-4"):
        assert "older" not in run("verify", path).out.replace("an older checkpoint", "")


def test_no_permission_is_no_damage(two: Path) -> None:
    """What may not be read is neither good nor bad, alone and among others. Root may read everything."""
    shutil.copytree(SAMPLE, two / "save")
    shard = next((two / "save").rglob("*rank_1*"))
    for path in (two / "checkpoint-2/model.safetensors", shard):
        path.chmod(0)
    user = 65534 if os.geteuid() == 0 else None
    code = (
        "import os, sys\n"
        "from ckpttools.cli import main\n"
        "import ckpttools.operations.verify, ckpttools.checks.contents, ckpttools.checks.untouched\n"
        "import ckpttools.cli.failure\n"
        # as root first: modules that are imported on the way may lie where nobody else can read
        "import contextlib, io\n"
        f"for path in {[str(two), str(two / 'save')]!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        with contextlib.suppress(SystemExit): main(['verify', path])\n"
        f"user = {user}\n"
        "if user is not None: os.seteuid(user)\n"
        "main(sys.argv[1:])\n"
    )
    for folder in (*two.parents, two):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp") and folder.owner() == two.owner():
            folder.chmod(0o755)
    for path in (two / "checkpoint-2", two / "save"):
        done = subprocess.run(
            [sys.executable, "-c", code, "verify", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "BAD" not in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", str(two)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "could not be checked" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("text", ["", "5", "0%", "101%", "0/3", "4/3", "a/b", "1/0"])
def test_what_is_no_part(text: str) -> None:
    done = run("verify", SAMPLE, "--subset", text)
    assert done.code == 2 and "error[bad-usage]" in done.err


@pytest.mark.parametrize("path", [SAMPLE, PLAIN / "checkpoint-4"], ids=lambda p: p.name)
def test_the_parts_are_the_whole(path: Path, tmp_path: Path) -> None:
    """A changed byte is found by at least one of three parts, and not by all of them."""
    assert run("verify", path, "--subset", "2/3").code == 0
    assert ", the part 40%" in run("verify", path, "--subset", "40%").out
    copy = Path(shutil.copytree(path, tmp_path / path.name))
    file = next(iter(sorted(copy.rglob("*model_states.pt")) or [copy / "optimizer.pt"]))
    raw = bytearray(file.read_bytes())
    value = torch.load(file, weights_only=False)
    tensor = value["module"]["up.weight"] if "module" in value else value["state"][3]["exp_avg"]
    raw[raw.index(tensor.contiguous().view(torch.uint8).numpy().tobytes())] ^= 1
    file.write_bytes(raw)
    assert run("verify", copy).code == 1
    codes = [run("verify", copy, "--subset", f"{n}/3").code for n in (1, 2, 3)]
    assert sorted(codes)[0] == 0 and 1 in codes


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
