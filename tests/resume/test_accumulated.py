"""Schedules of micro-batches, where several of them make an update: its rate is that of the last."""

from __future__ import annotations

import json

import pytest
from commands import run
from support import FIXTURES

from ckpttools.resume.rates import ahead
from ckpttools.schedules.evidence import Fact
from ckpttools.training import SavedSchedule, Training

MMENGINE = FIXTURES / "mmengine-deepspeed" / "iter_50.pth"  # 2 micro-batches make an update, 52 the run
LAST = 0.00016213459328950363  # with which DeepSpeed made the last update of a run resumed from its like


def test_the_rate_of_the_update_and_not_of_the_next_micro_batch() -> None:
    told = json.loads(run("resume-check", MMENGINE, "--json").out)["lr"]
    assert told["first"] == pytest.approx(LAST, rel=1e-12)
    assert told["next"] is None and "the run ends" in told["note"]


@pytest.mark.parametrize(
    ("count", "parts", "engine", "expected"),
    [
        (40, 1, False, 0), (40, 2, False, 1), (41, 2, False, 0), (41, 2, True, 1), (40, 3, False, 1),
        (40, None, False, None), (None, 2, False, None), (None, 2, True, 1),
    ],
)  # fmt: skip
def test_steps_to_the_next_update(
    count: int | None, parts: int | None, engine: bool, expected: int | None
) -> None:
    facts = () if parts is None else (Fact("accumulation", parts, parts, "a setting"),)
    training = Training(framework="mmengine", unit="micro", count=count, evidence=facts)
    schedule = SavedSchedule(name="s", framework="mmengine", states=(), places=(), unit="micro")
    assert ahead(training, schedule, engine=engine) == expected
    by_update = SavedSchedule(name="s", framework="mmengine", states=(), places=(), unit="update")
    assert ahead(training, by_update, engine=engine) == 0
