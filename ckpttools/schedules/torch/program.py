"""Schedules of torch.optim.lr_scheduler as a checkpoint holds them: plain PyTorch, Lightning, accelerate.

A state dict holds the counter and all constants, and wins over what the new run constructs; the learning
rate itself is read from the optimizer's param_groups.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from msgspec import Struct

from ckpttools.errors import UsageError
from ckpttools.schedules.lengths import Steps
from ckpttools.schedules.program import (
    Program,
    State,
    advance,
    computing,
    real,
    reals,
    scaled_group,
    too_long,
)
from ckpttools.schedules.torch.lengths import Rescaling, rescale
from ckpttools.schedules.torch.rates import EITHER, OPEN, annealing
from ckpttools.schedules.torch.states import LAMBDA, PLATEAU, UNKNOWN, Node, node_of
from ckpttools.schedules.torch.steps import can_jump, construct, jump, step

# a replayed learning rate may differ from the saved one by what versions of torch and of libm differ by
SAME = 1e-6
NEAR = 10_000  # steps after which closed forms answer where the last digits do not matter


class TorchMachine(Struct):
    """Schedulers that are stepped in list order every unit."""

    states: list[State]
    groups: list[State]
    nodes: list[Node]

    @classmethod
    def of(cls, states: Sequence[State], groups: Sequence[State], anneal: str) -> Self:
        """A copy, as loaded."""
        own, own_groups = copy.deepcopy(list(states)), copy.deepcopy(list(groups))
        nodes = [node_of(s, own_groups) for s in own]
        for node in (n for top in nodes for n in top.walk()):
            if node.kind == "OneCycleLR":  # old versions of torch saved a function in its place
                node.state.setdefault("_anneal_func_type", anneal)
        return cls(own, own_groups, nodes)

    def restart(self) -> None:
        """Construct everything anew with the constants that the states hold."""
        for group in self.groups:
            group["lr"] = group["initial_lr"]
        with computing():
            for node in self.nodes:
                construct(node, self.groups)

    def step(self) -> None:
        """One step() of each."""
        for node in self.nodes:
            step(node, self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchProgram(Program):
    """`anneal` is OneCycleLR's strategy where the state holds a function instead of its name."""

    anneal: str = "cos"
    replays: bool = True  # whether the learning rate of this place follows from the constants

    @property
    def nodes(self) -> list[Node]:
        """The schedulers; their states are the saved ones and must not be changed."""
        return [node_of(s, self.saved_groups) for s in self.saved_states]

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(map(str, self.nodes))

    @property
    def count(self) -> int:
        return max((_count(node) for node in self.nodes), default=0)

    @property
    def by_epoch(self) -> bool | None:
        return True if self.in_fractions else None

    @property
    def known(self) -> bool:
        return self.replays

    @property
    def in_fractions(self) -> bool:
        """Whether the code steps it by parts of an epoch, `step(epoch + batch / batches)` as torch documents
        it for warm restarts: then T_cur is no whole number, and gives the saved rate.
        """
        (node, *others), groups = self.nodes, self.saved_groups
        at = node.state.get("T_cur")
        if (
            others
            or node.kind != "CosineAnnealingWarmRestarts"
            or not isinstance(at, float)
            or at.is_integer()
        ):
            return False
        rates = OPEN[node.kind](node.state, list(groups), False)
        return all(math.isclose(r, g["lr"], rel_tol=SAME) for r, g in zip(rates, groups, strict=True))

    @property
    def unknown(self) -> str:
        if self.in_fractions:
            return "it is stepped by parts of an epoch, which the code counts"
        kind = _without_rate(self.nodes)
        return "the schedule has ended" if kind is None else _WHY[kind]

    def machine(self, *, fresh: bool) -> TorchMachine:
        made = TorchMachine.of(self.saved_states, self.saved_groups, self.anneal)
        if fresh:
            made.restart()
        return made

    def length(self) -> int | None:
        found = [_length(node) for node in self.nodes]
        ends = [n for n in found if n is not None]
        return max(ends) if ends else None

    def rebased(self, steps: Steps, *, warmup: str = "scale", plateau: bool = False) -> TorchProgram:
        if steps.is_identity:
            return self
        states = copy.deepcopy(list(self.saved_states))
        groups = copy.deepcopy(list(self.saved_groups))
        to = Rescaling(steps, keep_warmup=warmup == "keep", plateau=plateau)
        for state in states:
            rescale(node_of(state, groups), to)
        changed = replace(self, saved_states=tuple(states), saved_groups=tuple(groups))
        changed = changed.with_notes(*to.notes)
        counts = [_count(n) for n in self.nodes]
        if len(set(counts)) == 1:
            return changed.placed(steps.position(counts[0]), plateau=plateau)
        moved = []
        for state, count in zip(states, counts, strict=True):
            one = replace(changed, saved_states=(state,)).placed(steps.position(count), plateau=plateau)
            kept = {"_last_lr": state["_last_lr"]} if "_last_lr" in state else {}
            moved.append({**one.saved_states[0], **kept})
        return replace(changed, saved_states=tuple(moved))

    def placed(self, count: int, *, plateau: bool = True) -> TorchProgram:
        """These constants after `count` steps of a run from scratch."""
        before = replayed(self, self.count, near=True)
        after = replayed(self, count)
        states = [
            _merged(old, new, at_old, plateau=plateau)
            for old, new, at_old in zip(self.saved_states, after.states, before.states, strict=True)
        ]
        groups = [_merged_group(a, b) for a, b in zip(self.saved_groups, after.groups, strict=True)]
        found = replace(self, saved_states=tuple(states), saved_groups=tuple(groups))
        if math.isnan(after.groups[0]["lr"]) or _by_metric(self.nodes):
            return replace(found, replays=False).with_notes(_unknown_note(self))
        return replace(found, replays=True)

    def scaled(self, factor: float) -> TorchProgram:
        if factor == 1:
            return self
        states = [_scaled(node, factor) for node in self.nodes]
        groups = tuple(scaled_group(g, factor) for g in self.saved_groups)
        return replace(self, saved_states=tuple(states), saved_groups=tuple(groups))


def recognise_torch(
    states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> TorchProgram:
    """Raises UsageError where a state is damaged."""
    plain_groups = tuple(_group(dict(g), i, states) for i, g in enumerate(groups))
    program = TorchProgram(saved_states=tuple(map(dict, states)), saved_groups=plain_groups, about=about)
    nodes = program.nodes
    counts = {_count(n) for n in nodes}
    if len(counts) > 1:
        return replace(program, replays=False).with_notes(
            "the schedulers have made different numbers of steps: each counter is mapped by itself, and the "
            "learning rate is left as it is"
        )
    if program.in_fractions:
        return replace(program, replays=False).with_notes(f"{program.families[0]}: {program.unknown}")
    program = _with_anneal(program)
    found = replayed(program, program.count, near=True).groups
    if math.isnan(found[0]["lr"]) or _by_metric(nodes):
        return replace(program, replays=False).with_notes(_unknown_note(program))
    return program.compared(found, "_last_lr")


def _by_metric(nodes: Sequence[Node]) -> bool:
    return any(n.kind == PLATEAU for top in nodes for n in top.walk())


def _group(group: State, index: int, states: Sequence[Mapping[str, Any]]) -> State:
    real(group, "lr", where=f"param_groups[{index}]")
    if "initial_lr" not in group:
        bases = [s.get("base_lrs") for s in states]
        known = [b[index] for b in bases if isinstance(b, (list, tuple)) and len(b) > index]
        group["initial_lr"] = known[0] if known else group["lr"]
    real(group, "initial_lr", where=f"param_groups[{index}]")
    return group


_WHY = {
    LAMBDA: "the function of a LambdaLR or MultiplicativeLR is not in the checkpoint",
    PLATEAU: "ReduceLROnPlateau follows a metric",
    UNKNOWN: "the scheduler's class is not known",
}


def _without_rate(nodes: Sequence[Node]) -> str | None:
    """The first kind among them whose rates no constants give."""
    return next((n.kind for top in nodes for n in top.walk() if n.kind in _WHY), None)


def _unknown_note(program: TorchProgram) -> str:
    if _without_rate(program.nodes) == PLATEAU:
        return f"{program.unknown}: it is left as it is, with its patience in steps of the old run"
    return (
        f"{program.unknown}: its counter is moved, and the learning rate stays at "
        f"{program.saved_groups[0]['lr']:.6g} until the first step, off by at most what the schedule changes "
        "in one step"
    )


def _with_anneal(program: TorchProgram) -> TorchProgram:
    """With the strategy that fits the saved rate, where an old version of torch did not name it."""
    states = [n.state for top in program.nodes for n in top.walk() if n.kind == "OneCycleLR"]
    unnamed = [s for s in states if "_anneal_func_type" not in s]
    if not unnamed:
        return program
    named = next(filter(None, map(annealing, unnamed)), None)
    if named is not None:
        return replace(program, anneal=named)
    off = {}
    for kind in ("cos", "linear"):
        lr = replayed(replace(program, anneal=kind), program.count, near=True).groups[0]["lr"]
        off[kind] = abs(lr - program.saved_groups[0]["lr"])
    if program.count and math.isclose(
        off["linear"], off["cos"], abs_tol=SAME * program.saved_groups[0]["lr"]
    ):
        return program.with_notes(EITHER)
    return replace(program, anneal="linear" if off["linear"] < off["cos"] else "cos")


def replayed(program: TorchProgram, count: int, *, near: bool = False) -> TorchMachine:
    """The schedule after `count` steps; where `near` is enough or replay too long, by closed forms."""
    machine = program.machine(fresh=True)
    jumps = len(machine.nodes) == 1 and can_jump(machine.nodes[0])
    if not too_long(count) and not (near and jumps and count > NEAR):
        advance(machine, count)
        return machine
    if not jumps:
        raise UsageError(
            "schedule-unknown",
            f"{', '.join(program.families)} after {count} steps: too many to replay one by one",
            why="schedulers that act together have no formula for a distant step",
        )
    with computing():
        jump(machine.nodes[0], machine.groups, count)
    return machine


def _count(node: Node) -> int:
    if "last_epoch" in node.state:
        return max(0, int(node.state["last_epoch"]))
    return max((_count(child) for child in node.children), default=0)


def _length(node: Node) -> int | None:
    s = node.state
    match node.kind:
        case "SequentialLR":
            last = _length(node.children[-1])
            stones: list[int] = s["_milestones"]
            return None if last is None else last + (stones[-1] if stones else 0)
        case "ChainedScheduler":
            ends = [n for n in map(_length, node.children) if n is not None]
            return max(ends) if ends else None
        case "CosineAnnealingLR":
            return _nearby(s["T_max"])
        case "PolynomialLR":
            return _nearby(s["total_iters"])
        case "LinearLR":
            return _nearby(s["total_iters"]) if s["end_factor"] < s["start_factor"] else None
        case "OneCycleLR":
            return int(s["total_steps"])
    return None


def _merged(old: State, new: State, at_old: State, *, plateau: bool) -> State:
    """The saved state with replayed values: no key is added, NaN leaves the saved value."""
    if "_schedulers" not in old and set(old) >= {"patience", "num_bad_epochs"} and not plateau:
        return old
    out: State = {}
    for key, value in old.items():
        fresh = new[key]
        if key == "_schedulers":
            pairs = zip(value, fresh, at_old[key], strict=True)
            out[key] = type(value)(_merged(a, b, c, plateau=plateau) for a, b, c in pairs)
        elif key == "_step_count" and value != at_old[key]:
            # torch versions and accelerate differ in what they count here; the distance to last_epoch stays
            off = value - old.get("last_epoch", value)
            out[key] = new["last_epoch"] + off if 0 <= off <= 2 and "last_epoch" in new else value
        elif key == "_last_lr" and isinstance(fresh, list) and any(math.isnan(x) for x in fresh):
            out[key] = value
        else:
            out[key] = fresh
    return out


def _merged_group(old: State, new: State) -> State:
    lost = {k for k in ("lr", "momentum") if isinstance(new.get(k), float) and math.isnan(new[k])}
    return {k: v if k in lost else new[k] for k, v in old.items()}


def _scaled(node: Node, factor: float) -> State:
    out = dict(node.state)
    for key in ("base_lrs", "_last_lr", "max_lrs", "min_lrs"):
        if isinstance(out.get(key), (list, tuple)):
            out[key] = [x * factor for x in reals(out, key, len(out[key]), where=node.kind)]
    for key in ("eta_min", "default_min_lr"):
        if isinstance(out.get(key), (int, float)):
            out[key] *= factor
    if node.children:
        out["_schedulers"] = type(out["_schedulers"])(_scaled(c, factor) for c in node.children)
    return out


def _nearby(value: int | float) -> int:
    return math.floor(value + 0.5)
