"""Findings that need a whole run or several fields: pointers and schedules. (tests/faults holds the rest.)"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from support import FIXTURES

from ckpttools.checks import verify


def warnings(path: Path) -> dict[str, str]:
    return {f.id: f.where for f in verify(path).findings if f.severity == "warning"}


def test_a_schedule_that_contradicts_the_optimizer(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "deepspeed-0.19.8" / "z2_clientsched_ws2", tmp_path / "run")
    assert warnings(folder) == {}
    (path,) = folder.glob("*/mp_rank_00_model_states.pt")
    state = torch.load(path, weights_only=False)
    state["lr_scheduler"]["_last_lr"][0] *= 2
    torch.save(state, path)
    assert warnings(folder) == {"scheduler-mismatch": "lr_scheduler._last_lr[0]"}


def test_a_pointer_that_leads_nowhere(tmp_path: Path) -> None:
    run = shutil.copytree(FIXTURES / "mmengine" / "run", tmp_path / "run")
    assert warnings(run) == {}  # its text is the absolute path of another machine: the name is what counts
    (run / "last_checkpoint").write_text("/elsewhere/iter_2000.pth")
    assert warnings(run) == {"pointer-dangling": ""}
    (run / "last_checkpoint").unlink()
    assert warnings(run) == {"latest-missing": "latest"}
