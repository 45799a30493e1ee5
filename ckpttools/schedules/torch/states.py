"""State dicts of torch.optim.lr_scheduler: which class each is of, checked.

A state dict is the scheduler's __dict__ without the optimizer; the name of its class is not in it, so it is
recognised by its fields, and one with fields of no class that is known is "unknown":

    LRScheduler      base_lrs, last_epoch, _step_count, _last_lr, _is_initial, _get_lr_called_within_step
    SequentialLR     _schedulers, _milestones, last_epoch, _last_lr
    ChainedScheduler _schedulers, _last_lr

Functions given to LambdaLR and MultiplicativeLR are not saved, and their states look alike.

Source: torch 2.13, torch/optim/lr_scheduler.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from ckpttools.errors import Unsupported
from ckpttools.schedules.program import State, damaged, real, reals, whole

COMMON = frozenset(
    {
        "base_lrs",
        "last_epoch",
        "_step_count",
        "_last_lr",
        "_is_initial",
        "_get_lr_called_within_step",
        "verbose",
    }
)
LAMBDA, PLATEAU, UNKNOWN = "LambdaLR or MultiplicativeLR", "ReduceLROnPlateau", "unknown"
SEQUENTIAL, CHAINED = "SequentialLR", "ChainedScheduler"
# the fields of each class besides the common ones, and those that only some versions of torch save
FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    name: (frozenset(fields.split()), frozenset(optional.split()))
    for name, fields, optional in (
        ("StepLR", "step_size gamma", ""),
        ("MultiStepLR", "milestones gamma", ""),
        ("ConstantLR", "factor total_iters", ""),
        ("LinearLR", "start_factor end_factor total_iters", ""),
        ("ExponentialLR", "gamma", ""),
        ("PolynomialLR", "total_iters power", ""),
        ("CosineAnnealingLR", "T_max eta_min", ""),
        ("CosineAnnealingWarmRestarts", "T_0 T_i T_mult eta_min T_cur", ""),
        (
            "OneCycleLR",
            "total_steps _schedule_phases cycle_momentum",
            "_anneal_func_type anneal_func use_beta1",
        ),
        (
            "CyclicLR",
            "max_lrs total_size step_ratio mode gamma scale_mode cycle_momentum",
            "_scale_fn_custom _scale_fn_ref use_beta1 base_momentums max_momentums",
        ),
        (LAMBDA, "lr_lambdas", ""),
        (
            PLATEAU,
            "factor patience cooldown num_bad_epochs cooldown_counter best",
            "min_lrs default_min_lr eps mode threshold threshold_mode mode_worse",
        ),
    )
}
DEPTH, NODES = 20, 1000


class Node(Struct, frozen=True):
    """One scheduler: `state` is changed in place by `step`."""

    kind: str
    state: State
    children: tuple[Node, ...] = ()

    def __str__(self) -> str:
        inner = f"[{', '.join(map(str, self.children))}]" if self.children else ""
        return self.kind + inner

    def walk(self) -> Iterator[Node]:
        """This one and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def kind_of(state: Mapping[str, Any]) -> str:
    """The class that a state dict is of, by its fields."""
    if "_schedulers" in state:
        return SEQUENTIAL if "_milestones" in state else CHAINED
    own = state.keys() - COMMON
    for name, (fields, optional) in FIELDS.items():
        if fields <= own and own <= fields | optional and "last_epoch" in state:
            return name
    return UNKNOWN


def node_of(state: object, groups: Sequence[State], depth: int = 0, budget: list[int] | None = None) -> Node:
    """A state dict, checked. Raises UsageError where a field that is needed is missing or cannot be."""
    budget = [NODES] if budget is None else budget
    budget[0] -= 1
    if not isinstance(state, dict):
        raise damaged(f"a scheduler's state is {type(state).__name__}, not a dict")
    if depth > DEPTH or budget[0] < 0:
        raise damaged("schedulers are nested without end")
    kind = kind_of(state)
    children: tuple[Node, ...] = ()
    if kind in (SEQUENTIAL, CHAINED):
        inner = state["_schedulers"]
        if not isinstance(inner, (list, tuple)) or not inner:
            raise damaged(f"{kind} without schedulers")
        children = tuple(node_of(s, groups, depth + 1, budget) for s in inner)
    node = Node(kind, state, children)
    _check(node, groups, before=-max(1, depth))
    return node


def _check(node: Node, groups: Sequence[State], before: int) -> None:
    """`before`: the least last_epoch; each SequentialLR around takes back one more step of what waits."""
    s, kind = node.state, node.kind
    if kind == SEQUENTIAL:
        stones = s["_milestones"]
        if not isinstance(stones, list) or len(stones) != len(node.children) - 1:
            raise damaged("SequentialLR needs one milestone fewer than schedulers")
        for i, stone in enumerate(stones):
            whole({f"_milestones[{i}]": stone}, f"_milestones[{i}]", where=kind)
        if stones != sorted(stones):
            raise damaged("the milestones of SequentialLR do not grow", kind)
        if any(c.children for c in node.children[1:]):
            raise Unsupported(
                "schedule-unknown",
                "a SequentialLR that goes on to another composed scheduler",
                why="torch itself cannot step such a one past its milestone",
            )
    known = s.get("base_lrs")
    if isinstance(known, list) and 0 < len(known) < len(groups):
        raise Unsupported(
            "schedule-unknown",
            f"{kind} was made for {len(known)} of the {len(groups)} param_groups",
            where=kind,
            why="groups that were added to the optimizer later have rates that follow from nothing saved",
            hint="--counters-only leaves it alone and moves the counters; then set the scheduler up anew",
        )
    if "_step_count" in s:
        whole(s, "_step_count", where=kind)
    if "_last_lr" in s:
        reals(s, "_last_lr", len(groups), where=kind)
    if kind == CHAINED:
        return
    if kind == UNKNOWN:
        if "last_epoch" in s:
            whole(s, "last_epoch", least=before, where=kind)
        return
    whole(s, "last_epoch", least=before, where=kind)
    if kind in (SEQUENTIAL, PLATEAU, LAMBDA):
        return
    reals(s, "base_lrs", len(groups), where=kind)
    match kind:
        case "StepLR":
            whole(s, "step_size", least=1, where=kind)
        case "MultiStepLR":
            stones = s["milestones"]
            if not isinstance(stones, dict):
                raise damaged("milestones are not a count of integers", kind)
            for stone, times in stones.items():
                whole({"a milestone": stone}, "a milestone", where=kind)
                whole({"a milestone's count": times}, "a milestone's count", most=1000, where=kind)
        case "ConstantLR" | "LinearLR":
            real(s, "total_iters", least=0, where=kind)
        case "PolynomialLR":
            real(s, "total_iters", least=1e-9, where=kind)
            real(s, "power", where=kind)
        case "CosineAnnealingLR":
            real(s, "T_max", least=1e-9, where=kind)
            real(s, "eta_min", where=kind)
        case "CosineAnnealingWarmRestarts":
            for key in ("T_0", "T_mult"):
                whole(s, key, least=1, where=kind)
            real(s, "T_i", least=1, where=kind)
            real(s, "T_cur", least=-1, where=kind)
            real(s, "eta_min", where=kind)
        case "OneCycleLR":
            _check_one_cycle(s, groups)
        case "CyclicLR":
            real(s, "total_size", least=1e-9, where=kind)
            real(s, "step_ratio", least=0, where=kind)
            reals(s, "max_lrs", len(groups), where=kind)
            if s["cycle_momentum"]:
                reals(s, "base_momentums", len(groups), where=kind)
                reals(s, "max_momentums", len(groups), where=kind)
    for key in ("gamma", "factor", "start_factor", "end_factor"):
        if key in s:
            real(s, key, where=kind)


def _check_one_cycle(s: State, groups: Sequence[State]) -> None:
    kind = "OneCycleLR"
    whole(s, "total_steps", least=1, where=kind)
    phases = s["_schedule_phases"]
    if not isinstance(phases, list) or len(phases) not in (2, 3):
        raise damaged("_schedule_phases are not two or three phases", kind)
    names = {"initial_lr", "max_lr", "min_lr"}
    for phase in phases:
        if not isinstance(phase, dict) or not all(
            isinstance(name, str) and name in names for name in (phase.get("start_lr"), phase.get("end_lr"))
        ):
            raise damaged("a phase does not name its learning rates", kind)
        real(phase, "end_step", where=kind)
    for group in groups:
        for key in names:
            real(group, key, where=f"{kind}'s param_groups")
        if s["cycle_momentum"]:
            for key in ("base_momentum", "max_momentum"):
                real(group, key, where=f"{kind}'s param_groups")
