"""The learning rates of DeepSpeed's own schedulers as functions of last_batch_iteration.

The counter k is -1 at construction, when the first update's learning rate is set; it grows by one after
every update that was not skipped. All constants come from ds_config's "scheduler"."params".

Source: DeepSpeed 0.19.8, deepspeed/runtime/lr_schedules.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from ckpttools.schedules.program import State, damaged, real, whole

# name -> the parameters that count steps, with the constructor's defaults; None: not set
LENGTHS: dict[str, dict[str, int | None]] = {
    "WarmupLR": {"warmup_num_steps": 1000},
    "WarmupDecayLR": {"total_num_steps": None, "warmup_num_steps": 1000},
    "WarmupCosineLR": {"total_num_steps": None, "warmup_num_steps": 1000},
    "OneCycle": {"cycle_first_step_size": 2000, "cycle_second_step_size": None, "decay_step_size": 0},
    "LRRangeTest": {"lr_range_test_step_size": 2000},
}
# the parameters that are absolute learning rates
RATES: dict[str, dict[str, float | None]] = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": None},
    "WarmupDecayLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001},
    "WarmupCosineLR": {},
    "OneCycle": {"cycle_min_lr": None, "cycle_max_lr": None},
    "LRRangeTest": {"lr_range_test_min_lr": 0.001},
}
SECOND_BETA = 0.99  # OneCycle writes it beside the cycled one


class Values(Struct, frozen=True, kw_only=True):
    """What a scheduler writes into the groups; `betas` only where it cycles them."""

    lrs: Sequence[float]
    betas: Sequence[tuple[float, float]] | None = None


Rule = Callable[[int], Values]


def each(params: Mapping[str, Any], key: str, default: object, groups: int) -> list[float]:
    """A number, or a list with one for each group."""
    value = params.get(key, default)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * groups
    if len(values) != groups:
        raise damaged(f"{key} has {len(values)} values for {groups} param_groups", "ds_config")
    for one in values:
        real({key: one}, key, where="ds_config")
    return values


def warmed(params: Mapping[str, Any]) -> int:
    """The steps of the warmup as DeepSpeed takes them: at least two."""
    return max(2, whole({"warmup_num_steps": 1000, **params}, "warmup_num_steps", least=1, where="ds_config"))


def share(params: Mapping[str, Any], k: int, warmup: int) -> float:
    """The part of the way from the least to the greatest learning rate, in the warmup."""
    if params.get("warmup_type", "log") == "linear":
        return k / warmup
    return 1.0 / math.log(warmup) * math.log(k + 1)


def gamma(name: str, params: Mapping[str, Any]) -> Callable[[int], float]:
    """WarmupLR and WarmupDecayLR: the part of the way at counter k >= 0."""
    warmup = warmed(params)
    total = real(params, "total_num_steps", least=0, where="ds_config") if name == "WarmupDecayLR" else None

    def rule(k: int) -> float:
        if k < warmup:
            return share(params, k, warmup)
        if total is None:
            return 1.0
        return max(0.0, float(total - k) / float(max(1.0, total - warmup)))

    return rule


def cosine_ratio(params: Mapping[str, Any]) -> Callable[[int], float]:
    """WarmupCosineLR: what the optimizer's own learning rate is multiplied by."""
    warmup = warmed(params)
    total = real(params, "total_num_steps", least=0, where="ds_config")
    least = real({"warmup_min_ratio": 0.0, **params}, "warmup_min_ratio", where="ds_config")
    low = real({"cos_min_ratio": 0.0001, **params}, "cos_min_ratio", where="ds_config")

    def rule(k: int) -> float:
        if k < 0:
            return 0.0
        if k < warmup:
            return least + share(params, k, warmup) * (1.0 - least)
        progress = min(1.0, (k - warmup + 1) / max(1, total - warmup))
        return max(0.0, low + (1.0 - low) * ((1 + math.cos(math.pi * progress)) / 2))

    return rule


def rule_of(name: str, params: Mapping[str, Any], groups: Sequence[State], bases: Sequence[float]) -> Rule:
    """k -> what is written. `bases` are the optimizer's own learning rates, where the formula uses them."""
    n = len(groups)
    match name:
        case "WarmupLR" | "WarmupDecayLR":
            lows = each(params, "warmup_min_lr", 0.0, n)
            given = params.get("warmup_max_lr", RATES[name]["warmup_max_lr"])
            tops = list(bases) if given is None else each(params, "warmup_max_lr", given, n)
            part = gamma(name, params)
            spans = [top - low for top, low in zip(tops, lows, strict=True)]

            def warmup(k: int) -> Values:
                if k < 0:
                    return Values(lrs=lows)
                reached = part(k)
                return Values(lrs=[low + span * reached for low, span in zip(lows, spans, strict=True)])

            return warmup
        case "WarmupCosineLR":
            ratio = cosine_ratio(params)
            return lambda k: Values(lrs=[base * ratio(k) if k >= 0 else 0.0 for base in bases])
        case "LRRangeTest":
            size = whole({"lr_range_test_step_size": 2000, **params}, "lr_range_test_step_size", least=1)
            rate = real({"lr_range_test_step_rate": 1.0, **params}, "lr_range_test_step_rate")
            stairs = bool(params.get("lr_range_test_staircase", False))
            mins = each(params, "lr_range_test_min_lr", 0.001, n)

            def grown(k: int) -> Values:
                if k < 0:
                    return Values(lrs=mins)
                interval = float(k + 1) / size
                rise = 1 + rate * (math.floor(interval) if stairs else interval)
                return Values(lrs=[low * rise for low in mins])

            return grown
    return _one_cycle(params, groups)


def _one_cycle(params: Mapping[str, Any], groups: Sequence[State]) -> Rule:
    n = len(groups)
    p = {
        "cycle_first_step_size": 2000,
        "decay_step_size": 0,
        "decay_lr_rate": 0.0,
        "decay_mom_rate": 0.0,
        **params,
    }
    first = float(real(p, "cycle_first_step_size", least=1e-9))
    second = (
        first
        if p.get("cycle_second_step_size") is None
        else float(real(p, "cycle_second_step_size", least=0))
    )
    total, ratio = first + second, first / (first + second)
    stairs = whole({"n": p.get("cycle_first_stair_count", 0)}, "n")
    more = p.get("cycle_second_stair_count")
    second_stairs = stairs if more is None else whole({"n": more}, "n")
    decay, lr_rate, mom_rate = (real(p, k) for k in ("decay_step_size", "decay_lr_rate", "decay_mom_rate"))
    still = math.isclose(decay, 0)
    lows, tops = each(p, "cycle_min_lr", None, n), each(p, "cycle_max_lr", None, n)
    cycled = bool(p.get("cycle_momentum", True)) and all("betas" in g for g in groups)
    soft, hard = (each(p, "cycle_min_mom", 0.8, n), each(p, "cycle_max_mom", 0.9, n)) if cycled else ([], [])

    def scale(k: int) -> float:
        t = k + 1
        x = 1.0 + t / total - math.floor(1 + t / total)
        rising = x <= ratio
        found = x / ratio if rising else (x - 1) / (ratio - 1)
        count = stairs if rising else second_stairs
        if count > 0:
            at = t % total
            position = at * count / first if at <= first else (total - at) * count / second
            found = math.floor(position) / count
        return found

    def rule(k: int) -> Values:
        if k < 0:
            return Values(lrs=lows, betas=[(m, SECOND_BETA) for m in soft] if cycled else None)
        if k < total:
            part = scale(k)
            lrs = [low + (top - low) * part for low, top in zip(lows, tops, strict=True)]
            moms = [top - (top - low) * part for low, top in zip(soft, hard, strict=True)]
        else:
            past = k - total + 1
            slower = 1 if still or math.isclose(lr_rate, 0) else 1 + lr_rate * (past / decay)
            lrs = lows if still or math.isclose(lr_rate, 0) else [low / slower for low in lows]
            grow = 1 if still or math.isclose(mom_rate, 0) else 1 + mom_rate * (past / decay)
            moms = hard if grow == 1 else [m * grow for m in hard]
        return Values(lrs=lrs, betas=[(m, SECOND_BETA) for m in moms] if cycled else None)

    return rule
