"""torch.optim.lr_scheduler set in motion without torch: the same operations in the same order.

`construct` does what a class's constructor does and `step` what its step() does, on plain param_groups;
`jump` answers where so many steps would take too long.

Source: torch 2.13, torch/optim/lr_scheduler.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ckpttools.schedules.program import State
from ckpttools.schedules.torch.rates import CLOSED, OPEN, set_momentum
from ckpttools.schedules.torch.states import CHAINED, PLATEAU, SEQUENTIAL, Node


def construct(node: Node, groups: list[State]) -> None:
    """What the constructor does to the state and to the groups."""
    s = node.state
    if node.children:
        for child in node.children:
            construct(child, groups)
        if node.kind == SEQUENTIAL:
            s["last_epoch"] = 0
            for group in groups:
                group["lr"] = group["initial_lr"]
            for child in node.children:
                _undo(child)
            first = node.children[bisect_right(s["_milestones"], 0)]
            _initial_step(first, groups)
            _put(s, "_last_lr", list(first.state.get("_last_lr", ())))
        else:
            _put(s, "_last_lr", [g["lr"] for g in groups])
        return
    if node.kind == PLATEAU:
        _put(s, "last_epoch", 0)
        return
    for i, group in enumerate(groups):
        if node.kind == "CyclicLR":
            group["lr"] = s["base_lrs"][i]
            if s["cycle_momentum"]:
                set_momentum(group, s, s["max_momentums"][i])
        elif node.kind == "OneCycleLR" and s["cycle_momentum"]:
            set_momentum(group, s, group["max_momentum"])
    _put(s, "last_epoch", -1)
    if node.kind == "CosineAnnealingWarmRestarts":
        s["T_cur"], s["T_i"] = -1, s["T_0"]
    _initial_step(node, groups)


def _initial_step(node: Node, groups: list[State]) -> None:
    _put(node.state, "_step_count", 0)
    step(node, groups, initial=True)


def _undo(node: Node) -> None:
    for child in node.children:
        _undo(child)
    if not node.children and "last_epoch" in node.state:
        node.state["last_epoch"] -= 1


def step(node: Node, groups: list[State], *, initial: bool = False) -> None:
    """What step() does."""
    s = node.state
    match node.kind:
        case "SequentialLR":
            s["last_epoch"] += 1
            stones = s["_milestones"]
            index = bisect_right(stones, s["last_epoch"])
            child = node.children[index]
            if index > 0 and stones[index - 1] == s["last_epoch"]:
                s_child = child.state
                s_child["last_epoch"] = 0
                _write(child, groups, CLOSED.get(child.kind, OPEN[child.kind])(s_child, groups, False))
            else:
                step(child, groups)
            _put(s, "_last_lr", list(child.state.get("_last_lr", ())))
        case "ChainedScheduler":
            for child in node.children:
                step(child, groups)
            _put(s, "_last_lr", [g["lr"] for g in groups])
        case "CosineAnnealingWarmRestarts":
            if s["last_epoch"] < 0:
                s["T_cur"], s["T_i"], s["last_epoch"] = 0, s["T_0"], 0
            else:
                s["last_epoch"] += 1
                s["T_cur"] += 1
                if s["T_cur"] >= s["T_i"]:
                    s["T_cur"] %= s["T_i"]
                    s["T_i"] *= s["T_mult"]
            _write(node, groups, OPEN[node.kind](s, groups, initial))
        case _:
            if "_step_count" in s:
                s["_step_count"] += 1
            if "last_epoch" in s:
                s["last_epoch"] += 1
            _write(node, groups, OPEN[node.kind](s, groups, initial))


def _write(node: Node, groups: list[State], values: Sequence[float]) -> None:
    for group, value in zip(groups, values, strict=True):
        group["lr"] = value
    _put(node.state, "_last_lr", list(values))


def _put(state: State, key: str, value: object) -> None:
    """Fields that this version of torch did not save are not invented."""
    if key in state:
        state[key] = value


# --- a distant step, by formulas: equal to replay but for the last digits ------------------------------


def can_jump(node: Node) -> bool:
    """Whether the learning rate follows from the count alone."""
    if node.kind == SEQUENTIAL:
        return all(not child.children and can_jump(child) for child in node.children)
    return node.kind not in (CHAINED, PLATEAU)


def jump(node: Node, groups: list[State], count: int) -> None:
    """From construction to `count` steps later."""
    s = node.state
    if node.kind == SEQUENTIAL:
        stones: list[int] = s["_milestones"]
        s["last_epoch"] = count
        active = bisect_right(stones, count)
        for i, child in enumerate(node.children[: active + 1]):
            begin = stones[i - 1] if i else 0
            end = count if i == active else stones[i] - 1
            if end >= begin:
                jump(child, groups, end - begin)
        _put(s, "_last_lr", list(node.children[active].state.get("_last_lr", ())))
        return
    if "_step_count" in s and node.kind != "CosineAnnealingWarmRestarts":
        s["_step_count"] += count - max(0, s.get("last_epoch", 0))
    _put(s, "last_epoch", count)
    if node.kind == "CosineAnnealingWarmRestarts":
        length, left = s["T_0"], count
        if s["T_mult"] == 1:
            left %= length
        while left >= length:
            left -= length
            length *= s["T_mult"]
        s["T_cur"], s["T_i"] = left, length
    _write(node, groups, CLOSED.get(node.kind, OPEN[node.kind])(s, groups, False))
