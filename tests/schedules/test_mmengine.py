"""MMEngine's schedulers, rebased: the real ones, in an interpreter of their own, go on as from scratch.

CKPT_MMENGINE_PYTHON names an interpreter that has mmengine 0.10.7 (tests/oracles/mmengine_env.sh makes one).
"""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from schedules.batches import BY_SIZE, Change, changes

from ckpttools.schedules import recognise

PYTHON = os.environ.get("CKPT_MMENGINE_PYTHON", "")
needs_mmengine = pytest.mark.skipif(
    not PYTHON, reason="CKPT_MMENGINE_PYTHON names no interpreter with mmengine"
)
EPOCHS = 6
BY_EPOCH: dict[str, Any] = {"by_epoch": True, "convert_to_iter_based": True}
Entries = list[dict[str, Any]]

# configurations by epoch that MMEngine converts to iterations itself
CONVERTED: dict[str, Entries] = {
    "warmup, cosine": [
        {"type": "LinearLR", "start_factor": 0.01, "begin": 0, "end": 1, **BY_EPOCH},
        {"type": "CosineAnnealingLR", "begin": 1, "end": 6, "eta_min": 1e-4, **BY_EPOCH},
    ],
    "warmup within the cosine": [
        {"type": "LinearLR", "start_factor": 0.1, "begin": 0, "end": 0.5, **BY_EPOCH},
        {"type": "CosineAnnealingLR", "T_max": 6, "eta_min_ratio": 0.05, **BY_EPOCH},
    ],
    "milestones": [{"type": "MultiStepLR", "milestones": [2, 4, 5], "gamma": 0.1, **BY_EPOCH}],
    "steps": [
        {"type": "ConstantLR", "factor": 0.3, "begin": 0, "end": 1, **BY_EPOCH},
        {"type": "StepLR", "step_size": 2, "gamma": 0.5, "begin": 1, **BY_EPOCH},
    ],
    "poly": [{"type": "PolyLR", "power": 0.9, "eta_min": 1e-4, "begin": 0, "end": 6, **BY_EPOCH}],
    "one cycle": [{"type": "OneCycleLR", "eta_max": 0.4, "total_steps": 6, **BY_EPOCH}],
    "one cycle, linear": [
        {"type": "OneCycleLR", "eta_max": 0.4, "three_phase": True, "pct_start": 0.25,
         "anneal_strategy": "linear", "begin": 0, "end": 6, **BY_EPOCH},
    ],
    "restarts": [
        {"type": "CosineRestartLR", "periods": [1, 2, 3], "restart_weights": [1, 0.5, 0.25], "eta_min": 1e-4,
         "begin": 0, "end": 6, **BY_EPOCH},
    ],
    "momentum too": [
        {"type": "CosineAnnealingLR", "T_max": 6, **BY_EPOCH},
        {"type": "LinearMomentum", "start_factor": 0.5, "begin": 0, "end": 2, **BY_EPOCH},
        {"type": "CosineAnnealingMomentum", "T_max": 4, "eta_min": 0.4, "begin": 2, "end": 6, **BY_EPOCH},
    ],
}  # fmt: skip


def by_iteration(per_epoch: int) -> dict[str, Entries]:
    """Configurations by iteration, as a user writes them for so many iterations per epoch."""
    n, own = per_epoch, {"by_epoch": False}
    return {
        "iterations: warmup, cosine": [
            {"type": "LinearLR", "start_factor": 0.01, "begin": 0, "end": n, **own},
            {"type": "CosineAnnealingLR", "begin": n, "end": 6 * n, "eta_min": 1e-4, **own},
        ],
        "iterations: poly after a warmup": [
            {"type": "ConstantLR", "factor": 0.1, "begin": 0, "end": n, **own},
            {"type": "PolyLR", "power": 0.9, "begin": n, "end": 6 * n, **own},
        ],
        "iterations: exponential, for ever": [
            {"type": "ExponentialLR", "gamma": 0.8 ** (1 / n), "end": 10**9, **own}
        ],
        "mixed: warmup by iteration, milestones by epoch": [
            {"type": "LinearLR", "start_factor": 0.001, "begin": 0, "end": n, **own},
            {"type": "MultiStepLR", "milestones": [2, 4], "gamma": 0.1, "by_epoch": True},
        ],
    }


class Oracle:
    """The interpreter that has mmengine, answering one job after the other."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("mmengine_oracle.py")
        self.process = subprocess.Popen(
            [PYTHON, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, entries: Entries, change: Change, per_epoch: int, *, groups: int, optimizer: str,
            steps: int, save: tuple[int, ...] = (), load: Any = None) -> dict[str, Any]:  # fmt: skip
        job = {
            "groups": [0.1 * (1 + 0.37 * i) for i in range(groups)], "optimizer": optimizer,
            "schedulers": entries,
            "epoch": per_epoch, "epochs": EPOCHS, "steps": steps, "save": list(save), "load": load,
        }  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(repr(job) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = ast.literal_eval(line.removeprefix("ANSWER "))
                return answer
        raise AssertionError("the oracle ended")


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    made = Oracle()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(300)


def config_text(entries: Entries) -> str:
    """As MMEngine's Config dumps it."""
    calls = [f"dict({', '.join(f'{k}={v!r}' for k, v in e.items())})" for e in entries]
    return (
        "max_epochs = 6\nmodel = dict(type='Net')\nparam_scheduler = [\n    "
        + ",\n    ".join(calls)
        + ",\n]\n"
    )


@BY_SIZE
@needs_mmengine
@pytest.mark.parametrize("name", [*CONVERTED, *by_iteration(1)])
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "state alone"])
def test_goes_on_as_from_scratch(
    name: str, with_config: bool, oracle: Oracle, sizes: tuple[int, int]
) -> None:
    worst, cases, exact = 0.0, 0, 0
    for number, change in enumerate(changes(EPOCHS, sizes, "micro")):
        old, new = (CONVERTED.get(name) or by_iteration(n)[name] for n in (change.old, change.new))
        groups, optimizer = 1 + number % 2, "adam" if number % 3 else "sgd"
        steps = change.steps
        assert steps.old_total is not None and steps.new_total is not None
        places = tuple(change.places())
        before = oracle.run(
            old, change, change.old, groups=groups, optimizer=optimizer, steps=steps.old_total, save=places
        )
        truth = oracle.run(
            new, change, change.new, groups=groups, optimizer=optimizer, steps=steps.new_total
        )["trace"]
        # lengths that MMEngine has rounded to old iterations are right to an old iteration
        step = max(abs(a[0][0] - b[0][0]) for run in (truth, before["trace"]) for a, b in pairwise(run))
        for at in places:
            states, values = before["saved"][at]
            about: dict[str, Any] = {"units_per_epoch": change.old}
            if with_config:
                about["cfg"] = config_text(old)
            program = recognise("mmengine", states, values, about)
            assert program.known and program.notes == ()
            assert program.count == at
            rebased = program.rebased(steps)
            count = steps.position(at)
            assert rebased.count == count
            assert [list(s) for s in rebased.states()] == [list(s) for s in states]
            load = (rebased.states(), rebased.groups(), count)
            found = oracle.run(old, change, change.new, groups=groups, optimizer=optimizer,
                               steps=steps.new_total, load=load)["trace"]  # fmt: skip
            cases += 1
            off = max(abs(a[0][0] - b[0][0]) for a, b in zip(found, truth[count:], strict=True))
            worst = max(worst, off / step)
            exact += found == truth[count:]
            if with_config and name in CONVERTED:
                assert found == truth[count:], (change.name, at)
            # a LinearLR of one iteration never rises: half of an epoch of two or three is one
            if change.new >= 4:
                assert off <= step * (1 + 1e-9), (change.name, at, rebased.notes)
    how = "config" if with_config else "state alone"
    print(
        f"\n{name:50} {how:12} {cases} cases, {exact} bit for bit from scratch; worst {worst:.3g} of a step"
    )
