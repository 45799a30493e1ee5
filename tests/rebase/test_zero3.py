"""A ZeRO-3 folder says everything once per rank: a rebase and a reshard change it on all of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from commands import run
from support import FIXTURES

SOURCE = FIXTURES / "deepspeed-0.19.8/z3_bf16_ws2"


def models(folder: Path) -> list[Any]:
    files = sorted(folder.rglob("*model_states.pt"))
    return [torch.load(file, weights_only=False) for file in files]


def test_every_rank_gets_the_new_counters_and_batch(tmp_path: Path) -> None:
    (old, *_) = models(SOURCE)
    total = old["ds_config"]["train_batch_size"]
    how = ("--old-bs", total, "--new-bs", total // 2, "--counters-only")
    ran = run("rebase-schedule", SOURCE, tmp_path / "new", *how)
    assert ran.code == 0, ran.err
    found = models(tmp_path / "new")
    assert len(found) == 2
    for model in found:
        assert model["global_steps"] == 2 * old["global_steps"]
        assert model["ds_config"]["train_batch_size"] == total // 2
        assert model["ckpttools_rebase"]["count"] == 2 * old["global_steps"]
    assert run("verify", tmp_path / "new").code == 0
    shown = run("rebase-schedule", tmp_path / "new", "--old-bs", total // 2, "--new-bs", total, "--dry-run")
    assert shown.code == 2 and "rebased-already" in shown.err


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "a")
    (file,) = (tmp_path / "a").rglob("*pp_rank_1_*model_states.pt")
    model = torch.load(file, weights_only=False)
    model["global_steps"] += 1
    torch.save(model, file)
    total = model["ds_config"]["train_batch_size"]
    how = ("--old-bs", total, "--new-bs", total // 2, "--counters-only")
    ran = run("rebase-schedule", tmp_path / "a", tmp_path / "new", *how)
    assert ran.code == 1 and not (tmp_path / "new").exists()


def test_a_reshard_keeps_the_effective_batch(tmp_path: Path) -> None:
    """As of stages 1 and 2: the settings of every rank's files say so."""
    shutil.copytree(SOURCE, tmp_path / "a")
    for file in (tmp_path / "a").rglob("*_states.pt"):
        saved = torch.load(file, weights_only=False)
        batch = {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
        }
        saved["ds_config"].update(batch)
        torch.save(saved, file)
    ran = run("reshard", tmp_path / "a", tmp_path / "four", "--world-size", 4)
    assert ran.code == 0 and "the global batch stays 16" in ran.err + ran.out, ran.err
    for model in models(tmp_path / "four"):
        config = model["ds_config"]
        assert config["train_batch_size"] == 16
        assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 4 == 16
