"""transformers' schedules as functions of the step: what each multiplies the base learning rate by.

The Trainer saves a LambdaLR without its function. The constants come from the training arguments of the run
that loads it: warmup_steps, max_steps and lr_scheduler_kwargs.

Source: transformers 5.23, transformers/optimization.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ckpttools.schedules.program import damaged, real, whole

ARGS = "the training arguments"
Factor = Callable[[int], float]

NAMES = {
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
}
NO_TIMESCALE = 10_000  # inverse_sqrt without a warmup


def timescale_of(warmup: int, kwargs: Mapping[str, Any]) -> int | float:
    """inverse_sqrt's unit of time."""
    given = kwargs.get("timescale")
    return (warmup or NO_TIMESCALE) if given is None else real(kwargs, "timescale", least=1e-9, where=ARGS)


def factor_of(name: str, warmup: int, total: int, kwargs: Mapping[str, Any], lr: float) -> Factor:
    """step -> factor. `lr` is the optimizer's default learning rate; unknown names raise UsageError."""
    rise = _rise(warmup)
    match name:
        case "constant":
            return lambda t: 1
        case "constant_with_warmup":
            return lambda t: float(t) / float(max(1.0, warmup)) if t < warmup else 1.0
        case "linear":
            span = float(max(1, total - warmup))
            return lambda t: rise(t) if t < warmup else max(0.0, float(total - t) / span)
        case "cosine" | "cosine_with_min_lr":
            cycles = float(real({"num_cycles": 0.5, **kwargs}, "num_cycles", where=ARGS))
            low = least_rate(kwargs, lr) if name == "cosine_with_min_lr" else 0.0
            return lambda t: rise(t) if t < warmup else _cosine(t, warmup, total, cycles, low)
        case "cosine_with_restarts":
            cycles = float(real({"num_cycles": 1, **kwargs}, "num_cycles", where=ARGS))
            return lambda t: rise(t) if t < warmup else _restarts(t, warmup, total, cycles)
        case "polynomial":
            end = real({"lr_end": 1e-7, **kwargs}, "lr_end", where=ARGS)
            power = real({"power": 1.0, **kwargs}, "power", where=ARGS)
            return lambda t: rise(t) if t < warmup else _polynomial(t, warmup, total, end, power, lr)
        case "inverse_sqrt":
            scale = timescale_of(warmup, kwargs)
            shift = scale - warmup
            return lambda t: rise(t) if t < warmup else 1.0 / math.sqrt((t + shift) / scale)
        case "cosine_warmup_with_min_lr":
            return _late_cosine(warmup, total, kwargs, lr)
        case "warmup_stable_decay":
            return _stable_decay(warmup, total, kwargs)
    raise damaged(f"lr_scheduler_type {name!r} is not known", ARGS)


def least_rate(kwargs: Mapping[str, Any], lr: float) -> float:
    """min_lr_rate, or min_lr as a part of the learning rate."""
    if kwargs.get("min_lr") is not None:
        return float(real(kwargs, "min_lr", where=ARGS) / lr)
    return real({"min_lr_rate": 0.0, **kwargs}, "min_lr_rate", where=ARGS)


def stable_steps(warmup: int, total: int, kwargs: Mapping[str, Any]) -> int:
    """The steps of warmup_stable_decay's plateau: given, or what the total leaves."""
    if kwargs.get("num_stable_steps") is not None:
        return whole(kwargs, "num_stable_steps", where=ARGS)
    return total - warmup - whole(kwargs, "num_decay_steps", where=ARGS)


def _rise(warmup: int) -> Factor:
    return lambda t: float(t) / float(max(1, warmup))


def _cosine(t: int, warmup: int, total: int, cycles: float, low: float) -> float:
    progress = float(t - warmup) / float(max(1, total - warmup))
    factor = 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress))
    return max(0, factor * (1 - low) + low)


def _restarts(t: int, warmup: int, total: int, cycles: float) -> float:
    progress = float(t - warmup) / float(max(1, total - warmup))
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0))))


def _polynomial(t: int, warmup: int, total: int, end: float, power: float, lr: float) -> float:
    if t > total:
        return end / lr
    left = 1 - (t - warmup) / (total - warmup)
    part: float = left**power
    return ((lr - end) * part + end) / lr


def _late_cosine(warmup: int, total: int, kwargs: Mapping[str, Any], lr: float) -> Factor:
    cycles = real({"num_cycles": 0.5, **kwargs}, "num_cycles", where=ARGS)
    low, start = least_rate(kwargs, lr), kwargs.get("warmup_lr_rate")
    first = None if start is None else float(real(kwargs, "warmup_lr_rate", where=ARGS))

    def factor(step: int) -> float:
        t, rise, end = float(step), float(warmup), float(total)
        if t < rise:
            if first is None:
                return (t + 1.0) / max(1.0, rise)
            return first + (1.0 - first) * t / max(1, rise - 1)
        progress = (t - rise + 1.0) / max(1.0, end - rise)
        fall = 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress))
        return max(0, fall * (1 - low) + low)

    return factor


SHAPES: dict[str, Factor | Callable[[float], float]] = {
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 * (1.0 - math.cos(math.pi * p)),
    "1-sqrt": lambda p: 1.0 - math.sqrt(1.0 - p),
}


def _stable_decay(warmup: int, total: int, kwargs: Mapping[str, Any]) -> Factor:
    stable, decay = stable_steps(warmup, total, kwargs), whole(kwargs, "num_decay_steps", where=ARGS)
    low = real({"min_lr_ratio": 0, **kwargs}, "min_lr_ratio", where=ARGS)
    cycles = float(real({"num_cycles": 0.5, **kwargs}, "num_cycles", where=ARGS))
    up, down = kwargs.get("warmup_type", "linear"), kwargs.get("decay_type", "cosine")
    if up not in SHAPES or down not in SHAPES:
        raise damaged(f"warmup_type {up!r} or decay_type {down!r} is not known", ARGS)
    falls: dict[str, Callable[[float], float]] = {
        "linear": lambda p: 1.0 - p,
        "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * p)),
        "1-sqrt": lambda p: 1.0 - math.sqrt(p),
    }

    def factor(t: int) -> float:
        if t < warmup:
            found = SHAPES[up](float(t) / float(max(1, warmup)))  # type: ignore[arg-type]
        elif t < warmup + stable:
            return 1.0
        elif t < warmup + stable + decay:
            found = falls[down](float(t - warmup - stable) / float(max(1, decay)))
        else:
            return low
        return max(0.0, found * (1.0 - low) + low)

    return factor
