"""Damaged states of torch's real schedulers and of the other frameworks: answered, or refused by name."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs

from ckpttools import schedules
from ckpttools.errors import CkptError
from ckpttools.schedules.lengths import Batch, Clock, Data, Steps

MAKERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [3, 5, 5]),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 20),
    "LinearLR": lambda o: lrs.LinearLR(o),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 3, 4),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, 30),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=4), lrs.CosineAnnealingLR(o, 16)], [4]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.LinearLR(o, total_iters=4), lrs.ExponentialLR(o, 0.9)]
    ),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 10),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda n: 0.9**n),
}
JUNK: list[Any] = [
    None, True, -1, 0, 1, 2, 10**14, 10**30, -(10**9), 0.0, -1.5, 1e308, float("nan"), float("inf"),
    -float("inf"), "x", "", [], {}, [1], {"a": 1}, (1, 2), [[[]]], {3: 1}, {3: 10**12}, {-1: 1}, {10**12: 1},
    "cos", "linear",
]  # fmt: skip
DATA = Data(size=50)
HALF = Steps(old=Clock.of(Batch(micro=4), "update", DATA), new=Clock.of(Batch(micro=8), "update", DATA))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def good() -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, Any]]]:
    """framework, state, groups, about: six steps into each."""
    states: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for name, make in MAKERS.items():
        tensors = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 0.2)]
        optimizer = torch.optim.SGD(tensors, momentum=0.9)
        scheduler = make(optimizer)
        for _ in range(6):
            optimizer.step()
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        states[name] = plain(scheduler.state_dict())
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        yield "torch", states[name], groups, {}
    betas = [{"lr": 0.1, "betas": (0.9, 0.99)}]
    decay = {"total_num_steps": 20, "warmup_num_steps": 4, "warmup_max_lr": 0.1, "warmup_min_lr": 0}
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 5}
    for kind, params in (("WarmupDecayLR", decay), ("OneCycle", cycle)):
        yield "deepspeed", {"last_batch_iteration": 5}, betas, {"type": kind, "params": params}
    trainer = {"lr_scheduler_type": "cosine", "warmup_steps": 3, "max_steps": 20, "lr_scheduler_kwargs": {}}
    yield "transformers", states["LambdaLR"], groups, trainer
    config = (
        "param_scheduler=[dict(type='CosineAnnealingLR',T_max=2,by_epoch=True,convert_to_iter_based=True)]"
    )
    mmengine = {
        "begin": 0, "end": 20, "T_max": 20, "eta_min": 0.0, "eta_min_ratio": None, "base_values": [0.1, 0.2],
        "by_epoch": False, "last_step": 6, "_global_step": 7, "param_name": "lr", "verbose": False,
        "_last_value": [0.08, 0.16],
    }  # fmt: skip
    yield "mmengine", mmengine, groups, {"cfg": config, "units_per_epoch": 10}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def damage(value: Any, rng: random.Random) -> None:
    """One field anywhere becomes something else, or disappears."""
    found = list(places(value))
    if not found:
        return
    *way, last = rng.choice(found)
    for key in way:
        value = value[key]
    if isinstance(value, dict) and rng.random() < 0.1:
        value.pop(last)
    else:
        value[last] = copy.deepcopy(rng.choice(JUNK))


def survive(seed: int, cases: int) -> int:
    """Damaged states through everything that a rebase asks of them; how many were refused."""
    rng, base, refused = random.Random(seed), list(good()), 0
    for _ in range(cases):
        framework, state, groups, about = copy.deepcopy(rng.choice(base))
        for _ in range(rng.randint(1, 3)):
            damage(rng.choices([state, groups, about], weights=[7, 2, 1])[0], rng)
        try:
            program = schedules.recognise(framework, [state], groups, about)
            moved = program.rebased(HALF)
            for each in (program, moved, moved.scaled(2.0)):
                each.states(), each.groups(), each.length(), each.families, each.settings, each.notes
                each.curve(20), each.ahead(20)
        except CkptError:
            refused += 1
    return refused


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_answered_or_refused(seed: int) -> None:
    refused = survive(seed, 3000)
    assert 500 < refused < 3000


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(100, 120))
def test_much_damage_is_answered_or_refused(seed: int) -> None:
    assert survive(seed, 5000) > 500
