"""Signals, full disks and damage at the moment of a save; starting from weights alone."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from trainer.launched import CKPT, Launch, load, losses

pytestmark = pytest.mark.distributed


def test_a_signal_saves_and_stops(launch: Launch, whole: Path, tmp_path: Path) -> None:
    """Two of them, one after the other: the run that goes on is the same."""
    run, before = tmp_path / "run", 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        command = [*CKPT, "train", str(launch.config), "--nproc=2", "--work-dir=run"]
        with subprocess.Popen(
            [*command, "--resume"] if before else command,
            cwd=tmp_path,
            env=launch.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout and process.stderr
            # before the first update: on a busy machine the last may be near when one shows
            next(process.stdout)
            process.send_signal(number)
            said, wrong = process.communicate()
        assert (process.returncode, wrong) == (128 + number, "")
        step = load(run / (run / "last_checkpoint").read_text() / "mp_rank_00_model_states.pt")["iter"]
        assert f"stopped by {number.name} at step {step}; --resume goes on from there" in said
        assert before < step < 22
        assert list(losses(run)) == list(range(1, step + 1))
        before = step
    launch.train(tmp_path, "--work-dir=run", "--resume")
    assert losses(run) == losses(whole)  # to the last bit


def test_a_save_that_fails_leaves_what_was_there(launch: Launch, whole: Path, tmp_path: Path) -> None:
    run, tag = tmp_path / "run", "iter_000006.pth"
    shutil.copytree(whole, run, ignore=lambda _, names: [n for n in names if n.endswith(".pth") and n != tag])
    for pointer in ("last_checkpoint", "latest"):
        (run / pointer).write_text(tag)
    log = run / "train_log.jsonl"
    first = [
        line for line in log.read_text().splitlines(keepends=True) if json.loads(line).get("step", 0) <= 6
    ]
    log.write_text("".join(first))
    size = max(p.stat().st_size for p in (run / tag).iterdir())

    def full() -> None:  # the file system takes no file of that size any more
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [*CKPT, "train", str(launch.config), "--nproc=2", "--work-dir=run", "--resume"]
    failed = subprocess.run(
        command, cwd=tmp_path, env=launch.environment, capture_output=True, text=True, preexec_fn=full
    )
    assert failed.returncode in (1, 2), failed.stdout
    assert failed.stderr.startswith("error[")
    assert "Traceback" not in failed.stderr
    assert [p.name for p in run.glob("*.pth")] == [tag]
    assert (run / "last_checkpoint").read_text() == (run / "latest").read_text() == tag
    assert launch.train(tmp_path, "--work-dir=run", "--resume", "-q") == "run\n"
    assert losses(run) == losses(whole)
    assert not list(run.glob(".*ckpt-tmp*"))


@pytest.mark.heavy
def test_weights_and_position_alone(launch: Launch, whole: Path, tmp_path: Path) -> None:
    source = whole / "iter_000012.pth"
    said = launch.train(
        tmp_path, "--resume", f"--resume-from={source}", "--reset-optimizer", "--work-dir=run", nproc=1
    )
    assert "optimizer and schedule start anew; weights and position are the checkpoint's" in said
    found = losses(tmp_path / "run")
    assert list(found) == list(range(13, 23))  # the samples after those of step 12
    loss, lr, _ = found[13]
    assert lr == 0.0
    assert loss == pytest.approx(losses(whole)[13][0], abs=1e-3)  # the same weights on the same samples


def test_from_a_folder_of_transformers(launch: Launch, whole: Path, tmp_path: Path) -> None:
    made = launch.ckpt(tmp_path, "extract", whole / "epoch_002.pth", "hf", "--weights-only")
    assert made.returncode == 0, made.stderr
    told = launch.tried(tmp_path, "--resume-from=hf", "--work-dir=run", "--max-steps=1", "--json")
    assert json.loads(told.stdout) == {"ok": True, "exit_code": 0, "run": "run"}, told.stderr
    assert "Weights loaded from hf; optimizer, schedule and counters start anew" in told.stderr
    assert "saved run/iter_000001.pth" in told.stderr
    assert losses(tmp_path / "run")[1][0] < losses(whole)[1][0] - 1.5


@pytest.mark.heavy
def test_more_epochs_than_planned(launch: Launch, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    said = launch.train(tmp_path, "--work-dir=run", "--resume", "--set=epochs=3")
    assert "careful: scheduler.params.total_num_steps: 22 -> 33" in said
    assert list(losses(tmp_path / "run")) == list(range(1, 34))
