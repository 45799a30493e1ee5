"""The forecast against the owner library itself: a run is saved, and started again as it was.

The scripts are those of tests/rebase: plain torch, OpenPCDet's loop, accelerate, Lightning, transformers'
Trainer, each in a process of its own. It must go on at the step that was foretold, make its first two updates
with the learning rates foretold, and where the run was called finished, make none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpttools.resume import Forecast, NewRun, Target, foretell

SCRIPTS = Path(__file__).parent.parent / "rebase"
SIZE, MICRO, EPOCHS = 8, 2, 3
PER_EPOCH = SIZE // MICRO
PLACES = (3, PER_EPOCH + 1, EPOCHS * PER_EPOCH)  # within an epoch, in the second, at the end of the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """`place` is where the checkpoint of a count lies in a run's folder; `computed`: the first learning rate
    is not the saved one, which the forecast says.
    """

    script: str
    schedules: tuple[str, ...]
    place: Callable[[int], str]
    computed: bool = False
    total: bool = False  # the checkpoint says how long the run is
    counted: bool = True  # by something in the checkpoint: with SGD accelerate saves no count of updates


OWNERS = {
    "plain": Owner(
        script="train_plain",
        schedules=("CosineAnnealingLR", "StepLR", "SequentialLR", "OneCycleLR", "PolynomialLR", "LinearLR",
                   "CyclicLR", "ChainedScheduler", "MultiStepLR"),
        place=lambda at: f"epoch_{at // PER_EPOCH}_step_{at}.pt",
    ),
    "openpcdet": Owner(
        script="train_openpcdet",
        schedules=("onecycle",),
        place=lambda at: f"ckpt{at}/"
        + (f"checkpoint_epoch_{at // PER_EPOCH}.pth" if at % PER_EPOCH == 0 else "latest_model.pth"),
        computed=True,
    ),
    "accelerate": Owner(
        script="train_accelerate",
        schedules=("CosineAnnealingLR", "OneCycleLR", "SequentialLR"),
        place=lambda at: f"checkpoints/checkpoint_{at}",
        counted=False,
    ),
    "lightning": Owner(
        script="train_lightning",
        schedules=("CosineAnnealingLR", "OneCycleLR", "SequentialLR"),
        place=lambda at: f"epoch={-(-at // PER_EPOCH) - 1}-step={at}.ckpt",
    ),
    "trainer": Owner(
        script="train_trainer",
        schedules=("cosine", "linear", "polynomial", "warmup_stable_decay"),
        place=lambda at: f"checkpoint-{at}",
        total=True,
    ),
}  # fmt: skip


def start(script: str, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Carry jobs out in one process of the framework."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    ours = {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    ran = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), str(listed)],
        env={**os.environ, **ours},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def against(owner: Owner, schedule: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    run = folder / "run"
    run.mkdir()
    places = {at: run / owner.place(at) for at in PLACES}
    common = {"schedule": schedule, "size": SIZE, "epochs": EPOCHS, "micro": MICRO}
    jobs: list[dict[str, Any]] = [
        {**common, "out": str(folder / "run.json"), "folder": str(run),
         "saves": {str(at): str(path) for at, path in places.items()}}
    ]  # fmt: skip
    for at, path in places.items():
        (folder / f"again{at}").mkdir()
        out = {"out": str(folder / f"again{at}.json"), "folder": str(folder / f"again{at}")}
        jobs.append({**common, **out, "saves": {}, "resume": str(path)})
    start(owner.script, jobs, folder)
    for at, path in places.items():
        real = json.loads((folder / f"again{at}.json").read_text())
        assert real["error"] is None, real["error"]
        _compare(owner, foretell(Target.find(path), NewRun()), at, real["records"])


def _compare(owner: Owner, forecast: Forecast, at: int, records: list[dict[str, Any]]) -> None:
    length = next(check for check in forecast.checks if check.name == "length")
    if not records:
        assert at == PLACES[-1]
        assert length.ok is (False if owner.total or not owner.counted else None)  # said, or not known
        assert forecast.verdict == "careful" or not owner.total
        return
    assert forecast.resumes and at == records[0]["at"]
    assert forecast.step == (at if owner.counted else None)
    if not owner.counted:
        assert records[0]["lr"] == pytest.approx(forecast.rates.first, rel=1e-12, abs=1e-18)
        assert forecast.rates.next is None and "is not saved" in forecast.rates.note
        assert forecast.verdict == "careful"
        return
    assert length.ok is (True if owner.total else None)
    if owner.computed:
        assert "computes it anew" in forecast.rates.note
        return
    assert records[0]["lr"] == pytest.approx(forecast.rates.first, rel=1e-12, abs=1e-18)
    assert forecast.rates.next is not None
    assert records[1]["lr"] == pytest.approx(forecast.rates.next, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", OWNERS)
def test_the_owner_goes_on_as_foretold(name: str, tmp_path: Path) -> None:
    against(OWNERS[name], OWNERS[name].schedules[0], tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "schedule"), [(n, s) for n, o in OWNERS.items() for s in o.schedules[1:]])
def test_the_owner_goes_on_as_foretold_with_every_schedule(name: str, schedule: str, tmp_path: Path) -> None:
    against(OWNERS[name], schedule, tmp_path)
