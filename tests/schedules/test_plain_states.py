"""States of every framework written down by hand: the same clock, a new one, and damage to any field."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpttools.errors import UsageError
from ckpttools.schedules import Clock, Steps, recognise

State = dict[str, Any]
HALF = Steps(
    old=Clock(samples=12, epoch=Fraction(40), size=480),
    new=Clock(samples=24, epoch=Fraction(20), size=480),
    old_total=240,
    new_total=120,
)
SAME = Steps(old=HALF.old, new=HALF.old)


def mmengine(**own: Any) -> State:
    """A scheduler by iteration, 100 iterations in."""
    return {
        "param_name": "lr", "begin": 0, "end": 240, "by_epoch": False, "base_values": [0.1, 0.1],
        "last_step": 100,        "_global_step": 100, "verbose": False, **own, "_last_value": [0.05, 0.05],
    }  # fmt: skip


CYCLE = [
    {"end_step": 71.0, "start_lr": "initial_lr", "end_lr": "max_lr"},
    {"end_step": 239, "start_lr": "max_lr", "end_lr": "min_lr"},
]
TIMM = {
    "param_group_field": "lr", "_initial_param_group_field": "initial_lr", "base_values": [0.1, 0.1],
    "metric": None,
    "t_in_epochs": False, "noise_range_t": None, "noise_pct": 0.67, "noise_type": "normal", "noise_std": 1.0,
    "noise_seed": 42, "warmup_t": 40, "warmup_lr_init": 0.01, "warmup_prefix": True,
    "warmup_steps": [0.09 / 40, 0.09 / 40],
}  # fmt: skip
TIMM_CYCLE = {"t_initial": 200, "lr_min": 1e-3, "cycle_mul": 1.0, "cycle_decay": 0.5, "cycle_limit": 2}
GROUPS: list[State] = [
    {
        "lr": 0.05,
        "initial_lr": 0.1,
        "max_lr": 0.4,
        "min_lr": 1e-5,
        "momentum": 0.9,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
    }
    for _ in range(2)
]
LAMBDA = {
    "base_lrs": [0.1, 0.1], "last_epoch": 100, "_step_count": 101, "_last_lr": [0.05, 0.05],
    "lr_lambdas": [{}, {}],
}  # fmt: skip

# name -> framework, states, what else is known
SAMPLES: dict[str, tuple[str, list[State], State]] = {
    "MMEngine Step": ("mmengine", [mmengine(step_size=80, gamma=0.5)], {}),
    "MMEngine MultiStep": ("mmengine", [mmengine(milestones={80: 1, 160: 2}, gamma=0.5)], {}),
    "MMEngine Linear, Cosine": (
        "mmengine",
        [
            mmengine(start_factor=0.1, end_factor=1.0, total_iters=39, end=40, last_step=39),
            mmengine(T_max=200, eta_min=0.0, eta_min_ratio=None, begin=40, last_step=60),
        ],
        {"units_per_epoch": 40, "cfg": "param_scheduler = [dict(type='LinearLR'), f(1)]"},
    ),
    "MMEngine Constant, Poly": (
        "mmengine",
        [mmengine(factor=0.3, total_iters=239), mmengine(eta_min=1e-4, power=0.9, total_iters=239)],
        {},
    ),
    "MMEngine Exponential for ever": ("mmengine", [mmengine(gamma=0.99, end=10**9)], {}),
    "MMEngine OneCycle": (
        "mmengine",
        [mmengine(total_steps=240, _schedule_phases=CYCLE, eta_max=0.4, div_factor=4.0, final_div_factor=1e4,
                  anneal_func="f")],
        {},
    ),
    "MMEngine restarts": (
        "mmengine",
        [mmengine(periods=[80, 160], cumulative_periods=[80, 240], restart_weights=[1, 0.5], eta_min=0.0,
                  eta_min_ratio=None)],
        {},
    ),
    "MMEngine momentum": (
        "mmengine",
        [mmengine(gamma=0.99), mmengine(gamma=0.999, param_name="momentum", use_betas=True)],
        {},
    ),
    "MMEngine mixed": (
        "mmengine",
        [mmengine(gamma=0.99), mmengine(gamma=0.5, by_epoch=True, _global_step=2, last_step=2)],
        {"units_per_epoch": 40},
    ),
    "timm Cosine": ("timm", [{**TIMM, **TIMM_CYCLE, "k_decay": 1.0}], {"count": 100}),
    "timm Tanh": ("timm", [{**TIMM, **TIMM_CYCLE, "lb": -7.0, "ub": 3.0}], {"count": 100}),
    "timm Poly": ("timm", [{**TIMM, **TIMM_CYCLE, "k_decay": 1.0, "power": 0.5}], {"count": 100}),
    "timm Step": ("timm", [{**TIMM, "decay_t": 80, "decay_rate": 0.5}], {"count": 100}),
    "timm MultiStep": ("timm", [{**TIMM, "decay_t": [80, 160], "decay_rate": 0.5}], {"count": 100}),
    **{
        f"transformers {name}": (
            "transformers",
            [LAMBDA],
            {"lr_scheduler_type": name, "warmup_steps": 40, "max_steps": 240, "lr_scheduler_kwargs": kwargs},
        )
        for name, kwargs in {
            "linear": {},
            "polynomial": {"lr_end": 1e-5},
            "inverse_sqrt": {},
            "cosine_with_min_lr": {"min_lr": 1e-3},
            "warmup_stable_decay": {"num_decay_steps": 80},
        }.items()
    },
    **{
        f"DeepSpeed {name}": (
            "deepspeed", [{"last_batch_iteration": 99}], {"type": name, "params": params, "lr": 0.1}
        )
        for name, params in {
            "WarmupDecayLR": {"warmup_num_steps": 40, "total_num_steps": 240},
            "WarmupCosineLR": {"warmup_num_steps": 40, "total_num_steps": 240},
            "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 80},
            "LRRangeTest": {},
        }.items()
    },
}  # fmt: skip
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**18, -1, math.nan, math.inf, -0.5, 1e300, "", "cos", "x"]),
    st.sampled_from([[], {}, [1, 2], {3: -1}, [None], [0.1, math.nan]]),
)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_same_clock_changes_nothing(name: str) -> None:
    framework, states, about = SAMPLES[name]
    program = recognise(framework, states, GROUPS, about).rebased(SAME)
    assert program.states() == states and program.settings == ()
    assert all(new.items() <= old.items() for new, old in zip(program.groups(), GROUPS, strict=True))


@pytest.mark.parametrize("name", SAMPLES)
def test_keys_stay_and_the_way_back_leads_to_the_start(name: str) -> None:
    framework, states, about = SAMPLES[name]
    program = recognise(framework, copy.deepcopy(states), copy.deepcopy(GROUPS), about)
    there = program.rebased(HALF)
    assert program.count == 100 and there.count == 50 and there.known
    assert [list(s) for s in there.states()] == [list(s) for s in states]
    back = there.rebased(Steps(old=HALF.new, new=HALF.old, old_total=120, new_total=240))
    fresh = recognise(framework, states, GROUPS, about).curve(240)
    assert back.curve(240) == pytest.approx(fresh, rel=1e-9, abs=1e-12)
    # at the same place in the data the rate is that of one new unit earlier or later
    every_other = there.curve(120)
    step = 2.5 * max(abs(a - b) for a, b in pairwise(fresh))
    assert all(abs(every_other[t // 2] - fresh[t]) <= step for t in range(0, 240, 2))
    assert there.scaled(2.0).curve(120) == pytest.approx([2 * lr for lr in every_other], rel=1e-12)


@settings(deadline=None, max_examples=400)
@given(name=st.sampled_from(sorted(SAMPLES)), data=st.data())
def test_damage_is_an_error_of_the_file(name: str, data: st.DataObject) -> None:
    """Whatever a field holds: it is recognised, or refused, and nothing else."""
    framework, states, about = copy.deepcopy(SAMPLES[name])
    groups = copy.deepcopy(GROUPS)
    places: list[tuple[Any, Any]] = [
        (holder, key) for holder in (*states, groups[0], about) for key in holder
    ]
    for inner in ("params", "lr_scheduler_kwargs"):
        places += [(about[inner], key) for key in about.get(inner, ())]
    where, key = data.draw(st.sampled_from(places))
    if data.draw(st.booleans()):
        where[key] = data.draw(JUNK)
    else:
        del where[key]
    try:
        rebased = recognise(framework, states, groups, about).rebased(HALF)
        rebased.scaled(2.0).states()
        rebased.ahead(3)
        rebased.curve(3)
    except UsageError as error:
        assert error.id in ("schedule-damaged", "schedule-unknown")


def test_the_annealing_of_a_cycle_that_is_not_named() -> None:
    """MMEngine pickles a function; the configuration names it, else the rate shows it, but not everywhere."""
    framework, states, _ = SAMPLES["MMEngine OneCycle"]

    def at(count: int, kind: str, about: State) -> Any:
        state = {**states[0], "anneal_func": f"OneCycleParamScheduler._annealing_{kind}"}
        named = recognise(framework, [state], GROUPS, {})
        lr = named.curve(count + 1)[-1]
        hidden = {**state, "anneal_func": None, "last_step": count, "_global_step": count}
        return named, recognise(framework, [hidden], [{**g, "lr": lr} for g in GROUPS], about)

    for kind in ("cos", "linear"):
        named, shown = at(100, kind, {})
        assert shown.curve(240) == named.curve(240) and shown.notes == ()
        text = f"param_scheduler = [dict(type='OneCycleLR', anneal_strategy={kind!r})]"
        named, written = at(239, kind, {"cfg": text})
        assert written.curve(240) == named.curve(240) and written.notes == ()
        _, unsure = at(239, kind, {})
        assert "cosine is assumed" in unsure.notes[0]
