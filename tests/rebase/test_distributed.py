"""A distributed checkpoint rebased and loaded by torch: goes on as the run that had the other batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from commands import run
from support import FIXTURES
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR

from ckpttools.formats import open_checkpoint

SIZE, EPOCHS, SAVED = 64, 4, 12


class Run:
    """Plain training code: `step` counts updates, the schedule covers the run."""

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.schedule = CosineAnnealingLR(self.optimizer, T_max=EPOCHS * SIZE // batch)
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "scheduler": self.schedule.state_dict(),
            "step": self.step,
            "dataset_size": SIZE,
        }

    def train(self, updates: int) -> list[float]:
        rates = []
        for _ in range(updates):
            rates.append(self.optimizer.param_groups[0]["lr"])
            self.model(torch.ones(1, 4)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.step += 1
        return rates


@pytest.mark.parametrize(("old", "new"), [(8, 4), (4, 16)])
def test_goes_on_as_from_scratch(old: int, new: int, tmp_path: Path) -> None:
    first = Run(old)
    first.train(SAVED)
    dcp.save(first.state(), checkpoint_id=tmp_path / "old", no_dist=True)
    how = ("--old-bs", old, "--new-bs", new, "--old-gpus", 1, "--old-accum", 1, "--epochs", EPOCHS)
    ran = run("rebase-schedule", tmp_path / "old", tmp_path / "new", *how, "--schedule-unit", "update")
    assert ran.code == 0, ran.err
    assert run("verify", tmp_path / "new").code == 0
    again = Run(new)
    state = again.state()
    dcp.load(state, checkpoint_id=tmp_path / "new", no_dist=True)
    again.model.load_state_dict(state["model"])
    set_optimizer_state_dict(again.model, again.optimizer, state["optimizer"])
    again.schedule.load_state_dict(state["scheduler"])
    again.step = state["step"]
    assert again.step == SAVED * old // new
    whole = Run(new).train(EPOCHS * SIZE // new)
    rest = whole[again.step :]
    assert again.train(len(rest)) == pytest.approx(rest, rel=1e-9)
    twice = run("rebase-schedule", tmp_path / "new", tmp_path / "x", "--old-bs", new, "--new-bs", old)
    assert twice.code == 2 and "rebased-already" in twice.err


@pytest.mark.parametrize("name", ["fsdp2_ws2", "flat_ws2", "ddp_ws2"])
def test_counters_move_and_tensors_stay(name: str, tmp_path: Path) -> None:
    source = open_checkpoint(FIXTURES / "dcp" / name)
    how = ("--old-bs", 8, "--new-bs", 4, "--counters-only")
    ran = run("rebase-schedule", FIXTURES / "dcp" / name, tmp_path / "new", *how)
    assert ran.code == 0, ran.err
    made = open_checkpoint(tmp_path / "new")
    assert (source.training.step, made.training.step) == (3, 6)
    assert made.training.epoch == source.training.epoch
    assert run("digest", FIXTURES / "dcp" / name, "--compare", tmp_path / "new").out
    for before, after in zip(source.groups, made.groups, strict=True):
        assert dict(before.hyper) == dict(after.hyper) and before.params == after.params


def test_a_scheduler_of_no_known_class_is_refused(tmp_path: Path) -> None:
    """torchtitan's is a LambdaLR whose function is not in the checkpoint."""
    ran = run("rebase-schedule", FIXTURES / "dcp/step-3", tmp_path / "new", "--old-bs", 8, "--new-bs", 4)
    assert ran.code == 2 and not (tmp_path / "new").exists()
