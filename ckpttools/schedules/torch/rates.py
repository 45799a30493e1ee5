"""The learning rate that each of torch's schedulers sets at its counter, on plain states and param_groups.

`OPEN` holds get_lr() of each class, which for many goes on from the learning rate of the group; `CLOSED`
holds _get_closed_form_lr(). Both use the operations of the library in their order, so the bits are its own.
A learning rate that cannot be known (a function that is not saved) is NaN.

Source: torch 2.13, torch/optim/lr_scheduler.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ckpttools.schedules.program import State
from ckpttools.schedules.torch.states import LAMBDA, PLATEAU, UNKNOWN

NAN = math.nan


def set_momentum(group: State, s: State, value: float) -> None:
    if s.get("use_beta1", "betas" in group):
        betas = group["betas"]
        group["betas"] = type(betas)((value, *betas[1:]))
    else:
        group["momentum"] = value


# --- the learning rate of the next unit, from state and groups ---------------------------------------


def _unknown(s: State, groups: list[State], initial: bool) -> list[float]:
    return [NAN for _ in groups]


def _same(groups: list[State]) -> list[float]:
    return [g["lr"] for g in groups]


def _step_lr(s: State, groups: list[State], initial: bool) -> list[float]:
    if s["last_epoch"] == 0 or s["last_epoch"] % s["step_size"] != 0:
        return _same(groups)
    return [g["lr"] * s["gamma"] for g in groups]


def _multi_step(s: State, groups: list[State], initial: bool) -> list[float]:
    if s["last_epoch"] not in s["milestones"]:
        return _same(groups)
    return [g["lr"] * s["gamma"] ** s["milestones"][s["last_epoch"]] for g in groups]


def _constant(s: State, groups: list[State], initial: bool) -> list[float]:
    if s["last_epoch"] == 0:
        return [g["lr"] * s["factor"] for g in groups]
    if s["last_epoch"] != s["total_iters"]:
        return _same(groups)
    return [g["lr"] * (1.0 / s["factor"]) for g in groups]


def _linear(s: State, groups: list[State], initial: bool) -> list[float]:
    t, start = s["last_epoch"], s["start_factor"]
    if t == 0:
        return [g["lr"] * start for g in groups]
    if initial or t > s["total_iters"]:
        return _same(groups)
    rise = s["end_factor"] - start
    return [g["lr"] * (1.0 + rise / (s["total_iters"] * start + (t - 1) * rise)) for g in groups]


def _exponential(s: State, groups: list[State], initial: bool) -> list[float]:
    return _same(groups) if initial else [g["lr"] * s["gamma"] for g in groups]


def _polynomial(s: State, groups: list[State], initial: bool) -> list[float]:
    t, total = s["last_epoch"], s["total_iters"]
    if initial or t > total:
        return _same(groups)
    factor = ((1.0 - t / total) / (1.0 - (t - 1) / total)) ** s["power"]
    return [g["lr"] * factor for g in groups]


def _cosine(s: State, groups: list[State], initial: bool) -> list[float]:
    if initial:
        return _same(groups)
    t, period, low = s["last_epoch"], s["T_max"], s["eta_min"]
    if s.get("_step_count") == 1 and t > 0:
        return [low + (base - low) * (1 + math.cos(t * math.pi / period)) / 2 for base in s["base_lrs"]]
    if (t - 1 - period) % (2 * period) == 0:
        return [
            g["lr"] + (base - low) * (1 - math.cos(math.pi / period)) / 2
            for base, g in zip(s["base_lrs"], groups, strict=True)
        ]
    ratio = (1 + math.cos(math.pi * t / period)) / (1 + math.cos(math.pi * (t - 1) / period))
    return [ratio * (g["lr"] - low) + low for g in groups]


def _warm_restarts(s: State, groups: list[State], initial: bool) -> list[float]:
    low = s["eta_min"]
    return [
        low + (base - low) * (1 + math.cos(math.pi * s["T_cur"] / s["T_i"])) / 2 for base in s["base_lrs"]
    ]


def _cyclic(s: State, groups: list[State], initial: bool) -> list[float]:
    t = s["last_epoch"]
    cycle = math.floor(1 + t / s["total_size"])
    x = 1.0 + t / s["total_size"] - cycle
    if x <= s["step_ratio"]:
        scale = x / s["step_ratio"]
    else:
        scale = (x - 1) / (s["step_ratio"] - 1)
    by = cycle if s["scale_mode"] == "cycle" else t
    match s["mode"]:
        case "triangular":
            height = 1.0
        case "triangular2":
            height = 1 / 2.0 ** (by - 1)
        case _:
            height = float(s["gamma"]) ** by
    # the constructor's own step comes before the base_lrs are in place
    bases = [g["initial_lr"] for g in groups] if initial else s["base_lrs"]
    if s["cycle_momentum"]:
        for group, low, high in zip(groups, s["base_momentums"], s["max_momentums"], strict=True):
            set_momentum(group, s, high - (high - low) * scale * height)
    if s.get("_scale_fn_custom") is not None or s["mode"] not in ("triangular", "triangular2", "exp_range"):
        return _unknown(s, groups, initial)
    return [base + (top - base) * scale * height for base, top in zip(bases, s["max_lrs"], strict=True)]


def anneal(kind: str) -> Callable[[float, float, float], float]:
    """OneCycle's two ways between two values."""
    if kind == "cos":
        return lambda start, end, part: end + (start - end) / 2.0 * (math.cos(math.pi * part) + 1)
    return lambda start, end, part: (end - start) * part + start


def annealing(state: State) -> str | None:
    """OneCycle's strategy by the name of the function that is saved instead; None where it shows none."""
    name = str(state.get("anneal_func", ""))[:1000]
    return next((kind for kind in ("cos", "linear") if f"annealing_{kind}" in name), None)


# both strategies fit: at the very start, the peak or the end they meet
EITHER = (
    "the checkpoint does not name OneCycle's annealing, and at this place cosine and linear give the same "
    "rate: cosine is assumed"
)


def _one_cycle(s: State, groups: list[State], initial: bool) -> list[float]:
    t, phases = s["last_epoch"], s["_schedule_phases"]
    if t > s["total_steps"]:
        # torch raises here: the run is over
        return _unknown(s, groups, initial)
    between = anneal(s.get("_anneal_func_type", "cos"))
    begin = 0.0
    for phase in phases:
        if t <= phase["end_step"] or phase is phases[-1]:
            break
        begin = phase["end_step"]
    part = (t - begin) / (phase["end_step"] - begin)
    out = []
    for group in groups:
        out.append(between(group[phase["start_lr"]], group[phase["end_lr"]], part))
        if s["cycle_momentum"]:
            start, end = group[phase["start_momentum"]], group[phase["end_momentum"]]
            set_momentum(group, s, between(start, end, part))
    return out


Rule = Callable[[State, list[State], bool], list[float]]
OPEN: dict[str, Rule] = {
    "StepLR": _step_lr,
    "MultiStepLR": _multi_step,
    "ConstantLR": _constant,
    "LinearLR": _linear,
    "ExponentialLR": _exponential,
    "PolynomialLR": _polynomial,
    "CosineAnnealingLR": _cosine,
    "CosineAnnealingWarmRestarts": _warm_restarts,
    "OneCycleLR": _one_cycle,
    "CyclicLR": _cyclic,
    LAMBDA: _unknown,
    PLATEAU: _unknown,
    UNKNOWN: _unknown,
}


# --- closed forms: what SequentialLR uses at a milestone, and what answers where replay would take too long


def _closed(factor: Callable[[State], float]) -> Rule:
    return lambda s, groups, initial: [base * factor(s) for base in s["base_lrs"]]


def _closed_multi_step(s: State) -> float:
    passed = sum(times for stone, times in s["milestones"].items() if stone <= s["last_epoch"])
    power: float = float(s["gamma"]) ** passed
    return power


def _closed_cosine(s: State, groups: list[State], initial: bool) -> list[float]:
    low, part = s["eta_min"], math.pi * s["last_epoch"] / s["T_max"]
    return [low + (base - low) * (1 + math.cos(part)) / 2 for base in s["base_lrs"]]


CLOSED: dict[str, Rule] = {
    "StepLR": _closed(lambda s: float(s["gamma"]) ** (s["last_epoch"] // s["step_size"])),
    "MultiStepLR": _closed(_closed_multi_step),
    "ConstantLR": _closed(lambda s: s["factor"] + (s["last_epoch"] >= s["total_iters"]) * (1 - s["factor"])),
    "LinearLR": _closed(
        lambda s: (
            s["start_factor"]
            + (s["end_factor"] - s["start_factor"])
            * min(s["total_iters"], s["last_epoch"])
            / s["total_iters"]
        )
    ),
    "ExponentialLR": _closed(lambda s: float(s["gamma"]) ** s["last_epoch"]),
    "PolynomialLR": _closed(
        lambda s: (1.0 - min(s["total_iters"], s["last_epoch"]) / s["total_iters"]) ** s["power"]
    ),
    "CosineAnnealingLR": _closed_cosine,
}
