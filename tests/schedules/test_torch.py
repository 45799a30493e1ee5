"""torch's schedulers, rebased: the real ones go on from the state as a run from scratch would."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
from schedules.batches import BY_SIZE, Change, changes
from schedules.torch_families import (
    EPOCHS,
    FAMILIES,
    State,
    optimizer,
    plain_groups,
    plain_state,
    rates,
    rebuilt,
    trace,
)

from ckpttools.schedules import recognise


def saved(family: str, change: Change, groups: int) -> tuple[Any, dict[int, tuple[State, list[State]]]]:
    """A run with the old batch: what it would save at every place."""
    kind, build = FAMILIES[family]
    opt = optimizer(groups, kind)
    scheduler = build(opt, change.unit(change.old), change.old)
    out, places = {}, set(change.places())
    for count in range(max(places) + 1):
        if count:
            trace(scheduler, opt, 1)
        if count in places:
            out[count] = plain_state(scheduler), copy.deepcopy(plain_groups(opt))
    return scheduler, out


def resumed(
    family: str, change: Change, state: State, values: list[State], steps: int
) -> list[tuple[Any, ...]]:
    """A real scheduler built with the old constants, loaded, stepped on."""
    kind, build = FAMILIES[family]
    opt = optimizer(len(values), kind)
    scheduler = build(opt, change.unit(change.old), change.old)
    scheduler.load_state_dict(copy.deepcopy(state))
    for group, new in zip(opt.param_groups, values, strict=True):
        group.update(new)
    return trace(scheduler, opt, steps)


@BY_SIZE
@pytest.mark.parametrize("family", FAMILIES)
def test_goes_on_as_from_scratch(family: str, sizes: tuple[int, int]) -> None:
    """Bit for bit a run with the rebased constants; and within a step, mostly bit for bit, a user's own."""
    kind, build = FAMILIES[family]
    worst, worst_name, cases, same = 0.0, "", 0, 0
    for number, change in enumerate(changes(EPOCHS, sizes)):
        total = change.steps.new_total
        assert total is not None
        scheduler, places = saved(family, change, 1 + number % 3)
        opt = optimizer(1 + number % 3, kind)
        user = trace(build(opt, change.unit(change.new), change.new), opt, total)
        step = max(abs(a - b) for a, b in pairwise(rates(user)))
        truth: list[tuple[Any, ...]] = []
        for at, (state, values) in places.items():
            program = recognise("torch", [state], values)
            assert program.known and program.notes == () and program.count == at
            rebased = program.rebased(change.steps)
            count = change.steps.position(at)
            assert rebased.count == count
            (new_state,) = rebased.states()
            assert list(new_state) == list(state)
            if not truth:
                opt = optimizer(1 + number % 3, kind)
                truth = trace(rebuilt(opt, type(scheduler).__name__, new_state, scheduler), opt, total)
                assert rebased.curve(total) == rates(truth)[:-1]
            found = resumed(family, change, new_state, rebased.groups(), total - count)
            assert found == truth[count:], (change.name, at)
            off = max(abs(a - b) for a, b in zip(rates(user)[count:], rates(found), strict=True))
            assert off <= step * (1 + 1e-9), (change.name, at)
            if step and off / step > worst:
                worst, worst_name = off / step, f"{change.name} at {at}"
            cases += 1
            same += found == user[count:]
    how = f"{cases} cases, {same} bit for bit a user's own"
    print(f"\n{family:36} {how}; worst {worst:.3g} of a step {worst_name}")
