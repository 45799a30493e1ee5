"""`ckpt train` resumed in the middle of an epoch after a rebase, against a run that had the new batch always.

179 samples: 11 updates per epoch of 16, 22 of 8, 5 of 32; partial batches are dropped. The log has the
learning rate of each update; which samples an update took follows from the position and the trainer's order.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run

from ckpttools.trainer.order import Order

pytestmark = pytest.mark.distributed
CONFIG = """
experiment: tiny
epochs: 3
model: {family: llama, hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2}
data: {max_bytes: 12000, sequence_length: 64, validation_samples: 8}
batch: {global_batch_size: 16, micro_batch_size: 4}
optimizer: {lr: 1e-2}
schedule: {warmup_steps: 11}
save: {save_steps: 4}
"""
SIZE, OLD = 179, 16
WARMUP = {8: 22, 16: 11, 32: 5}  # of one epoch


def train(cwd: Path, environment: dict[str, str], *options: object) -> None:
    command = [sys.executable, "-m", "ckpttools.cli", "train", "tiny.yaml", "--nproc=2", *map(str, options)]
    (cwd / "tiny.yaml").write_text(CONFIG)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def rates(folder: Path) -> dict[int, float]:
    """The learning rate of each update, by its number."""
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return {r["step"]: r["lr"] for r in lines if "lr" in r}


def batch(size: int) -> list[str]:
    return [f"--set=batch.global_batch_size={size}", f"--set=schedule.warmup_steps={WARMUP[size]}"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Callable[[int], Path]:
    """The whole run of a batch size, from scratch."""
    folder = tmp_path_factory.mktemp("reference")

    @functools.cache
    def of(size: int) -> Path:
        train(folder, environment, "--work-dir", f"scratch{size}", *batch(size))
        return folder / f"scratch{size}"

    return of


@pytest.mark.parametrize(
    ("new", "tag", "expected"),
    [
        # 20 updates of 16 are 9 in the second epoch, 144 samples: 4 of 32, after the 5 of an epoch
        pytest.param(32, "iter_000020.pth", 5 + 4, marks=pytest.mark.heavy),
        pytest.param(32, "epoch_001.pth", 5, marks=pytest.mark.heavy),
        pytest.param(32, "iter_000004.pth", 2, marks=pytest.mark.heavy),
        pytest.param(8, "iter_000004.pth", 8, marks=pytest.mark.heavy),
        pytest.param(8, "epoch_002.pth", 44, marks=pytest.mark.heavy),
        pytest.param(8, "iter_000020.pth", 22 + 18, marks=pytest.mark.heavy),
        pytest.param(8, "iter_000032.pth", 44 + 20, marks=pytest.mark.heavy),
    ],
)
def test_goes_on_as_from_scratch(
    scratch: Callable[[int], Path],
    environment: dict[str, str],
    tmp_path: Path,
    new: int,
    tag: str,
    expected: int,
) -> None:
    source = scratch(OLD) / tag
    (tmp_path / "run").mkdir()
    done = run("rebase-schedule", source, tmp_path / "run" / tag, f"--old-bs={OLD}", f"--new-bs={new}")
    assert done.code == 0, done.out + done.err
    for path, name in ((tmp_path / "run" / tag, "rebased"), (source, "stale")):
        options = ["--resume", "--resume-from", path, "--work-dir", name]
        train(tmp_path, environment, *options, *batch(new))
    truth = rates(scratch(new))
    ours, stale = rates(tmp_path / "rebased"), rates(tmp_path / "stale")

    assert ours == {step: lr for step, lr in truth.items() if step > expected}
    assert list(stale.values()) != list(ours.values())
    # the trainer's own position counts samples: it goes on at the very next one, none is seen twice
    saved, state = (
        torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
        for folder in (source, tmp_path / "run" / tag)
    )
    for key in ("epoch", "samples_in_epoch", "dataset_size", "seed"):
        assert state[key] == saved[key], key
    # and makes as many updates until the end of the epoch as the run from scratch
    order = Order(dataset_size=SIZE, global_batch_size=new, seed=state["seed"])
    epoch, inside = divmod(expected, order.updates_per_epoch)
    assert state["epoch"] == epoch
    left = list(order.batches(epoch, state["samples_in_epoch"]))
    assert len(left) == order.updates_per_epoch - inside
    assert left[0][0] == order.permutation(epoch)[saved["samples_in_epoch"]]
