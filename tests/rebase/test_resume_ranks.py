"""Rebased checkpoints resumed under torchrun by DeepSpeed, the Trainer and accelerate (see resumed.py)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed import Batch, Case, Framework, Groups, check, check_all, groups_of, named, schedules_of

pytestmark = pytest.mark.distributed


def ds_config(saved: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's parameters of the old ds_config, with those that the command says the new run needs."""
    (model, *_) = sorted(saved.glob("*mp_rank_00_model_states.pt"))
    state = torch.load(model, weights_only=False)
    scheduler = state["ds_config"].get("scheduler")
    if scheduler is None:  # the client's
        return {}
    prefix = "scheduler.params."
    said = [s for s in report["settings"] if s["where"] == "ds_config" and "." in s["name"]]
    new = {s["name"]: s["new"] for s in said}
    return scheduler["params"] | {name.removeprefix(prefix): value for name, value in new.items()}


DEEPSPEED = Framework(
    script="train_deepspeed",
    remainder="running",
    place=lambda folder, case: folder / "save" / f"global_step{case.at}",
    launcher="torchrun",
    settings=ds_config,
)
TRAINER = Framework(
    script="train_trainer", place=lambda folder, case: folder / f"checkpoint-{case.at}", launcher="torchrun"
)
ACCELERATE = Framework(
    script="train_accelerate",
    place=lambda folder, case: folder / "checkpoints" / f"checkpoint_{case.at}",
    launcher="torchrun",
    options=("--schedule-unit", "update"),  # SGD counts none
)
FRAMEWORKS = {"deepspeed": DEEPSPEED, "trainer": TRAINER, "accelerate": ACCELERATE}

OWN = (
    "WarmupLR-linear",
    "WarmupLR-log",
    "WarmupDecayLR",
    "WarmupDecayLR-log",
    "WarmupCosineLR",
    "OneCycle",
    "LRRangeTest",
    "LRRangeTest-staircase",
)
UNKNOWN = "client-LambdaLR"  # its function is not in the checkpoint
ZERO3 = "zero3-"  # under stage 3, in the same process group
CLIENT = (UNKNOWN, "client-CosineAnnealingLR", "client-SequentialLR")

OLD = Batch(micro=4, ranks=2)  # 50 samples: 7 updates per epoch; 48: 6
HALF, DOUBLE = Batch(micro=2, ranks=2), Batch(micro=8, ranks=2)
ACCUMULATED = Batch(micro=4, accumulation=2, ranks=2)
ONE_RANK = Batch(micro=4, ranks=1)


def cases(
    schedules: tuple[str, ...],
    batches: tuple[Batch, ...],
    places: tuple[int, ...],
    sizes: tuple[int, ...] = (50,),
    old: Batch = OLD,
) -> list[Case]:
    return [
        Case(schedule=schedule, at=at, old=old, new=new, size=size)
        for schedule in schedules
        for size in sizes
        for new in batches
        for at in places
    ]


DEFAULT = {
    # within the third epoch, in the warmup, at the end of the second epoch
    "deepspeed": [
        *cases((*OWN, *CLIENT), (HALF,), (16,)),
        *cases(("WarmupCosineLR", *CLIENT), (DOUBLE,), (3,)),
        *cases(("WarmupCosineLR", "client-SequentialLR"), (ACCUMULATED,), (14, 16)),
        *cases((ZERO3 + "WarmupCosineLR",), (HALF,), (16,)),
        *cases((ZERO3 + "client-SequentialLR",), (ACCUMULATED,), (14,)),
    ],
    "trainer": [
        *cases(("linear",), (HALF,), (16,)),
        *cases(("cosine-zero", "WarmupDecayLR-zero"), (DOUBLE,), (16,)),
    ],
    "accelerate": [*cases(("OneCycleLR",), (DOUBLE,), (3,))],
}
MORE = (
    *(Batch(micro=n, ranks=2) for n in (1, 2, 3, 6, 8)),
    ACCUMULATED,
    Batch(micro=2, accumulation=4, ranks=2),
)
PLACES = (3, 5, 14, 16, 23)


def grid(*schedules: str) -> list[Case]:
    return [*cases(schedules, MORE, PLACES), *cases(schedules, (HALF, DOUBLE), PLACES, (48,))]


HEAVY = {
    "deepspeed": [
        *grid(*OWN, *CLIENT),
        *cases(OWN, (DOUBLE,), (3,)),
        *cases((*OWN, *CLIENT), (ONE_RANK, Batch(micro=2, accumulation=3, ranks=3)), (3, 16)),
        # 3 updates per epoch of 48 samples; 50 would make 3.5, and a warmup of an epoch could not be whole
        *cases(("WarmupCosineLR", "client-SequentialLR"), (OLD, HALF), (2, 10), (48,), ACCUMULATED),
        *cases(tuple(ZERO3 + name for name in (*OWN, *CLIENT)), (HALF, DOUBLE), (3, 16)),
    ],
    "trainer": grid("linear", "cosine", "linear-zero", "cosine-zero", "WarmupDecayLR-zero"),
    "accelerate": grid("CosineAnnealingLR", "OneCycleLR", "SequentialLR"),
}


def check_case(found: Groups, name: str, case: Case) -> None:
    resumed = found(name)[case]
    within = 0.0
    if case.schedule.removeprefix(ZERO3) == UNKNOWN:
        # the first learning rate stays what it was: off by less than the longer of their steps
        rates = [r["lr"][0] for r in resumed.truth.records]
        around = rates[max(0, resumed.at - 2) : resumed.at + 2]
        within = max(abs(a - b) for a, b in itertools.pairwise(around))
        within *= max(1, case.old.total / case.new.total)
    check(resumed, FRAMEWORKS[name], first_within=within)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Groups:
    return groups_of(FRAMEWORKS, DEFAULT, tmp_path_factory.mktemp("ranks"), environment)


@pytest.fixture(scope="module")
def resumed_all(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Groups:
    return groups_of(FRAMEWORKS, HEAVY, tmp_path_factory.mktemp("ranks-all"), environment)


@pytest.mark.parametrize(("name", "case"), named(DEFAULT))
def test_goes_on_as_from_scratch(resumed: Groups, name: str, case: Case) -> None:
    check_case(resumed, name, case)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "schedule"), schedules_of(HEAVY))
def test_goes_on_as_from_scratch_everywhere(resumed_all: Groups, name: str, schedule: str) -> None:
    check_all(resumed_all(name), schedule, lambda case: check_case(resumed_all, name, case))
