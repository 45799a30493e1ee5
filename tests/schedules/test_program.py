"""What holds for every schedule, what is left alone, and what is refused."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules.batches import RATIOS, change
from schedules.torch_families import (
    EPOCHS,
    FAMILIES,
    State,
    optimizer,
    plain_groups,
    plain_state,
    rates,
    trace,
)
from torch.optim import lr_scheduler as lrs

from ckpttools.errors import Unsupported, UsageError
from ckpttools.schedules import Batch, Clock, Steps, recognise
from ckpttools.schedules.torch.program import TorchProgram, replayed

TWICE = change("x2", Batch(micro=12), Batch(micro=24), 480, EPOCHS)  # 40 units per epoch become 20
STREAM = Steps(old=Clock(samples=12), new=Clock(samples=24))


def run(family: str, at: int, per_epoch: int = 40, groups: int = 2) -> tuple[State, list[State]]:
    kind, build = FAMILIES[family]
    opt = optimizer(groups, kind)
    scheduler = build(opt, lambda epochs: round(epochs * per_epoch), per_epoch)
    trace(scheduler, opt, at)
    return plain_state(scheduler), plain_groups(opt)


def saved(build: Any, at: int, groups: int = 1, kind: str = "sgd") -> tuple[State, list[State]]:
    opt = optimizer(groups, kind)
    scheduler = build(opt)
    trace(scheduler, opt, at)
    return plain_state(scheduler), plain_groups(opt)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_clock_changes_nothing(family: str) -> None:
    state, groups = run(family, 77)
    groups[0]["lr"] *= 1.25  # not what replay would give
    same = Steps(old=TWICE.steps.old, new=TWICE.steps.old, old_total=240, new_total=240)
    program = recognise("torch", [state], groups).rebased(same)
    assert program.states() == [state]
    for group, new in zip(groups, program.groups(), strict=True):
        assert new["lr"] == group["lr"] and new.items() <= group.items()


@settings(deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    ratio=st.sampled_from(RATIOS),
    size=st.integers(60, 200),
    at=st.integers(0, 60),
)
def test_there_and_back(family: str, ratio: Fraction, size: int, at: int) -> None:
    """Keys stay, a later place stays later, old to new to old comes back within a unit of either clock."""
    there = change("there", Batch(micro=12), Batch(micro=int(12 * ratio)), size, EPOCHS)
    at = min(at, there.old * EPOCHS)
    state, groups = run(family, at, there.old, 1)
    program = recognise("torch", [state], groups)
    rebased = program.rebased(there.steps)
    assert [list(s) for s in rebased.states()] == [list(state)]
    assert [list(g) for g in rebased.groups()] == [list(g) for g in program.groups()]
    s = there.steps
    back = rebased.rebased(Steps(old=s.new, new=s.old, old_total=s.new_total, new_total=s.old_total))
    assert abs(back.count - at) <= max(1, math.ceil(ratio))
    if at < there.old * EPOCHS:
        later = recognise(
            "torch", [run(family, at + 1, there.old, 1)[0]], run(family, at + 1, there.old, 1)[1]
        )
        assert later.rebased(there.steps).count >= rebased.count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scaled_rates_are_those_of_a_scheduler_with_scaled_rates(family: str, factor: float) -> None:
    """A power of two scales every float exactly."""
    state, groups = run(family, 77)
    program = recognise("torch", [state], groups)
    scaled = program.scaled(factor)
    assert scaled.ahead(60) == pytest.approx([factor * lr for lr in program.ahead(60)], rel=1e-12)
    assert scaled.curve(60) == pytest.approx([factor * lr for lr in program.curve(60)], rel=1e-12)
    assert scaled.scaled(1 / factor).states() == [state]


@pytest.mark.parametrize("family", FAMILIES)
def test_ahead_is_what_the_library_does_next(family: str) -> None:
    kind, build = FAMILIES[family]
    opt = optimizer(1, kind)
    scheduler = build(opt, lambda epochs: round(epochs * 40), 40)
    trace(scheduler, opt, 77)
    program = recognise("torch", [plain_state(scheduler)], plain_groups(opt))
    assert program.ahead(100) == rates(trace(scheduler, opt, 99))


def test_a_length_is_known_where_the_schedule_has_one() -> None:
    found = {family: recognise("torch", [s], g).length() for family in FAMILIES for s, g in [run(family, 3)]}
    assert {k: v for k, v in found.items() if v is not None} == {
        "LinearLR down": 240, "PolynomialLR": 240, "CosineAnnealingLR": 240, "CosineAnnealingLR waves": 80,
        "OneCycleLR": 240, "OneCycleLR three phases": 240, "SequentialLR warmup, cosine": 240,
        "SequentialLR of three": 240, "SequentialLR of a chain": 240, "SequentialLR in SequentialLR": 240,
    }  # fmt: skip


# --- rounding ------------------------------------------------------------------------------------------


def test_a_step_size_that_does_not_divide_is_rounded_and_said() -> None:
    state, groups = saved(lambda o: lrs.StepLR(o, 7, 0.5), 30)
    program = recognise("torch", [state], groups).rebased(STREAM)
    assert program.states()[0]["step_size"] == 4
    assert program.notes == (
        "step_size 7 becomes 3.5, rounded to 4: the k-th repetition comes k x 0.5 units late",
    )
    truth = rates(trace(*_opened(lambda o: lrs.StepLR(o, 4, 0.5)), 40))
    assert program.curve(40) == truth[:40] and program.groups()[0]["lr"] == truth[15]


def test_milestones_that_fall_together_both_drop() -> None:
    state, groups = saved(lambda o: lrs.MultiStepLR(o, [27, 28, 60], 0.1), 27)
    program = recognise("torch", [state], groups).rebased(STREAM)
    assert program.states()[0]["milestones"] == {14: 2, 30: 1}
    assert any("fall together on 14" in note for note in program.notes)
    truth = rates(trace(*_opened(lambda o: lrs.MultiStepLR(o, [14, 14, 30], 0.1)), 40))
    assert program.curve(40) == truth[:40] and program.count == 13 and program.groups()[0]["lr"] == 0.1


def test_a_milestone_that_rounding_passes_is_not_lost() -> None:
    """Place and milestone both round to 15: the drop has happened there, and must be in the rate."""
    steps = Steps(old=Clock(samples=7), new=Clock(samples=13))
    state, groups = saved(lambda o: lrs.MultiStepLR(o, [28], 0.1), 28)
    program = recognise("torch", [state], groups).rebased(steps)
    assert program.count == 15 and program.states()[0]["milestones"] == {15: 1}
    assert program.groups()[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("units", [7, 11, 13, 23, 50, 101])
@pytest.mark.parametrize("samples", [5, 9, 12, 17, 36])
def test_lengths_in_iterations_stay_within_a_step(units: int, samples: int) -> None:
    """Constants that are no whole numbers afterwards: the curve over samples moves by less than a step."""
    steps = Steps(old=Clock(samples=12), new=Clock(samples=samples))

    def build(o: Any) -> Any:
        warm = lrs.LinearLR(o, 0.1, 1.0, units)
        return lrs.SequentialLR(o, [warm, lrs.CosineAnnealingLR(o, 5 * units)], [units])

    for at in (0, units // 2, units, 3 * units, 6 * units):
        state, groups = saved(build, at)
        old = recognise("torch", [state], groups)
        new = old.rebased(steps)
        before, after = old.curve(6 * units + 1), new.curve(math.ceil(6 * units * 12 / samples) + 2)
        step = max(abs(a - b) for curve in (before, after) for a, b in pairwise(curve))
        for t, lr in enumerate(before):
            assert abs(lr - after[steps.position(t)]) <= 2 * step


def test_a_kept_warmup_is_left_and_the_rest_ends_at_the_same_place() -> None:
    state, groups = run("SequentialLR warmup, cosine", 100)
    program = recognise("torch", [state], groups).rebased(TWICE.steps, warmup="keep")
    (new,) = program.states()
    assert new["_milestones"] == [40] and new["_schedulers"][0]["total_iters"] == 40
    assert new["_schedulers"][1]["T_max"] == 80 and program.length() == 120


def _opened(build: Any, groups: int = 1) -> tuple[Any, Any]:
    opt = optimizer(groups)
    return build(opt), opt


# --- several schedulers, other versions, accelerate ---------------------------------------------------


def test_two_schedulers_on_one_optimizer() -> None:
    """A warmup beside a decay, both stepped after every update."""

    def both(o: Any, n: int) -> list[Any]:
        return [lrs.LinearLR(o, 0.1, 1.0, n), lrs.StepLR(o, 2 * n, 0.5)]

    def go(schedulers: list[Any], opt: Any, steps: int) -> list[list[float]]:
        out = [[g["lr"] for g in opt.param_groups]]
        for _ in range(steps):
            for scheduler in schedulers:
                scheduler.step()
            out.append([g["lr"] for g in opt.param_groups])
        return out

    opt = optimizer(2)
    schedulers = both(opt, 40)
    go(schedulers, opt, 90)
    program = recognise("torch", [plain_state(s) for s in schedulers], plain_groups(opt)).rebased(TWICE.steps)
    truth_opt = optimizer(2)
    truth = go(both(truth_opt, 20), truth_opt, 120)
    new_opt = optimizer(2)
    resumed = both(new_opt, 20)
    for scheduler, state in zip(resumed, program.states(), strict=True):
        scheduler.load_state_dict(state)
    for group, values in zip(new_opt.param_groups, program.groups(), strict=True):
        group.update(values)
    assert go(resumed, new_opt, 75) == truth[45:]


def test_states_of_older_versions_keep_their_fields() -> None:
    state, groups = run("CosineAnnealingLR", 100)
    old = {k: v for k, v in state.items() if k != "_is_initial"} | {"verbose": False}
    program = recognise("torch", [old], groups).rebased(TWICE.steps)
    assert list(program.states()[0]) == list(old)
    cycle, cycle_groups = run("OneCycleLR three phases", 100)
    del cycle["_anneal_func_type"]
    cycle["anneal_func"] = {"a function": "that was pickled"}
    found = recognise("torch", [cycle], cycle_groups).rebased(TWICE.steps)
    newer = recognise("torch", [run("OneCycleLR three phases", 100)[0]], cycle_groups).rebased(TWICE.steps)
    assert found.groups() == newer.groups() and found.states()[0]["anneal_func"] == cycle["anneal_func"]


def test_a_step_count_of_its_own_is_kept() -> None:
    """accelerate counts skipped steps in it; old versions of SequentialLR are one ahead."""
    for ahead, expected in ((1, 51), (2, 52), (0, 50), (300, 400)):
        state, groups = run("StepLR", 100)
        state["_step_count"] = 100 + ahead
        program = recognise("torch", [state], groups).rebased(TWICE.steps)
        assert program.states()[0]["_step_count"] == expected


def test_accelerate_steps_once_per_process() -> None:
    """The counter grows by the number of processes per update: constants are multiplied by it too."""
    steps = Steps(
        old=Clock(samples=12, epoch=Fraction(40), size=480, repeats=2),
        new=Clock(samples=24, epoch=Fraction(20), size=480, repeats=4),
    )
    state, groups = saved(lambda o: lrs.CosineAnnealingLR(o, 480), 200)
    program = recognise("torch", [state], groups).rebased(steps)
    assert program.count == 200 and program.states() == [state]


# --- what cannot be known -----------------------------------------------------------------------------


def test_functions_are_not_saved() -> None:
    for build in (
        lambda o: lrs.LambdaLR(o, lambda t: 0.99**t),
        lambda o: lrs.MultiplicativeLR(o, lambda t: 0.99),
    ):
        state, groups = saved(build, 100, 2)
        program = recognise("torch", [state], groups)
        rebased = program.rebased(TWICE.steps)
        assert not rebased.known and rebased.groups() == program.groups()
        (new,) = rebased.states()
        assert new == {**state, "last_epoch": 50, "_step_count": 51}
        assert "LambdaLR or MultiplicativeLR is not in the checkpoint" in rebased.notes[0]
        assert program.ahead(3)[0] == groups[0]["lr"] and math.isnan(program.ahead(3)[1])


def test_an_unknown_function_before_a_known_schedule_does_not_matter() -> None:
    """SequentialLR sets its next child's own first value at the milestone."""

    def build(o: Any, n: int) -> Any:
        return lrs.SequentialLR(o, [lrs.LambdaLR(o, lambda t: t / n), lrs.CosineAnnealingLR(o, 5 * n)], [n])

    state, groups = saved(lambda o: build(o, 40), 100, 2)
    program = recognise("torch", [state], groups).rebased(TWICE.steps)
    truth_opt = optimizer(2)
    truth = trace(build(truth_opt, 20), truth_opt, 120)
    assert program.known
    assert [g["lr"] for g in program.groups()] == [row[0] for row in truth[50]]
    early = recognise("torch", [saved(lambda o: build(o, 40), 20, 2)[0]], groups)
    assert not early.known


def test_a_scheduler_that_follows_a_metric_is_left() -> None:
    opt = optimizer(1)
    scheduler = lrs.ReduceLROnPlateau(opt, patience=10, cooldown=4)
    for loss in range(30):
        scheduler.step(loss)
    state, groups = plain_state(scheduler), plain_groups(opt)
    program = recognise("torch", [state], groups)
    assert program.rebased(TWICE.steps).states() == [state] and not program.known
    per_unit = program.rebased(TWICE.steps, plateau=True)
    (new,) = per_unit.states()
    assert (new["patience"], new["cooldown"], new["last_epoch"]) == (5, 2, 15)
    assert per_unit.groups() == program.groups()


def test_classes_that_are_not_known_move_their_counter_only() -> None:
    state, groups = run("CosineAnnealingLR", 100)
    state["warmup_epochs"] = 5
    rebased = recognise("torch", [state], groups).rebased(TWICE.steps)
    assert rebased.states() == [{**state, "last_epoch": 50, "_step_count": 51}]
    assert rebased.groups() == recognise("torch", [state], groups).groups()
    assert any("T_max, warmup_epochs may count steps" in note for note in rebased.notes)


def test_a_rate_that_something_else_changed_is_said() -> None:
    state, groups = run("CosineAnnealingLR", 100)
    groups[0]["lr"] *= 0.5
    (note,) = recognise("torch", [state], groups).notes
    assert "something else changed it" in note


def test_a_rate_of_a_later_group_that_was_set_by_hand_is_no_result_of_the_constants() -> None:
    """torch goes on from the group's rate, so the replayed one would be another schedule."""
    opt = optimizer(2)
    scheduler = lrs.CosineAnnealingLR(opt, 240)
    trace(scheduler, opt, 90)
    opt.param_groups[1]["lr"] *= 5
    trace(scheduler, opt, 10)
    found = recognise("torch", [plain_state(scheduler)], plain_groups(opt))
    assert found.contradiction is not None and found.contradiction[0] == opt.param_groups[1]["lr"]
    opt.param_groups[1]["lr"] *= 5  # not the scheduler's own
    (note,) = recognise("torch", [plain_state(scheduler)], plain_groups(opt)).notes
    assert "of group 1" in note


STEPS_7 = {"last_batch_iteration": 6}
LINEAR = {
    "type": "WarmupLR",
    "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.1, "warmup_type": "linear"},
}
COSINE = {"lr_scheduler_type": "cosine", "max_steps": 20, "warmup_steps": 0}
LINEAR_MM = {
    "param_name": "lr", "begin": 0, "end": 10, "total_iters": 9, "start_factor": 0.1, "end_factor": 1.0,
    "by_epoch": False, "base_values": [0.1, 0.1], "last_step": 5, "_global_step": 5, "verbose": False,
    "_last_value": [0.06, 0.06],
}  # fmt: skip


@pytest.mark.parametrize(
    ("framework", "state", "about", "right"),
    [
        ("deepspeed", STEPS_7, LINEAR, 0.06),
        ("transformers", {"last_epoch": 10, "_step_count": 11, "base_lrs": [0.1] * 2, "_last_lr": [0.05] * 2,
                          "lr_lambdas": [None, None]}, COSINE, 0.05),
        ("mmengine", LINEAR_MM, {}, 0.06),
    ],
)  # fmt: skip
def test_every_group_is_held_against_the_constants(
    framework: str, state: dict[str, Any], about: dict[str, Any], right: float
) -> None:
    """Not group 0 alone: a rate that was set by hand in a later one would be replayed away in silence."""
    groups = [{"lr": right, "initial_lr": 0.1}, {"lr": right, "initial_lr": 0.1}]
    assert recognise(framework, [state], groups, about).explained
    groups[1]["lr"] *= 3
    found = recognise(framework, [state], groups, about)
    assert not found.explained and found.known
    assert any("of group 1" in note for note in found.notes)


def test_groups_that_were_added_later_are_no_damage() -> None:
    """As a run does that unfreezes its layers one after another."""
    opt = optimizer(1)
    scheduler = lrs.StepLR(opt, 10, 0.5)
    trace(scheduler, opt, 15)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.01})
    trace(scheduler, opt, 15)
    with pytest.raises(Unsupported, match="made for 1 of the 2 param_groups"):
        recognise("torch", [plain_state(scheduler)], plain_groups(opt))


# --- far away, and damaged ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if "hain" not in f and " in " not in f])
def test_a_distant_step_has_a_formula(family: str) -> None:
    """Where replay would take too long; here compared with it, in the middle of schedules of 10 000 units."""
    state, groups = run(family, 0, 2000)
    program = recognise("torch", [state], groups)
    assert isinstance(program, TorchProgram)
    for at in (1999, 2000, 5678, 11_999):
        near, exact = replayed(program, at, near=True), replayed(program, at)
        assert [g["lr"] for g in near.groups] == pytest.approx(
            [g["lr"] for g in exact.groups], rel=1e-8, abs=1e-12
        )
        assert near.states[0]["last_epoch"] == exact.states[0]["last_epoch"] == at
        assert near.states[0].get("_step_count") == exact.states[0].get("_step_count")
    state = copy.deepcopy(state)
    for part in (state, *state.get("_schedulers", ())[-1:]):
        part["last_epoch"] = 3_000_000
    assert recognise("torch", [state], groups).count == 3_000_000


def test_a_chain_that_is_too_long_is_refused() -> None:
    state, groups = run("ChainedScheduler", 10)
    for child in state["_schedulers"]:
        child["last_epoch"] = 10**12
    with pytest.raises(UsageError, match="too many to replay") as caught:
        recognise("torch", [state], groups)
    assert caught.value.id == "schedule-unknown"


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3),
    st.sampled_from([10**18, -1, math.nan, math.inf, -0.5, 1e300, "", "cos", "x"]),
    st.just([]), st.just({}), st.just([1, 2]), st.just({3: -1}), st.just([None]),
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_damage_is_an_error_of_the_file(family: str, data: st.DataObject) -> None:
    """Whatever a field holds: it is recognised, or refused, and nothing else."""
    state, groups = copy.deepcopy(_some(family))
    places: list[tuple[Any, Any]] = [(state, k) for k in state] + [(groups[0], k) for k in groups[0]]
    for child in state.get("_schedulers", ()):
        places += [(child, k) for k in child]
    where, key = data.draw(st.sampled_from(places))
    if data.draw(st.booleans()):
        where[key] = data.draw(JUNK)
    else:
        del where[key]
    try:
        program = recognise("torch", [state], groups)
        rebased = program.rebased(TWICE.steps)
        rebased.scaled(2.0).states()
        rebased.ahead(3)
    except UsageError as error:
        assert error.id in ("schedule-damaged", "schedule-unknown")


_CACHE: dict[str, tuple[State, list[State]]] = {}


def _some(family: str) -> tuple[State, list[State]]:
    if family not in _CACHE:
        _CACHE[family] = run(family, 70)
    return _CACHE[family]


def test_endless_nesting_is_refused() -> None:
    state, groups = run("StepLR", 3)
    deep: State = state
    for _ in range(30):
        deep = {"_schedulers": [deep], "_last_lr": [0.1, 0.1]}
    wide: State = state
    for _ in range(12):
        wide = {"_schedulers": [wide] * 10, "_last_lr": [0.1, 0.1]}
    for hostile in (deep, wide):
        with pytest.raises(UsageError, match="nested without end"):
            recognise("torch", [hostile], groups)


@pytest.mark.parametrize(
    ("framework", "states", "groups", "message"),
    [
        ("keras", [{}], [{"lr": 1.0}], "not known"),
        ("torch", [], [{"lr": 1.0}], "no scheduler state"),
        ("torch", [{}], [], "no param_groups"),
        ("torch", [[]], [{"lr": 1.0}], "not a dict"),
        ("deepspeed", [{"last_batch_iteration": True}], [{"lr": 1.0}], "last_batch_iteration is True"),
        ("deepspeed", [{}], [{"lr": 1.0}], "last_batch_iteration is None"),
        ("mmengine", [{"by_epoch": 1}], [{"lr": 1.0}], "by_epoch is 1"),
    ],
)
def test_what_is_no_schedule_is_refused(framework: str, states: Any, groups: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recognise(framework, states, groups)
