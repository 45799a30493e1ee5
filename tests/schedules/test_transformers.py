"""The Trainer's schedules, rebased: its own functions with the new arguments go on as from scratch."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
from schedules.batches import BY_SIZE, LARGE, changes
from schedules.torch_families import optimizer, plain_groups, plain_state, rates, trace
from transformers import get_scheduler

from ckpttools.schedules import recognise

EPOCHS = 6
COUNTED = {"num_decay_steps", "num_stable_steps", "timescale"}
# name -> lr_scheduler_type, whether it warms up, lr_scheduler_kwargs with lengths in epochs
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "linear": ("linear", True, {}),
    "linear without warmup": ("linear", False, {}),
    "cosine": ("cosine", True, {}),
    "cosine of two waves": ("cosine", True, {"num_cycles": 1.5}),
    "cosine_with_restarts": ("cosine_with_restarts", True, {"num_cycles": 3}),
    "polynomial": ("polynomial", True, {"power": 2.0, "lr_end": 1e-4}),
    "constant": ("constant", False, {}),
    "constant_with_warmup": ("constant_with_warmup", True, {}),
    "inverse_sqrt": ("inverse_sqrt", True, {}),
    "inverse_sqrt by a timescale": ("inverse_sqrt", True, {"timescale": 2}),
    "cosine_with_min_lr": ("cosine_with_min_lr", True, {"min_lr": 0.005}),
    "cosine_warmup_with_min_lr": (
        "cosine_warmup_with_min_lr",
        True,
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    ),
    "cosine_warmup_with_min_lr plain": ("cosine_warmup_with_min_lr", True, {"min_lr_rate": 0.1}),
    "warmup_stable_decay": ("warmup_stable_decay", True, {"num_decay_steps": 2, "min_lr_ratio": 0.1}),
    "warmup_stable_decay, given": (
        "warmup_stable_decay",
        True,
        {"num_decay_steps": 2, "num_stable_steps": 3, "warmup_type": "cosine", "decay_type": "1-sqrt"},
    ),
}
CHANGES = changes(EPOCHS, LARGE)


def arguments(case: str, per_epoch: int) -> dict[str, Any]:
    name, warms, kwargs = CASES[case]
    kwargs = {k: v * per_epoch if k in COUNTED else v for k, v in kwargs.items()}
    return {
        "lr_scheduler_type": name,
        "warmup_steps": per_epoch if warms else 0,
        "max_steps": EPOCHS * per_epoch,
        "lr_scheduler_kwargs": kwargs,
        "learning_rate": 0.1,
    }


def start(args: dict[str, Any], groups: int = 2) -> tuple[Any, Any]:
    opt = optimizer(groups, "adam")
    for group in opt.param_groups:
        group["lr"] = args["learning_rate"]
    made = get_scheduler(
        args["lr_scheduler_type"],
        opt,
        args["warmup_steps"],
        args["max_steps"],
        args["lr_scheduler_kwargs"] or None,
    )
    return made, opt


@BY_SIZE
@pytest.mark.parametrize("case", CASES)
def test_goes_on_as_from_scratch(case: str, sizes: tuple[int, int]) -> None:
    cases, worst = 0, 0.0
    for change in changes(EPOCHS, sizes):
        args, new_args = arguments(case, change.old), arguments(case, change.new)
        scheduler, opt = start(new_args)
        assert change.steps.new_total is not None
        truth = trace(scheduler, opt, change.steps.new_total)
        step = max(abs(a - b) for a, b in itertools.pairwise(rates(truth))) or 1.0
        for at in change.places():
            scheduler, opt = start(args)
            trace(scheduler, opt, at)
            program = recognise("transformers", [plain_state(scheduler)], plain_groups(opt), args)
            assert program.known and program.notes == () and program.count == at
            rebased = program.rebased(change.steps)
            count = change.steps.position(at)
            settings = {s.name.removeprefix("lr_scheduler_kwargs."): s.new for s in rebased.settings}
            assert {**new_args, **new_args["lr_scheduler_kwargs"]}.items() >= settings.items()
            fresh, opt = start(new_args)
            fresh.load_state_dict(copy.deepcopy(rebased.states()[0]))
            assert list(rebased.states()[0]) == list(plain_state(scheduler))
            for group, values in zip(opt.param_groups, rebased.groups(), strict=True):
                group.update(values)
            assert trace(fresh, opt, change.steps.new_total - count) == truth[count:], (change.name, at)
            assert rebased.curve(4) == rates(truth)[:4]
            assert program.ahead(3)[0] == program.groups()[0]["lr"]
            cases += 1
            worst = max(worst, abs(program.groups()[0]["lr"] - rebased.groups()[0]["lr"]) / step)
    print(f"\n{case:34} {cases} cases, all bit for bit; the rate moved by {worst:.3g} of a step")


@pytest.mark.parametrize("case", ["polynomial", "cosine_with_min_lr", "cosine"])
@pytest.mark.parametrize("rates_of_groups", [(0.01, 0.1), (0.1, 0.01), (0.01, 0.02)])
def test_groups_of_their_own_rates(case: str, rates_of_groups: tuple[float, float]) -> None:
    """A smaller rate for the embeddings, say: lr_end and min_lr are parts of the optimizer's default."""
    args = arguments(case, 12)
    opt = optimizer(2, "adam")
    opt.defaults["lr"] = args["learning_rate"]
    for group, lr in zip(opt.param_groups, rates_of_groups, strict=True):
        group["lr"] = lr
    made = get_scheduler(
        args["lr_scheduler_type"], opt, args["warmup_steps"], args["max_steps"], args["lr_scheduler_kwargs"]
    )
    trace(made, opt, 50)
    program = recognise("transformers", [plain_state(made)], plain_groups(opt), args)
    assert program.explained and not program.notes
    assert program.ahead(4) == rates(trace(made, opt, 3))


def test_a_warmup_given_as_a_share_needs_no_setting() -> None:
    change = next(c for c in CHANGES if c.name == "x3/2 of 487")
    args = {**arguments("linear", change.old), "warmup_steps": 0.03}
    scheduler, opt = start({**args, "warmup_steps": math.ceil(0.03 * EPOCHS * change.old)})
    trace(scheduler, opt, 30)
    program = recognise("transformers", [plain_state(scheduler)], plain_groups(opt), args)
    assert program.notes == ()
    rebased = program.rebased(change.steps)
    assert [s.name for s in rebased.settings] == ["max_steps"]
    truth = trace(
        *start({**arguments("linear", change.new), "warmup_steps": math.ceil(0.03 * EPOCHS * change.new)}), 25
    )
    assert rebased.curve(26) == rates(truth)


def test_inverse_sqrt_without_warmup_needs_its_timescale_named() -> None:
    change = next(c for c in CHANGES if c.name == "x2 of 480")
    args = {**arguments("inverse_sqrt", change.old), "warmup_steps": 0}
    scheduler, opt = start(args)
    trace(scheduler, opt, 30)
    rebased = recognise("transformers", [plain_state(scheduler)], plain_groups(opt), args).rebased(
        change.steps
    )
    assert ("lr_scheduler_kwargs.timescale", 5000) in [(s.name, s.new) for s in rebased.settings]


def test_a_kept_warmup_keeps_its_steps() -> None:
    change = next(c for c in CHANGES if c.name == "x2 of 480")
    for case in CASES:
        args = arguments(case, change.old)
        scheduler, opt = start(args)
        trace(scheduler, opt, 130)
        program = recognise("transformers", [plain_state(scheduler)], plain_groups(opt), args)
        rebased = program.rebased(change.steps, warmup="keep")
        assert "warmup_steps" not in [s.name for s in rebased.settings]
        new = {
            **args,
            "max_steps": args["max_steps"] // 2,
            "lr_scheduler_kwargs": dict(args["lr_scheduler_kwargs"]),
        }
        for setting in rebased.settings:
            if setting.name.startswith("lr_scheduler_kwargs."):
                new["lr_scheduler_kwargs"][setting.name.rpartition(".")[2]] = setting.new
        truth = rates(trace(*start(new), new["max_steps"]))
        assert rebased.curve(new["max_steps"]) == truth[:-1]


def test_schedules_that_follow_a_metric_are_torchs_own() -> None:
    opt = optimizer(1, "adam")
    scheduler = get_scheduler("reduce_lr_on_plateau", opt)
    program = recognise(
        "transformers",
        [plain_state(scheduler)],
        plain_groups(opt),
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
    )
    assert program.families == ("ReduceLROnPlateau",) and not program.known
