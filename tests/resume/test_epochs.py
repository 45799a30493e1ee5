"""Runs of MMEngine that go by their epochs: a resume begins an epoch anew, and iterations count on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

# as MMEngine 0.10.7 saves it, with paramwise_cfg: one value more than there are param_groups
GROUP = {"lr": 0.0989897933074606, "initial_lr": 0.004, "max_lr": 0.1, "min_lr": 4e-07}
ONE_CYCLE = {
    "eta_max": 0.1,
    "div_factor": 25.0,
    "final_div_factor": 10000.0,
    "total_steps": 39,
    "_schedule_phases": [
        {"end_step": 10.7, "start_lr": "initial_lr", "end_lr": "max_lr"},
        {"end_step": 38, "start_lr": "max_lr", "end_lr": "min_lr"},
    ],
    "param_name": "lr",
    "begin": 0,
    "end": 39,
    "by_epoch": False,
    "base_values": [0.004, 0.004],
    "last_step": 10,
    "_global_step": 10,
    "verbose": False,
    "_last_value": [0.0989897933074606] * 2,
}
WRAPPER = "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01))\n"


def saved(path: Path, *, epoch: int, iteration: int, batches: int = 13) -> Path:
    """A single file of a run of 3 epochs of so many iterations each."""
    runtime = {"epoch": epoch, "iter": iteration - 1, "max_epochs": 3, "max_iters": 3 * batches}
    base = {**GROUP, "params": torch.zeros(1), "betas": (0.9, 0.999)}
    torch.save(
        {
            "meta": {"epoch": epoch, "iter": iteration, "cfg": WRAPPER + "train_cfg = dict(max_epochs=3)\n"},
            "state_dict": {"w": torch.ones(2)},
            "message_hub": {"runtime_info": runtime},
            "optimizer": {
                "state": {},
                "param_groups": [{**GROUP, "betas": (0.9, 0.999), "params": [0]}],
                "base_param_settings": base,
            },
            "param_schedulers": [ONE_CYCLE],
        },
        path,
    )
    return path


def forecast(path: Path) -> dict[str, Any]:
    ran = run("resume-check", path, "--json")
    assert ran.out, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    found["length"] = next(c["text"] for c in found["checks"] if c["name"] == "length")
    found["why"] = " ".join(d["why"] for d in found["differences"])
    return found


def test_rates_of_several_groups_are_followed(tmp_path: Path) -> None:
    """base_param_settings are one group more for the scheduler, and none of the optimizer's."""
    found = forecast(saved(tmp_path / "iter_10.pth", epoch=0, iteration=10))
    (group,) = found["lr"]["groups"]
    assert group["first"] == pytest.approx(GROUP["lr"])
    assert group["next"] == pytest.approx(0.0999702071467254)  # as the real run went on
    assert "damaged" not in found["lr"]["note"]


def test_a_place_within_an_epoch_is_not_resumed(tmp_path: Path) -> None:
    within = forecast(saved(tmp_path / "iter_10.pth", epoch=0, iteration=10))
    assert within["verdict"] == "careful" and "10 of 13 iterations into an epoch" in within["why"]
    assert within["length"] == "39 are left: 0 of 3 epochs are done"
    last = forecast(saved(tmp_path / "iter_39.pth", epoch=2, iteration=39))
    assert "finished" not in last["why"] and last["length"].startswith("13 are left")
    assert forecast(saved(tmp_path / "epoch_1.pth", epoch=1, iteration=13))["length"] == "26 of 39 are left"
    assert "finished" in forecast(saved(tmp_path / "epoch_3.pth", epoch=3, iteration=39))["why"]


def test_iterations_that_ran_ahead_of_the_epochs(tmp_path: Path) -> None:
    """Resumed at iteration 10 with twice the batch: epochs have 7 iterations since, and it ends at 31."""
    path = saved(tmp_path / "iter_25.pth", epoch=2, iteration=25, batches=7)
    found = forecast(path)
    assert (found["step"], found["epoch"], found["length"]) == (25, 2, "the length of the run is not known")
    assert found["verdict"] == "careful" and "finished" not in found["why"]
    shown = run("inspect", path).out
    assert "iteration 25 (epoch 2 of 3)" in shown
