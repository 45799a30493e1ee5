"""The next steps that every writing command ends with: carried out as they stand."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from commands import run
from support import FIXTURES

ZERO = FIXTURES / "deepspeed-0.19.8" / "z2_bf16_ws2"
TRAINER = FIXTURES / "hf-trainer" / "deepspeed" / "checkpoint-2"
FILE = FIXTURES / "monolithic" / "full" / "epoch_2_step_40.pt"
CALLS: dict[str, tuple[str, list[object], str, list[object]]] = {
    "reshard": ("reshard", [ZERO], "out", ["--world-size", 3]),
    "reshard of the Trainer's": ("reshard", [TRAINER], "out", ["--world-size", 3]),
    "rebase": ("rebase-schedule", [TRAINER], "out", ["--new-bs", 1]),
    "extract": ("extract", [ZERO], "out", []),
    "extract with a configuration": ("extract", [TRAINER], "out", []),
    "extract to one file": ("extract", [ZERO], "out.safetensors", []),
    "extract to pt": ("extract", [ZERO], "out.pt", []),
    "copy": ("copy", [FILE], "out.pt", []),
    "average": ("average", [ZERO, FIXTURES / "deepspeed-0.19.8" / "z2_bf16_ws4", "-o"], "out", []),
    "weights": ("convert", [ZERO], "out", ["--to", "hf"]),
    "weights with a configuration": ("convert", [TRAINER], "out", ["--to", "hf"]),
}
LAUNCHED = ("deepspeed --num_gpus", "torchrun --nproc-per-node")


@pytest.mark.parametrize("name", CALLS)
def test_each_can_be_carried_out(name: str, tmp_path: Path) -> None:
    command, sources, target, options = CALLS[name]
    ran = run(command, *sources, tmp_path / target, *options, "--json")
    assert ran.code == 0, ran.out + ran.err
    steps = json.loads(ran.out)["next"]
    assert steps[0] == f"ckpt verify {tmp_path / target}"
    import safetensors.torch
    import torch
    import transformers

    known = {"safetensors": safetensors, "torch": torch, "transformers": transformers}
    for step in steps:
        if step.startswith("ckpt "):
            done = run(*shlex.split(step)[1:])
            assert done.code == 0, (step, done.out, done.err)
        elif not step.startswith(LAUNCHED):
            exec(step, dict(known))
        assert str(tmp_path / target) in step
