"""DeepSpeed's own schedulers, rebased: the real classes go on as a run from scratch would."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from deepspeed.runtime import lr_schedules
from schedules.batches import BY_SIZE, LARGE, Change, changes
from schedules.torch_families import optimizer, plain_groups, rates, written

from ckpttools.schedules import Setting, recognise

EPOCHS = 6
LENGTHS = {
    "warmup_num_steps": 1, "total_num_steps": 6, "cycle_first_step_size": 2, "cycle_second_step_size": 1,
    "decay_step_size": 1, "lr_range_test_step_size": 1,
}  # fmt: skip
# name -> class, constants; the ones that count steps are in epochs
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "WarmupLR linear": ("WarmupLR", {"warmup_num_steps": 1, "warmup_max_lr": 0.3, "warmup_type": "linear"}),
    "WarmupLR logarithmic": ("WarmupLR", {"warmup_num_steps": 1, "warmup_min_lr": 0.1, "warmup_max_lr": 0.3}),
    "WarmupLR to the optimizer's": ("WarmupLR", {"warmup_num_steps": 1, "warmup_type": "linear"}),
    "WarmupDecayLR": (
        "WarmupDecayLR",
        {"warmup_num_steps": 1, "total_num_steps": 6, "warmup_max_lr": [0.3, 0.2], "warmup_type": "linear"},
    ),
    "WarmupCosineLR": (
        "WarmupCosineLR",
        {"warmup_num_steps": 1, "total_num_steps": 6, "warmup_min_ratio": 0.1, "warmup_type": "linear"},
    ),
    "OneCycle": ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 2}),
    "OneCycle with stairs and decay": (
        "OneCycle",
        {
            "cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 2,
            "cycle_second_step_size": 1,
            "cycle_first_stair_count": 4, "decay_step_size": 1, "decay_lr_rate": 0.5, "decay_mom_rate": 0.01,
        },
    ),
    "LRRangeTest": ("LRRangeTest", {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 1}),
    "LRRangeTest in stairs": (
        "LRRangeTest",
        {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 1, "lr_range_test_staircase": True},
    ),
}  # fmt: skip
CHANGES = changes(EPOCHS, LARGE)


def params_for(params: dict[str, Any], per_epoch: int) -> dict[str, Any]:
    return {k: v * per_epoch if k in LENGTHS else v for k, v in params.items()}


def start(name: str, params: dict[str, Any]) -> tuple[Any, Any]:
    # at a rate of zero a group does not show its own: there all have the configuration's
    opt = optimizer(1 if name == "WarmupLR" and "warmup_max_lr" not in params else 2, "adam")
    return getattr(lr_schedules, name)(opt, **params), opt


def trace(scheduler: Any, opt: Any, steps: int) -> list[tuple[Any, ...]]:
    out = [written(opt)]
    for _ in range(steps):
        scheduler.step()
        out.append(written(opt))
    return out


@BY_SIZE
@pytest.mark.parametrize("case", CASES)
def test_goes_on_as_from_scratch(case: str, sizes: tuple[int, int]) -> None:
    name, in_epochs = CASES[case]
    cases, worst = 0, 0.0
    for change in changes(EPOCHS, sizes):
        old, new = params_for(in_epochs, change.old), params_for(in_epochs, change.new)
        total = change.steps.new_total
        assert total is not None
        truth = trace(*start(name, new), total)
        step = max(abs(a - b) for a, b in itertools.pairwise(rates(truth)))
        for at in change.places():
            scheduler, opt = start(name, old)
            trace(scheduler, opt, at)
            about = {"type": name, "params": old, "lr": 0.1}
            program = recognise("deepspeed", [scheduler.state_dict()], plain_groups(opt), about)
            assert program.known and program.notes == () and program.count == at
            rebased = program.rebased(change.steps)
            count = change.steps.position(at)
            assert rebased.states() == [{"last_batch_iteration": count - 1}]
            assert {s.name.rpartition(".")[2]: s.new for s in rebased.settings} == {
                k: new[k] for k in new if new[k] != old[k]
            }
            resumed, opt = start(name, new)
            resumed.load_state_dict(rebased.states()[0])
            for group, values in zip(opt.param_groups, rebased.groups(), strict=True):
                group.update(values)
            assert trace(resumed, opt, total - count) == truth[count:], (change.name, at)
            assert rebased.curve(4) == rates(truth)[:4]
            ahead = program.ahead(5)
            assert ahead == rates([*trace(scheduler, scheduler.optimizer, 4)])
            cases += 1
            before, here = program.groups()[0]["lr"], rebased.groups()[0]["lr"]
            if change.old != change.new and "log" not in case:
                worst = max(worst, abs(before - here) / step)
    print(f"\n{case:32} {cases} cases, all bit for bit; the rate moved by {worst:.3g} of a step")


def test_the_constants_that_a_config_leaves_out_are_named() -> None:
    scheduler, opt = start("WarmupLR", {"warmup_type": "linear"})
    (change,) = [c for c in CHANGES if c.name == "x2 of 480"]
    about = {"type": "WarmupLR", "params": {"warmup_type": "linear"}, "lr": 0.1}
    program = recognise("deepspeed", [scheduler.state_dict()], plain_groups(opt), about)
    rebased = program.rebased(change.steps)
    assert rebased.settings == (Setting("scheduler.params.warmup_num_steps", 1000, 500, "ds_config"),)


def test_a_logarithmic_warmup_says_by_how_much_it_differs() -> None:
    name, params = "WarmupLR", {"warmup_num_steps": 1000, "warmup_max_lr": 1.0}
    scheduler, opt = start(name, params)
    trace(scheduler, opt, 101)
    about = {"type": name, "params": params}
    change = next(c for c in CHANGES if c.name == "x2 of 480")
    rebased = recognise("deepspeed", [scheduler.state_dict()], plain_groups(opt), about).rebased(change.steps)
    (note,) = rebased.notes
    said = float(note.split("up to ")[1].split(" %")[0]) / 100
    real = max(
        abs(math.log(int(p * 1000) + 1) / math.log(1000) - math.log(int(p * 500) + 1) / math.log(500))
        for p in (i / 100 for i in range(1, 100))
    )
    assert said == pytest.approx(real, abs=0.0005)


def test_a_warmup_can_be_kept() -> None:
    name, in_epochs = CASES["WarmupDecayLR"]
    change = next(c for c in CHANGES if c.name == "x2 of 480")
    params = params_for(in_epochs, change.old)
    scheduler, opt = start(name, params)
    trace(scheduler, opt, 50)
    about = {"type": name, "params": params}
    rebased = recognise("deepspeed", [scheduler.state_dict()], plain_groups(opt), about).rebased(
        change.steps, warmup="keep"
    )
    assert [(s.name, s.new) for s in rebased.settings] == [
        ("scheduler.params.total_num_steps", 6 * change.new)
    ]


def test_the_optimizers_own_rate_is_read_off_where_the_config_does_not_name_it() -> None:
    name, in_epochs = CASES["WarmupCosineLR"]
    change: Change = CHANGES[0]
    params = params_for(in_epochs, change.old)
    for at in (5, 60, 200):
        scheduler, opt = start(name, params)
        trace(scheduler, opt, at)
        program = recognise(
            "deepspeed", [scheduler.state_dict()], plain_groups(opt), {"type": name, "params": params}
        )
        fresh, new_opt = start(name, params_for(in_epochs, change.new))
        truth = trace(fresh, new_opt, 1000)
        count = change.steps.position(at)
        assert program.known
        assert [g["lr"] for g in program.rebased(change.steps).groups()] == [row[0] for row in truth[count]]


def test_an_unknown_scheduler_moves_its_counter_only() -> None:
    opt = optimizer(1, "adam")
    change = next(c for c in CHANGES if c.name == "x2 of 480")
    program = recognise("deepspeed", [{"last_batch_iteration": 79}], plain_groups(opt), {"type": "Mine"})
    rebased = program.rebased(change.steps)
    assert not program.known and rebased.states() == [{"last_batch_iteration": 39}]
    assert rebased.groups() == program.groups() and "stays at 0.1" in rebased.notes[0]
