"""`--spread` under a real Slurm of two virtual nodes; `oracles/slurm.sh` starts one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import FIXTURES

from ckpttools.siblings import MANIFEST, SPREAD

CONF = os.environ.get("CKPT_SLURM_CONF", "")
SOURCE = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
CKPT = [sys.executable, "-m", "ckpttools.cli"]

pytestmark = pytest.mark.skipif(not CONF, reason="no Slurm here: CKPT_SLURM_CONF names no slurm.conf")


def launch(*command: object, folder: Path) -> str:
    environment = {**os.environ, "SLURM_CONF": CONF, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def reshard(dst: Path, *more: str) -> list[str]:
    return [*CKPT, "reshard", str(SOURCE), str(dst), "--world-size", "4", *more]


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def want(tmp_path: Path) -> dict[str, bytes]:
    launch(*reshard(tmp_path / "one"), folder=tmp_path)
    return contents(tmp_path / "one")


def test_srun(want: dict[str, bytes], tmp_path: Path) -> None:
    dst = tmp_path / "many"
    out = launch(
        "srun", "--nodes=2", "--ntasks=4", "--overcommit", *reshard(dst, "--spread"), folder=tmp_path
    )
    assert out == f"{dst}\n"
    assert contents(dst) == want


def test_an_array_of_which_one_task_runs_at_a_time(want: dict[str, bytes], tmp_path: Path) -> None:
    dst = tmp_path / "many"
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\nexec " + " ".join(f"'{part}'" for part in reshard(dst, "--spread")) + "\n")
    launch("sbatch", "--wait", "--array=0-2%1", script, folder=tmp_path)
    assert contents(dst) == want
    assert not dst.with_name(dst.name + SPREAD).exists()
