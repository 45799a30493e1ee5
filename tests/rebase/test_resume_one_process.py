"""Rebased checkpoints resumed for real by frameworks that need one process (see resumed.py)."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import pytest
from resumed import Batch, Case, Framework, Groups, check, check_all, groups_of, named, schedules_of

OLD = Batch(micro=4)


def epochs(case: Case) -> Fraction:
    return Fraction(case.at, ceil(case.size / OLD.micro))


# of 13 updates per epoch: in the warmup; within the third epoch; at the end of the third
PLACES = (5, 30, 39)

PLAIN = Framework(
    script="train_plain",
    place=lambda folder, case: folder / f"epoch_{floor(epochs(case))}_step_{case.at}.pt",
)
LIGHTNING = Framework(
    script="train_lightning",
    place=lambda folder, case: folder / f"epoch={ceil(epochs(case)) - 1}-step={case.at}.ckpt",
    finds=False,  # its loader starts the epoch again, and stops early
)
OPENPCDET = Framework(
    script="train_openpcdet",
    unit="micro",
    # each in a folder of its own, as there is but one latest_model
    place=lambda folder, case: (
        folder
        / f"ckpt{case.at}"
        / ("latest_model.pth" if epochs(case).denominator > 1 else f"checkpoint_epoch_{epochs(case)}.pth")
    ),
    finds=False,
)
ACCELERATE = Framework(
    script="train_accelerate",
    place=lambda folder, case: folder / "checkpoints" / f"checkpoint_{case.at}",
    options=("--schedule-unit", "update"),  # SGD counts none
)
TRAINER = Framework(script="train_trainer", place=lambda folder, case: folder / f"checkpoint-{case.at}")
FRAMEWORKS = {
    "plain": PLAIN,
    "lightning": LIGHTNING,
    "openpcdet": OPENPCDET,
    "accelerate": ACCELERATE,
    "trainer": TRAINER,
}

OF_TORCH = (
    "StepLR",
    "MultiStepLR",
    "PolynomialLR",
    "LinearLR",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "OneCycleLR",
    "SequentialLR",
    "ChainedScheduler",
)
SCHEDULES = {
    "plain": OF_TORCH,
    "lightning": ("CosineAnnealingLR", "OneCycleLR", "SequentialLR"),
    "openpcdet": ("onecycle",),
    "accelerate": ("CosineAnnealingLR", "OneCycleLR", "SequentialLR"),
    "trainer": ("linear", "cosine", "polynomial", "constant_with_warmup", "warmup_stable_decay"),
}


def cases(
    name: str, sizes: tuple[int, ...], batches: tuple[Batch, ...], places: tuple[int, ...]
) -> list[Case]:
    return [
        Case(schedule=schedule, at=at, old=OLD, new=new, size=size)
        for schedule in SCHEDULES[name]
        for size in sizes
        for new in batches
        for at in places
    ]


HALF, DOUBLE = Batch(micro=2), Batch(micro=8)
DEFAULT = {
    "plain": cases("plain", (50,), (HALF, DOUBLE), PLACES),
    "openpcdet": cases("openpcdet", (50,), (HALF, DOUBLE), PLACES),
} | {
    name: [*cases(name, (50,), (DOUBLE,), (5, 39)), *cases(name, (50,), (HALF,), (30,))]
    for name in ("lightning", "accelerate", "trainer")
}
MORE = (
    Batch(micro=1),
    HALF,
    Batch(micro=3),
    Batch(micro=6),
    DOUBLE,
    Batch(micro=16),
    Batch(micro=4, accumulation=2),
)
HEAVY = {
    # OpenPCDet has no accumulation
    name: cases(name, (50, 48, 47), MORE[:-1] if name == "openpcdet" else MORE, (3, *PLACES, 46))
    for name in FRAMEWORKS
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Groups:
    return groups_of(FRAMEWORKS, DEFAULT, tmp_path_factory.mktemp("resumed"), environment)


@pytest.fixture(scope="module")
def resumed_all(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Groups:
    return groups_of(FRAMEWORKS, HEAVY, tmp_path_factory.mktemp("resumed-all"), environment)


@pytest.mark.parametrize(("name", "case"), named(DEFAULT))
def test_goes_on_as_from_scratch(resumed: Groups, name: str, case: Case) -> None:
    check(resumed(name)[case], FRAMEWORKS[name])


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "schedule"), schedules_of(HEAVY))
def test_goes_on_as_from_scratch_everywhere(resumed_all: Groups, name: str, schedule: str) -> None:
    check_all(resumed_all(name), schedule, lambda case: check(resumed_all(name)[case], FRAMEWORKS[name]))
