"""How many ranks saved a checkpoint: as its files say, `?` where they do not, refused beyond any job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES

DEEPSPEED = "deepspeed-0.19.8"
SAVED = {
    f"{DEEPSPEED}/z0_bf16_ws2": 2,
    f"{DEEPSPEED}/z2_bf16_ws4": 4,
    f"{DEEPSPEED}/z3_fp32_ws2": 2,
    "universal/z2_groups": 2,
    "verl/actor_ws2": 2,
    "dcp/ddp_ws2": 2,
    "dcp/hsdp_ws4": 4,  # of two copies, of two shards each
    "dcp/tp_ws4": 4,
    "dcp/plain-sgd_ws1": None,  # rank 0 alone may have written for all
    "torch-writers/2.8.0/weights.pt": None,
    "torch-writers/2.8.0/epoch_1_step_2.pt": None,
}


@pytest.mark.parametrize("name", SAVED)
def test_ranks_are_those_of_the_files_or_unknown(name: str) -> None:
    shown = json.loads(run("inspect", FIXTURES / name, "--json").out)
    assert shown["ranks"] == SAVED[name]
    if (FIXTURES / name).is_dir():
        (listed,) = json.loads(run("ls", FIXTURES / name, "--json").out)["runs"][0]["checkpoints"]
        assert listed["ranks"] == SAVED[name]


def test_unknown_ranks_are_no_difference_of_one(tmp_path: Path) -> None:
    source = FIXTURES / DEEPSPEED / "z2_fp32_ws2"
    assert run("convert", source, tmp_path / "whole.pt", "--to", "pt").code == 0
    found = json.loads(run("diff", source, tmp_path / "whole.pt", "--json").out)
    assert found["layout"]["ranks"] == [2, None]


def edited(folder: Path, pattern: str, *keys: str, value: object) -> None:
    for path in folder.rglob(pattern):
        held: Any = torch.load(path, weights_only=False)
        inner = held
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        torch.save(held, path)


FORGED = {
    f"{DEEPSPEED}/z0_bf16_ws2": ("*model_states.pt", "dp_world_size"),
    f"{DEEPSPEED}/z2_fp32_ws2": ("*model_states.pt", "dp_world_size"),
    f"{DEEPSPEED}/z3_fp32_ws2": ("*model_states.pt", "dp_world_size"),
    "universal/z2_groups": ("*model_states.pt", "dp_world_size"),
}


@pytest.mark.parametrize("stated", [10**12, 0, -1])
@pytest.mark.parametrize("name", FORGED)
def test_no_work_for_ranks_that_no_job_has(name: str, stated: int, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(FIXTURES / name, copy)
    pattern, *keys = FORGED[name]
    edited(copy, pattern, *keys, value=stated)
    ran = run("verify", copy, "--json")
    assert ran.code == 1 and f"dp_world_size is {stated}" in ran.out, ran
    made = run("convert", copy, tmp_path / "out", "--to", "zero1")
    assert made.code == 1 and not (tmp_path / "out").exists(), made


def test_no_work_for_partitions_that_no_job_has(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(FIXTURES / DEEPSPEED / "z2_fp32_ws2", copy)
    edited(copy, "*model_states.pt", "dp_world_size", value=None)
    edited(copy, "*optim_states.pt", "optimizer_state_dict", "partition_count", value=[10**12])
    ran = run("verify", copy)
    assert ran.code == 1 and f"partition_count is {10**12}" in ran.out, ran
