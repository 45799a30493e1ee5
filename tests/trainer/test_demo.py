"""`ckpt demo`: the whole story with every command, and a verdict that can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ckpttools.cli import demo
from ckpttools.errors import UsageError


def test_the_verdict_is_the_exit_code(tmp_path: Path) -> None:
    for run, loss in {"run": 3.0, "resumed": 3.0 + demo.TOLERANCE / 2}.items():
        (tmp_path / run).mkdir()
        (tmp_path / run / "train_log.jsonl").write_text(json.dumps({"step": 13, "loss": loss}) + "\n")
    assert demo._compare_losses(tmp_path).ok
    with (tmp_path / "resumed/train_log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 13, "loss": 3.0 + demo.TOLERANCE * 2}) + "\n")
    assert not demo._compare_losses(tmp_path).ok


def test_another_schedule_is_the_exit_code(tmp_path: Path) -> None:
    rates = {"run": {32: 1e-3, 64: 9e-4, 96: 8e-4}, "rebased": {48: 9.2e-4, 64: 8.7e-4, 80: 8.2e-4}}
    for run, log in rates.items():
        (tmp_path / run).mkdir()
        lines = [json.dumps({"samples_seen": seen, "loss": 3.0, "lr": lr}) for seen, lr in log.items()]
        (tmp_path / run / "train_log.jsonl").write_text("\n".join(lines) + "\n")
    assert demo._compare_rates(tmp_path).ok
    log = tmp_path / "rebased/train_log.jsonl"
    log.write_text(log.read_text().replace("0.00082", "0.0005"))
    assert not demo._compare_rates(tmp_path).ok


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    result = CliRunner().invoke(demo.command, [str(tmp_path)])
    assert isinstance(result.exception, UsageError)
    assert result.exception.id == "destination-exists"


@pytest.mark.distributed
def test_from_training_to_resuming_on_four_ranks(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", "from ckpttools.cli import main; main()", "demo", str(tmp_path / "new")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [line.removeprefix("$ ckpt ") for line in done.stdout.splitlines() if line.startswith("$ ckpt ")]
    assert shown == list(demo.COMMANDS)
    assert "equal within rounding" in done.stdout
    assert "the same schedule" in done.stdout
