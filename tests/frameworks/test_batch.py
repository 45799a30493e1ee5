"""One batch for every command: MMEngine's DeepSpeedStrategy accumulates by its own setting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES

from ckpttools import formats, frameworks
from ckpttools.schedules.evidence import Known

MMENGINE = FIXTURES / "mmengine-deepspeed/iter_50.pth"


def batch(path: Path) -> Known:
    source = formats.locate(path)
    return frameworks.read(source, formats.read(source)).batch


def test_the_strategy_accumulates_not_the_wrapper() -> None:
    found = batch(MMENGINE)
    assert str(found) == "8 = 2 x 2 ranks x 2 accumulated" and not found.notes
    assert found.by["accumulation"] == "strategy.gradient_accumulation_steps"


def test_rebase_takes_the_right_old_batch(tmp_path: Path) -> None:
    """Iterations count micro-batches: half as many samples each make twice as many, and as many updates."""
    for old, new, which in ((8, 4, "global"), (2, 1, "auto")):
        out = tmp_path / which
        ran = run(
            "rebase-schedule", MMENGINE, out, "--old-bs", old, "--new-bs", new, "--batch-is", which, "--json"
        )
        assert ran.code == 0, ran.err
        document = json.loads(ran.out)
        assert document["batch"]["old"] == {"micro": 2, "gpus": 2, "accumulation": 2, "total": 8}
        assert document["batch"]["new"] == {"micro": 1, "gpus": 2, "accumulation": 2, "total": 4}
        assert document["position"] == {"old": 50, "new": 100}
        assert not any("the checkpoint says" in note for note in document["rebase_notes"])
        (steps,) = (c for c in document["changes"] if c["field"] == "global_steps")
        assert (steps["old"], steps["new"]) == (25, 50)


def test_the_same_effective_batch_keeps_the_learning_rate(tmp_path: Path) -> None:
    ran = run(
        *("rebase-schedule", MMENGINE, tmp_path / "a", "--new-bs", 1, "--new-accum", 4, "--json"),
        *("--lr-scaling", "linear", "--batch-is", "per-gpu"),
    )
    assert ran.code == 0, ran.err
    rates = json.loads(ran.out)["next_lr"]
    # at iteration 50 of 52 and at 100 of 104, on the same curve
    assert rates["new"] == pytest.approx(rates["old"], rel=0.2)


@pytest.mark.parametrize(("ranks", "settings"), [(1, (4, 2)), (4, (1, 2)), (8, (1, 1))])
def test_reshard_keeps_the_batch_of_an_mmengine_run(
    ranks: int, settings: tuple[int, int], tmp_path: Path
) -> None:
    ran = run("reshard", MMENGINE, tmp_path / "iter_50.pth", "--world-size", ranks, "--json")
    assert ran.code == 0, ran.err
    text = "".join(json.loads(ran.out)["notes"])
    assert "global batch stays 8" in text
    # 8 ranks cannot share 4 samples: iterations become others, and that is said with the command that helps
    assert ("rebase-schedule" in text) == (ranks == 8)
    shard = torch_config(next((tmp_path / "iter_50.pth").glob("*optim_states.pt")))
    assert (shard["train_micro_batch_size_per_gpu"], shard["gradient_accumulation_steps"]) == settings


def torch_config(path: Path) -> dict[str, int]:
    from ckpttools.containers.edit import at, value
    from ckpttools.containers.torch_file import read_torch_file

    file = read_torch_file(path)
    found = value(file, at(file.value, "ds_config"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}])
def test_reshard_says_that_an_unknown_batch_changes(settings: dict[str, int], tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2", source)
    for file in source.rglob("*states.pt"):
        tree = torch.load(file, weights_only=False)
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            tree["ds_config"].pop(key, None)
        tree["ds_config"] |= settings
        tree.pop("global_samples", None)
        torch.save(tree, file)
    ran = run("reshard", source, tmp_path / "out", "--world-size", 4)
    assert ran.code == 0, ran.err
    assert "effective batch is not known" in ran.err and "rebase-schedule" in ran.err


def test_reshard_keeps_the_batch_where_no_accumulation_is_stated(tmp_path: Path) -> None:
    """A ds_config of a micro batch alone: DeepSpeed takes an accumulation of 1, and half the ranks need 2."""
    source = tmp_path / "run"
    shutil.copytree(FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2", source)
    for file in source.rglob("*states.pt"):
        tree = torch.load(file, weights_only=False)
        for key in ("train_batch_size", "gradient_accumulation_steps"):
            del tree["ds_config"][key]
        torch.save(tree, file)
    ran = run("reshard", source, tmp_path / "one", "--world-size", 1)
    assert ran.code == 0 and "accumulation 1 -> 2" in ran.err, ran.err
    assert "batch 120 = 60 x 1 rank x 2\n" in run("inspect", tmp_path / "one").out


# --- unknown parts ------------------------------------------------------------------------------------

PLAIN = FIXTURES / "monolithic/full/epoch_2_step_40.pt"


def test_unknown_ranks_are_shown_as_such(tmp_path: Path) -> None:
    ran = run(
        "rebase-schedule", PLAIN, "x", "--old-bs", 4, "--new-bs", 2, "--schedule-unit", "epoch", "--dry-run"
    )
    assert ran.code == 0, ran.err
    assert "? = 4 x ? ranks x ? accumulated" in ran.out


@pytest.mark.parametrize("option", ["--new-gpus", "--new-accum", "--dataset-size"])
def test_where_an_unknown_part_matters_it_is_asked_for(option: str) -> None:
    sizes = ("--old-bs", 4, "--new-bs", 2, option, 100)
    ran = run("rebase-schedule", PLAIN, "x", *sizes, "--schedule-unit", "epoch", "--dry-run")
    assert ran.code == 2 and "[batch-unknown]" in ran.err, ran.err
    assert "--old-accum" in ran.err or "--old-gpus" in ran.err


def test_hf_without_random_states_does_not_say_its_ranks(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf-trainer/plain/checkpoint-2", tmp_path / "checkpoint-2")
    assert batch(tmp_path / "checkpoint-2").ranks == 1
    for file in (tmp_path / "checkpoint-2").glob("rng_state*"):
        file.unlink()
    assert batch(tmp_path / "checkpoint-2").ranks is None
