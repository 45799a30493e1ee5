"""Progress among the values that training code saves beside model and optimizer: read and written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ckpttools.formats import counters
from ckpttools.tensors import TensorRef
from ckpttools.training import Training
from ckpttools.tree import Path as Keys
from ckpttools.tree import Value, at, put

# what the values may be; those of the others are whole numbers
_KINDS: dict[str, tuple[type, ...]] = dict.fromkeys(("epoch", "train_loss", "val_loss"), (int, float))


MILESTONES = "milestones"
_NUMBER = re.compile(r"-?[0-9]{1,18}")


def with_numbers(value: Value) -> Value:
    """With the milestones of each MultiStepLR in it as its class keeps them, a Counter of numbers, and the
    state of each optimizer that numbers its parameters under these numbers.

    torch's planner makes text of every key (torch/distributed/checkpoint/_traverse.py, 2.13): a scheduler
    that was given text would never lower its rate, and an optimizer begins anew without a word.
    """
    if isinstance(value, list):
        return [with_numbers(inner) for inner in value]
    if type(value) is not dict:
        return value
    made = {key: with_numbers(inner) for key, inner in value.items()}
    state, groups = made.get("state"), made.get("param_groups")
    if type(state) is dict and isinstance(groups, list) and state:
        listed = (group.get("params") for group in groups if isinstance(group, dict))
        ids = {str(i): i for each in listed if isinstance(each, list) for i in each if type(i) is int}
        if state.keys() <= ids.keys():
            made["state"] = {ids[str(key)]: inner for key, inner in state.items()}
    stones = made.get(MILESTONES)
    if type(stones) is dict and {"gamma", "last_epoch"} <= made.keys():
        texts = [isinstance(key, str) and _NUMBER.fullmatch(key) for key in stones]
        if all(texts) and all(type(times) is int for times in stones.values()):
            made[MILESTONES] = Counter({int(key): times for key, times in stones.items()})
    return made


def training(client: Mapping[str, Value]) -> Training:
    """What the client's values say about where training stood. Absent values are None."""
    found: dict[str, Any] = {}
    for name in counters.NAMES:
        value = next((value for _, value in _found(client, name)), None)
        if value is not None:
            found[name] = value
    scheduler = _scheduler(client)
    return Training(**found, scheduler=client[scheduler] if scheduler else {})


def with_state(client: Mapping[str, Value], state: Training, *, own: bool) -> dict[str, Value]:
    """The client's values with the progress as `state` has it: in its place, or under its first name.

    `own`: the state was read from these values. Another format has counters of its own, and a value of the
    training code that says otherwise is about something else, and stays.
    """
    out: Value = dict(client)
    values = state.stated
    for name, names in counters.NAMES.items():
        value = values[name]
        held = list(_found(out, name))
        if name == "step" and held and held[0][0][-1] in counters.ITERATION and state.iteration != value:
            held = []  # that one counts iterations, of which there are several for each update
        if value is not None and (not held or held[0][1] != value):
            out = put(out, held[0][0] if held and own else names[:1], value)
    scheduler = _scheduler(client)
    if state.scheduler and (scheduler is None or client[scheduler] is not state.scheduler):
        out = put(out, (scheduler_key(client),), state.scheduler)
    return dict(out)


def scheduler_key(client: Mapping[str, Value]) -> str:
    """Under which `with_state` writes the schedule."""
    return _scheduler(client) or counters.SCHEDULER[0]


def _scheduler(client: Mapping[str, Value]) -> str | None:
    return next((key for key in counters.SCHEDULER if isinstance(client.get(key), Mapping)), None)


def _found(client: Mapping[str, Value], name: str) -> Iterator[tuple[Keys, Value]]:
    names, kinds = counters.NAMES[name], _KINDS.get(name, (int,))
    for place in counters.PLACES:
        for key in names:
            value = at(client, *place, key)
            value = scalar(value) if isinstance(value, TensorRef) else value
            if isinstance(value, kinds) and not isinstance(value, bool):
                yield (*place, key), value


def scalar(ref: TensorRef) -> int | float | None:
    """The value of a tensor of one element."""
    if ref.numel != 1:
        return None
    from ckpttools.passes.read import load  # numpy: needed for tensors alone

    value = load(ref).reshape(-1)[0].item()
    return value if isinstance(value, int | float) else None
