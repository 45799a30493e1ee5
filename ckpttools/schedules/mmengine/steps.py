"""MMEngine's parameter schedulers set in motion without MMEngine: the same operations in the same order.

A saved scheduler is its whole __dict__ but the optimizer; the class name is not stored:

    param_name    "lr" or "momentum" ("momentum" also stands for betas[0], where use_betas is true)
    begin, end    it acts while begin <= _global_step < end; end = 10**9 means never
    by_epoch      stepped once per epoch, else once per iteration (micro-batch)
    base_values   one for each param_group, and one more for base_param_settings where there are several
    last_step     steps inside [begin, end), -1 before; _global_step: all steps; _last_value: as it left them

Several schedulers act on the same value one after the other: theirs is a product only where no eta_min is.

Source: mmengine 0.10.7, mmengine/optim/scheduler/{param_scheduler,momentum_scheduler}.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckpttools.errors import UsageError
from ckpttools.schedules.program import State, damaged, real, reals, whole
from ckpttools.schedules.torch.rates import anneal

NEVER = 10**9
COMMON = frozenset(
    (
        "param_name",
        "begin",
        "end",
        "by_epoch",
        "base_values",
        "last_step",
        "_global_step",
        "_last_value",
        "verbose",
        "use_betas",
    )
)
PLATEAU, UNKNOWN = "ReduceOnPlateau", "unknown"
FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    name: (frozenset(fields.split()), frozenset(optional.split()))
    for name, fields, optional in (
        ("Step", "step_size gamma", ""),
        ("MultiStep", "milestones gamma", ""),
        ("Constant", "factor total_iters", ""),
        ("Exponential", "gamma", ""),
        ("CosineAnnealing", "T_max eta_min", "eta_min_ratio"),
        ("Linear", "start_factor end_factor total_iters", ""),
        ("Poly", "eta_min power total_iters", ""),
        ("OneCycle", "total_steps _schedule_phases eta_max div_factor final_div_factor", "anneal_func"),
        ("CosineRestart", "periods cumulative_periods restart_weights eta_min", "eta_min_ratio"),
        (
            PLATEAU,
            "monitor patience factor",
            "cooldown cooldown_counter rule_worse best num_bad_epochs eps rule threshold "
            "threshold_rule min_values",
        ),
    )
}


def kind_of(state: Mapping[str, Any]) -> str:
    """The class that a state is of, by its fields."""
    own = state.keys() - COMMON
    for name, (fields, optional) in FIELDS.items():
        if fields <= own and own <= fields | optional:
            return name
    return UNKNOWN


def check(state: State, groups: Sequence[State]) -> str:
    """The kind of a state whose values can be. Raises UsageError otherwise."""
    kind = kind_of(state)
    name = state.get("param_name")
    if name not in ("lr", "momentum"):
        if kind != UNKNOWN and not isinstance(name, str):
            raise damaged(f"param_name is {name!r}", kind)
        kind = UNKNOWN
    if type(state.get("by_epoch", True)) is not bool:
        raise damaged(f"by_epoch is {state['by_epoch']!r}", kind)
    if missing := [
        key for key in ("by_epoch", "_global_step", "last_step", "begin", "end") if key not in state
    ]:
        raise UsageError(
            "schedule-unknown",
            f"a saved scheduler does not say {', '.join(missing)}",
            why="MMEngine's own always do; a resume takes what is missing from the new configuration",
            hint="build the scheduler anew",
        )
    whole(state, "_global_step", where=kind)
    whole(state, "last_step", least=-1, where=kind)
    begin, end = whole(state, "begin", where=kind), real(state, "end", least=1, where=kind)
    if end <= begin:
        raise damaged(f"it begins at {begin} and ends at {end}", kind)
    if kind in (UNKNOWN, PLATEAU):
        return kind
    reals(state, "base_values", len(groups), where=kind)
    for key in ("gamma", "factor", "start_factor", "end_factor", "power"):
        if key in state:
            real(state, key, where=kind)
    for key in ("eta_min", "eta_min_ratio"):
        if state.get(key) is not None:
            real(state, key, where=kind)
    match kind:
        case "Step":
            real(state, "step_size", least=1, where=kind)
        case "MultiStep":
            stones = state["milestones"]
            if not isinstance(stones, dict):
                raise damaged("milestones are not a count", kind)
            for stone, times in stones.items():
                real({"a milestone": stone}, "a milestone", least=0, where=kind)
                whole({"a milestone's count": times}, "a milestone's count", most=1000, where=kind)
        case "Constant" | "Linear" | "Poly":
            whole(state, "total_iters", where=kind)
        case "CosineAnnealing":
            real(state, "T_max", least=1e-9, where=kind)
        case "OneCycle":
            _check_one_cycle(state, groups)
        case "CosineRestart":
            if not isinstance(state["periods"], (list, tuple)):
                raise damaged("periods are not a list", kind)
            periods = reals(state, "periods", len(state["periods"]), where=kind)
            reals(state, "cumulative_periods", len(periods), where=kind)
            reals(state, "restart_weights", len(periods), where=kind)
            if not periods or min(periods) <= 0:
                raise damaged("a period is not positive", kind)
    return kind


def _check_one_cycle(state: State, groups: Sequence[State]) -> None:
    whole(state, "total_steps", least=1, where="OneCycle")
    phases, names = state["_schedule_phases"], {"initial_lr", "max_lr", "min_lr"}
    if not isinstance(phases, list) or len(phases) not in (2, 3):
        raise damaged("_schedule_phases are not two or three phases", "OneCycle")
    for phase in phases:
        if not isinstance(phase, dict) or {phase.get("start_lr"), phase.get("end_lr")} - names:
            raise damaged("a phase does not name its learning rates", "OneCycle")
        real(phase, "end_step", where="OneCycle")
    for group in groups:
        for key in sorted(names):
            real(group, key, where="OneCycle's param_groups")


def restart(state: State, kind: str, groups: list[State], anneal_kind: str) -> None:
    """What the constructor does."""
    state["last_step"] = state["_global_step"] = -1
    if kind == PLATEAU:
        state["_global_step"] = 0
        return
    step(state, kind, groups, anneal_kind)


def step(state: State, kind: str, groups: list[State], anneal_kind: str = "cos") -> None:
    """What step() does."""
    state["_global_step"] += 1
    name = state["param_name"]
    if kind in (PLATEAU, UNKNOWN):
        for group in groups:
            group[name] = math.nan
        return
    if state["begin"] <= state["_global_step"] < state["end"]:
        state["last_step"] += 1
        if kind == "OneCycle":
            values = _one_cycle(state, groups, anneal_kind)
        else:
            values = RULES[kind](state, groups, name)
        for group, value in zip(groups, values, strict=True):
            group[name] = value
    if "_last_value" in state:
        state["_last_value"] = [group[name] for group in groups]
    if state.get("use_betas"):
        for group in groups:
            betas = group["betas"]
            group["betas"] = type(betas)((group["momentum"], betas[1]))


# --- the next value, from state and groups -----------------------------------------------------------


def _same(groups: list[State], name: str) -> list[float]:
    return [g[name] for g in groups]


def _step(s: State, groups: list[State], name: str) -> list[float]:
    if s["last_step"] == 0 or s["last_step"] % s["step_size"] != 0:
        return _same(groups, name)
    return [g[name] * s["gamma"] for g in groups]


def _multi_step(s: State, groups: list[State], name: str) -> list[float]:
    if s["last_step"] not in s["milestones"]:
        return _same(groups, name)
    return [g[name] * s["gamma"] ** s["milestones"][s["last_step"]] for g in groups]


def _constant(s: State, groups: list[State], name: str) -> list[float]:
    if s["last_step"] == 0:
        return [g[name] * s["factor"] for g in groups]
    if s["last_step"] != s["total_iters"]:
        return _same(groups, name)
    return [g[name] * (1.0 / s["factor"]) for g in groups]


def _exponential(s: State, groups: list[State], name: str) -> list[float]:
    return _same(groups, name) if s["last_step"] == 0 else [g[name] * s["gamma"] for g in groups]


def _low(s: State, base: float) -> float:
    ratio = s.get("eta_min_ratio")
    low: float = s["eta_min"] if ratio is None else base * ratio
    return low


def _cosine(s: State, groups: list[State], name: str) -> list[float]:
    t, period = s["last_step"], s["T_max"]
    pairs = list(zip(s["base_values"], groups, strict=True))
    if t == 0:
        return _same(groups, name)
    if (t - 1 - period) % (2 * period) == 0:
        return [g[name] + (base - _low(s, base)) * (1 - math.cos(math.pi / period)) / 2 for base, g in pairs]
    ratio = (1 + math.cos(math.pi * t / period)) / (1 + math.cos(math.pi * (t - 1) / period))
    return [ratio * (g[name] - _low(s, base)) + _low(s, base) for base, g in pairs]


def _linear(s: State, groups: list[State], name: str) -> list[float]:
    t, start = s["last_step"], s["start_factor"]
    if t == 0:
        return [g[name] * start for g in groups]
    rise = s["end_factor"] - start
    return [g[name] * (1.0 + rise / (s["total_iters"] * start + (t - 1) * rise)) for g in groups]


def _poly(s: State, groups: list[State], name: str) -> list[float]:
    t, low = s["last_step"], s["eta_min"]
    if t == 0:
        return _same(groups, name)
    factor = (1 - 1 / (s["total_iters"] - t + 1)) ** s["power"]
    return [(g[name] - low) * factor + low for g in groups]


def _one_cycle(s: State, groups: list[State], kind: str) -> list[float]:
    t, phases = s["last_step"], s["_schedule_phases"]
    if t > s["total_steps"]:
        return [math.nan for _ in groups]  # MMEngine raises here
    begin = 0
    for phase in phases:
        if t <= phase["end_step"] or phase is phases[-1]:
            break
        begin = phase["end_step"]
    part, between = (t - begin) / (phase["end_step"] - begin), anneal(kind)
    return [between(g[phase["start_lr"]], g[phase["end_lr"]], part) for g in groups]


def _cosine_restart(s: State, groups: list[State], name: str) -> list[float]:
    t = s["last_step"]
    index = next((i for i, end in enumerate(s["cumulative_periods"]) if t < end), None)
    if index is None:
        return _same(groups, name)
    at = t - (s["cumulative_periods"][index - 1] if index else 0)
    period, weight = s["periods"][index], s["restart_weights"][index]
    if at == 0:
        return [base * weight for base in s["base_values"]]
    ratio = (1 + math.cos(math.pi * at / period)) / (1 + math.cos(math.pi * (at - 1) / period))
    pairs = zip(s["base_values"], groups, strict=True)
    return [ratio * (g[name] - _low(s, base)) + _low(s, base) for base, g in pairs]


RULES: dict[str, Callable[[State, list[State], str], list[float]]] = {
    "Step": _step,
    "MultiStep": _multi_step,
    "Constant": _constant,
    "Exponential": _exponential,
    "CosineAnnealing": _cosine,
    "Linear": _linear,
    "Poly": _poly,
    "CosineRestart": _cosine_restart,
}
