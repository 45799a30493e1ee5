"""Rebased checkpoints resumed for real by MMEngine, in an environment of its own (see resumed.py).

Its interpreter is named by CKPT_MMENGINE_PYTHON. Without it the heavy tests build one with
oracles/mmengine_env.sh, once, in the user's cache folder, and the others are skipped.
"""

from __future__ import annotations

import os
import subprocess
from math import ceil
from pathlib import Path
from typing import Literal

import pytest
from resumed import Batch, Case, Framework, Groups, check, check_all, groups_of, named, schedules_of

pytestmark = pytest.mark.distributed
BUILD = Path(__file__).parent.parent / "oracles" / "mmengine_env.sh"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ckpttools" / "mmengine-0.10.7"

# 50 samples: 13 iterations per epoch on one rank, 7 on two
OLD, HALF, DOUBLE = Batch(micro=4), Batch(micro=2), Batch(micro=8)
SUMMED, SUMMED2 = Batch(micro=4, accumulation=2), Batch(micro=4, accumulation=2, ranks=2)
OLD2, HALF2, DOUBLE2 = (Batch(micro=n, ranks=2) for n in (4, 2, 8))


def place(folder: Path, case: Case) -> Path:
    """MMEngine's own names: epoch_N.pth where an epoch-based run ended one, else iter_N.pth."""
    length = ceil(ceil(case.size / case.old.ranks) / case.old.micro)
    epochs, inside = divmod(case.at, length)
    by_epoch = case.schedule.startswith("epoch") and not inside
    return folder / (f"epoch_{epochs}.pth" if by_epoch else f"iter_{case.at}.pth")


EPOCH = ("cosine-converted", "half-epochs-converted", "multistep-converted", "poly-converted")
EPOCH += ("onecycle-converted", "restart-converted")
ITER = ("cosine", "multistep", "poly")


def cases(
    schedules: list[str],
    batches: tuple[Batch, ...],
    places: tuple[int, ...],
    sizes: tuple[int, ...],
    old: Batch,
) -> list[Case]:
    return [
        Case(schedule=schedule, at=at, old=old, new=new, size=size)
        for schedule in schedules
        for size in sizes
        for new in batches
        for at in places
    ]


BY_EPOCH, BY_ITER = [f"epoch-{s}" for s in EPOCH], [f"iter-{s}" for s in ITER]
ZERO = [f"zero-{s}" for s in ITER]
MORE = tuple(Batch(micro=n) for n in (1, 2, 3, 6, 8, 16))
MORE2 = tuple(Batch(micro=n, ranks=2) for n in (1, 2, 3, 6, 8))
DEFAULT = {
    # at the ends of epochs an epoch-based run finds its place, within one it starts the epoch again
    "epochs": [
        *cases(BY_EPOCH, (HALF, DOUBLE), (13, 39), (50,), OLD),
        *cases(["epoch-step-by-epoch"], (HALF, DOUBLE), (26,), (50,), OLD),
    ],
    "inside": cases(BY_EPOCH, (HALF, DOUBLE), (5, 30), (50,), OLD),
    "iterations": cases(BY_ITER, (HALF, DOUBLE), (5, 30, 39), (50,), OLD),
    "zero": cases(ZERO, (HALF2, DOUBLE2), (3, 16), (50,), OLD2),
    # two micro-batches make an update: in MMEngine's own wrapper, and in DeepSpeed
    "accumulated": cases(["iter-cosine"], (Batch(micro=2, accumulation=2),), (30,), (48,), SUMMED),
    "zero-accumulated": cases(
        ["zero-cosine"], (Batch(micro=2, accumulation=2, ranks=2),), (8,), (48,), SUMMED2
    ),
}
HEAVY = {
    "epochs": [
        *cases([*BY_EPOCH, "epoch-step-by-epoch"], MORE, (13, 26, 39), (50, 51), OLD),
        *cases([*BY_EPOCH, "epoch-step-by-epoch"], MORE, (12, 24, 36), (48, 47), OLD),
    ],
    "inside": cases(BY_EPOCH, MORE, (1, 5, 30), (50, 48), OLD),
    "iterations": cases(BY_ITER, MORE, (1, 5, 30, 39, 46), (50, 48), OLD),
    "zero": cases(ZERO, MORE2, (1, 3, 14, 16), (50, 48), OLD2),
}


def frameworks(python: Path) -> dict[str, Framework]:
    # MMEngine calls torch.load as it was before weights_only
    extra = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    extra["PATH"] = f"{python.parent}:{os.environ['PATH']}"
    # what its DeepSpeed compiles is not what the newer one does
    extra["TORCH_EXTENSIONS_DIR"] = str(python.parent.parent / "torch_extensions")

    def one(finds: bool, launcher: Literal["python", "torchrun"] = "python") -> Framework:
        return Framework(
            script="train_mmengine",
            unit="micro",
            place=place,
            finds=finds,
            again=not finds,
            launcher=launcher,
            python=str(python),
            environment=extra,
        )

    return {
        "epochs": one(True),
        "inside": one(False),
        "iterations": one(True),
        "zero": one(True, "torchrun"),
        "accumulated": one(True),
        "zero-accumulated": one(True, "torchrun"),
    }


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Groups:
    python = os.environ.get("CKPT_MMENGINE_PYTHON") or CACHE / "bin/python"
    if not Path(python).exists():
        pytest.skip("no MMEngine here: oracles/mmengine_env.sh builds it, CKPT_MMENGINE_PYTHON names it")
    return groups_of(frameworks(Path(python)), DEFAULT, tmp_path_factory.mktemp("mmengine"), environment)


@pytest.fixture(scope="module")
def resumed_all(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Groups:
    python = os.environ.get("CKPT_MMENGINE_PYTHON")
    if python is None:
        built = subprocess.run([BUILD, CACHE], capture_output=True, text=True, check=False)
        if built.returncode:
            pytest.skip(f"MMEngine's environment cannot be built here: {built.stderr[-500:]}")
        python = str(CACHE / "bin/python")
    folder = tmp_path_factory.mktemp("mmengine-all")
    return groups_of(frameworks(Path(python)), HEAVY, folder, environment)


def check_case(found: Groups, name: str, case: Case) -> None:
    epoch = case.at // ceil(case.size / case.old.micro)
    # steps by epochs count on in epochs; after the last milestone nothing is left to come
    flat = case.schedule == "epoch-step-by-epoch" or ("multistep" in case.schedule and epoch >= 3)
    check(found(name)[case], frameworks(Path())[name], lr_moves=not (flat and name == "epochs"))


@pytest.mark.parametrize(("name", "case"), named(DEFAULT))
def test_goes_on_as_from_scratch(resumed: Groups, name: str, case: Case) -> None:
    check_case(resumed, name, case)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "schedule"), schedules_of(HEAVY))
def test_goes_on_as_from_scratch_everywhere(resumed_all: Groups, name: str, schedule: str) -> None:
    check_all(resumed_all(name), schedule, lambda case: check_case(resumed_all, name, case))
