"""A config so small that starting the ranks is most of a run's time, and the environment for them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from trainer.launched import Launch

# 12001 tokens make 187 samples; 8 are held out, so an epoch has (187 - 8) // 16 = 11 updates.
CONFIG = """
experiment: tiny
epochs: 2
model: {family: llama, hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
data: {max_bytes: 12000, sequence_length: 64, validation_samples: 8}
batch: {global_batch_size: 16, micro_batch_size: 4}
optimizer: {lr: 1e-2}
schedule: {warmup_steps: 3}
save: {save_steps: 6}
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Children compute on the CPU; what DeepSpeed compiles is compiled once."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or str(tmp_path_factory.mktemp("extensions"))
    ours = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, "TORCH_EXTENSIONS_DIR": extensions}


@pytest.fixture(scope="session")
def launch(config: Path, environment: dict[str, str]) -> Launch:
    return Launch(config, environment)


@pytest.fixture(scope="session")
def whole(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never interrupted: two epochs of 11 updates. All workers of a session share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "said").exists():
            said = launch.train(folder, "--work-dir=run")
            (folder / "said").write_text(said)
    return folder / "run"
