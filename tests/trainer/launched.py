"""Launching `ckpt train` on the tiny config, and reading what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

CKPT = [sys.executable, "-m", "ckpttools.cli"]


class Launch:
    """`ckpt` in a folder; what goes wrong there is for the test to judge."""

    def __init__(self, config: Path, environment: dict[str, str]) -> None:
        self.config, self.environment = config, environment

    def ckpt(self, cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*CKPT, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True)

    def tried(self, cwd: Path, *options: object, nproc: int = 2) -> subprocess.CompletedProcess[str]:
        """`ckpt train`, whatever becomes of it."""
        return self.ckpt(cwd, "train", self.config, f"--nproc={nproc}", *options)

    def train(self, cwd: Path, *options: object, nproc: int = 2) -> str:
        """What it printed; it must have succeeded."""
        done = self.tried(cwd, *options, nproc=nproc)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, tuple[float, float, float]]:
    """Loss, learning rate and gradient norm by step; a later line for a step counts."""
    return {int(r["step"]): (r["loss"], r["lr"], r["grad_norm"]) for r in records(run) if "loss" in r}


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content
