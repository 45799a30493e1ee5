"""Settings that no update can be computed with, and files of different saves, in every container."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES

from ckpttools.checks import verify
from ckpttools.findings import ERROR, INFO, WARNING

TRAINER = FIXTURES / "hf-trainer/plain"
# container -> the checkpoint, the file in it, where the optimizer lies there
CONTAINERS: dict[str, tuple[Path, str, tuple[str | int, ...]]] = {
    "plain": (FIXTURES / "monolithic/full/epoch_2_step_40.pt", "", ("optimizer_state_dict",)),
    "Lightning": (FIXTURES / "lightning/file/epoch=0-step=3.ckpt", "", ("optimizer_states", 0)),
    "Trainer": (TRAINER / "checkpoint-4", "optimizer.pt", ()),
    "accelerate": (FIXTURES / "accelerate/plain", "optimizer.bin", ()),
}
SETTINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "lr in words": ({"lr": "0.1"}, ERROR, "lr"),
    "no lr": ({"lr": None}, ERROR, "lr"),
    "lr NaN": ({"lr": math.nan}, WARNING, "lr"),
    "lr below zero": ({"lr": -0.1}, WARNING, "lr"),
    "beta above one": ({"betas": (0.9, 1.5)}, ERROR, "betas[1]"),
    "eps below zero": ({"eps": -1e-8}, WARNING, "eps"),
    "decay NaN": ({"weight_decay": math.nan}, WARNING, "weight_decay"),
    "no eps": ({"eps": None}, ERROR, "eps"),
}


def copied(source: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree if source.is_dir() else shutil.copy
    return Path(copy(source, tmp_path / source.name))


def edit(path: Path, change: Callable[[Any], object], at: tuple[str | int, ...] = ()) -> None:
    tree = torch.load(path, weights_only=False)
    value = tree
    for key in at:
        value = value[key]
    change(value)
    torch.save(tree, path)


def said(path: Path) -> list[tuple[str, str, str]]:
    return [(f.severity, f.id, f.where) for f in verify(path).findings if f.severity != INFO]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_setting_that_cannot_be(container: str, tmp_path: Path) -> None:
    source, name, at = CONTAINERS[container]
    for case, (new, severity, where) in SETTINGS.items():
        (tmp_path / case).mkdir()
        path = copied(source, tmp_path / case)
        edit(path / name if name else path, lambda found, new=new: found["param_groups"][0].update(new), at)
        assert said(path) == [(severity, "setting-implausible", f"param_groups[0].{where}")], case
        assert json.loads(run("resume-check", path, "--json").out)["verdict"] != "safe"


def test_a_schedule_that_cannot_be(tmp_path: Path) -> None:
    path = copied(CONTAINERS["plain"][0], tmp_path)
    edit(path, lambda state: state.update(last_epoch="x"), ("scheduler_state_dict",))
    assert said(path) == [(WARNING, "schedule-damaged", "scheduler_state_dict")]


def test_a_schedule_of_another_save(tmp_path: Path) -> None:
    """Of a function that is not saved: what it wrote last tells."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    path = tmp_path / "step_3.pt"
    for _ in range(3):
        optimizer.step()
        schedule.step()
    tree = {"model": {"w": torch.zeros(2)}, "scheduler": schedule.state_dict(), "global_step": 3}
    torch.save({**tree, "optimizer": optimizer.state_dict()}, path)
    assert said(path) == []
    optimizer.step()
    schedule.step()
    torch.save({**tree, "optimizer": optimizer.state_dict()}, path)
    assert said(path) == [(WARNING, "scheduler-mismatch", "scheduler._last_lr")]


def test_the_trainers_optimizer_of_another_save(tmp_path: Path) -> None:
    """Also where the learning rate is the same: Adam has counted."""
    path = copied(TRAINER / "checkpoint-4", tmp_path)
    rates = [group["lr"] for group in torch.load(path / "optimizer.pt")["param_groups"]]
    shutil.copy(TRAINER / "checkpoint-2/optimizer.pt", path)

    def same_rates(found: Any) -> None:
        for group, lr in zip(found["param_groups"], rates, strict=True):
            group["lr"] = lr

    edit(path / "optimizer.pt", same_rates)
    assert said(path) == [(WARNING, "counter-mismatch", "state[].step")]
    assert json.loads(run("resume-check", path, "--json").out)["verdict"] == "careful"


@pytest.mark.parametrize("container", ["Trainer", "accelerate"])
def test_moments_that_are_no_numbers(container: str, tmp_path: Path) -> None:
    """In the optimizer's own file, whose tensors no weights lead to."""
    source, name, _ = CONTAINERS[container]
    path = copied(source, tmp_path)

    def broken(found: Any) -> None:
        first = next(iter(found["state"].values()))
        first["exp_avg"].view(-1)[0] = math.nan
        first["exp_avg_sq"].view(-1)[0] = -1.0

    edit(path / name, broken)
    assert said(path) == [
        (ERROR, "negative-square", "state[0].exp_avg_sq"),
        (ERROR, "nonfinite", "state[0].exp_avg"),
    ]


def test_two_counts_of_iterations(tmp_path: Path) -> None:
    path = copied(FIXTURES / "monolithic/mmengine/epoch_4.pth", tmp_path)
    assert said(path) == []
    edit(path, lambda meta: meta.update(iter=40), ("meta",))
    assert said(path) == [(WARNING, "counter-mismatch", "message_hub.runtime_info.iter")]
