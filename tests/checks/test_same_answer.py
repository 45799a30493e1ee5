"""verify and ls give one answer about a file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES


@pytest.mark.parametrize("step", [-5, 10**16, 7])
def test_a_wild_counter_is_damage_wherever_it_is_looked_at(tmp_path: Path, step: int) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    state = {"model.weight": weight.data}
    optimizer = torch.optim.AdamW([weight]).state_dict()
    path = tmp_path / "step_7.pt"
    torch.save({"state_dict": state, "optimizer": optimizer, "global_step": step, "epoch": 1}, path)
    (listed,) = json.loads(run("ls", tmp_path, "--json").out)["runs"]
    damaged = any("damaged" in mark for each in listed["checkpoints"] for mark in each["marks"])
    for options in ([], ["--quick"]):
        ran = run("verify", path, *options)
        assert (ran.code == 1) is damaged is (step != 7), ran.out
        assert ("[counter-wild]" in ran.out) is damaged


@pytest.mark.parametrize(("total", "epochs", "shown"), [(4, 1, 0.25), (8, 1, 0.25), (16, 2, 0.25)])
def test_the_epoch_of_a_trainer_without_its_arguments(
    tmp_path: Path, total: int, epochs: int, shown: float
) -> None:
    """max_steps may be fewer than the epochs have: what trainer_state.json says is shown everywhere."""
    path = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "hf-trainer" / "plain" / "checkpoint-2", path)
    (path / "training_args.bin").unlink()
    file = path / "trainer_state.json"
    said = {"global_step": 2, "max_steps": total, "num_train_epochs": epochs, "epoch": 0.25}
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    (listed,) = json.loads(run("ls", tmp_path, "--json").out)["runs"]
    assert [each["epoch"] for each in listed["checkpoints"]] == [shown]
    assert f"(epoch {shown}" in run("inspect", path).out


def test_epoch_0_of_a_run_that_counts_iterations_is_left_out(tmp_path: Path) -> None:
    """It says 0 to its end: no answer shows it beside the step, and the document keeps what is saved."""
    source = FIXTURES / "mmengine-deepspeed/iter_50.pth"
    for words in (["verify"], ["verify", "--quick"], ["resume-check"], ["inspect"]):
        ran = run(*words, source)
        assert ran.code == 0 and not re.search(r"epoch 0\b", ran.out), ran.out
    path = tmp_path / "a.pt"  # at the very start 0 is what a run of epochs says, too
    torch.save({"model": {"w": torch.zeros(2)}, "epoch": 0, "global_step": 0}, path)
    assert "epoch 0" in run("verify", path).out
    torch.save({"model": {"w": torch.zeros(2)}, "epoch": 0, "global_step": 7}, path)
    assert "epoch 0" not in run("verify", path).out
    (found,) = json.loads(run("verify", path, "--json").out)["checkpoints"]
    assert (found["step"], found["epoch"]) == (7, 0)
