"""Every scheduler of torch, as a user writes it in epochs, and built again from the constants of a state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import lr_scheduler as lrs

State = dict[str, Any]
Unit = Callable[[float], int]  # epochs -> units, rounded as a user would
Build = Callable[[torch.optim.Optimizer, Unit, int], Any]

warnings.filterwarnings("ignore", module="torch.optim.lr_scheduler")


def optimizer(groups: int = 1, kind: str = "sgd") -> torch.optim.Optimizer:
    """An optimizer whose groups have different learning rates."""
    params = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1 * (1 + 0.37 * i)} for i in range(groups)
    ]
    if kind == "sgd":
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(params, lr=0.1)


def plain_groups(opt: torch.optim.Optimizer) -> list[State]:
    return [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]


def plain_state(scheduler: Any) -> State:
    """The state as a reader hands it over: a Counter is a dict."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return value

    found: State = plain(copy.deepcopy(scheduler.state_dict()))
    return found


EPOCHS = 6


def _warm_cosine(o: Any, u: Unit, n: int) -> Any:
    warm = u(1)
    return lrs.SequentialLR(
        o,
        [lrs.LinearLR(o, 0.1, 1.0, warm), lrs.CosineAnnealingLR(o, u(EPOCHS) - warm, eta_min=1e-3)],
        [warm],
    )


def _three(o: Any, u: Unit, n: int) -> Any:
    a, b = u(1), u(3)
    parts = [lrs.ConstantLR(o, 0.25, a), lrs.StepLR(o, u(1), 0.7), lrs.PolynomialLR(o, u(EPOCHS) - b, 2.0)]
    return lrs.SequentialLR(o, parts, [a, b])


def _nested(o: Any, u: Unit, n: int) -> Any:
    inner = lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, u(1)), lrs.ConstantLR(o, 0.5, u(2))], [u(1)])
    return lrs.SequentialLR(o, [inner, lrs.CosineAnnealingLR(o, u(EPOCHS) - u(2))], [u(2)])


def _chained(o: Any, u: Unit, n: int) -> Any:
    return lrs.ChainedScheduler(
        [
            lrs.LinearLR(o, 0.2, 1.0, u(1)),
            lrs.MultiStepLR(o, [u(2), u(4)], 0.3),
            lrs.ExponentialLR(o, 0.99 ** (1 / n)),
        ]
    )


def _chained_in_sequential(o: Any, u: Unit, n: int) -> Any:
    inner = lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, u(1)), lrs.ExponentialLR(o, 0.9 ** (1 / n))])
    return lrs.SequentialLR(o, [inner, lrs.CosineAnnealingLR(o, u(EPOCHS) - u(2))], [u(2)])


FAMILIES: dict[str, tuple[str, Build]] = {
    "StepLR": ("sgd", lambda o, u, n: lrs.StepLR(o, u(2), 0.3)),
    "MultiStepLR": ("sgd", lambda o, u, n: lrs.MultiStepLR(o, [u(1), u(3), u(5)], 0.2)),
    "MultiStepLR twice": ("sgd", lambda o, u, n: lrs.MultiStepLR(o, [u(2), u(2), u(4)], 0.2)),
    "ConstantLR": ("sgd", lambda o, u, n: lrs.ConstantLR(o, 0.3, u(2))),
    "LinearLR": ("sgd", lambda o, u, n: lrs.LinearLR(o, 0.1, 1.0, u(2))),
    "LinearLR down": ("sgd", lambda o, u, n: lrs.LinearLR(o, 1.0, 0.0, u(EPOCHS))),
    "ExponentialLR": ("sgd", lambda o, u, n: lrs.ExponentialLR(o, 0.8 ** (1 / n))),
    "PolynomialLR": ("sgd", lambda o, u, n: lrs.PolynomialLR(o, u(EPOCHS), 0.9)),
    "CosineAnnealingLR": ("sgd", lambda o, u, n: lrs.CosineAnnealingLR(o, u(EPOCHS), eta_min=1e-4)),
    "CosineAnnealingLR waves": ("sgd", lambda o, u, n: lrs.CosineAnnealingLR(o, u(2))),
    "CosineAnnealingWarmRestarts": ("sgd", lambda o, u, n: lrs.CosineAnnealingWarmRestarts(o, u(1), 2, 1e-3)),
    "CosineAnnealingWarmRestarts even": ("sgd", lambda o, u, n: lrs.CosineAnnealingWarmRestarts(o, u(2))),
    "CyclicLR": ("sgd", lambda o, u, n: lrs.CyclicLR(o, 0.01, 0.2, u(1), u(2))),
    "CyclicLR triangular2": ("adam", lambda o, u, n: lrs.CyclicLR(o, 0.01, 0.2, u(1), mode="triangular2")),
    "CyclicLR exp_range": (
        "sgd",
        lambda o, u, n: lrs.CyclicLR(
            o, 0.01, 0.2, u(1), mode="exp_range", gamma=0.9 ** (1 / n), cycle_momentum=False
        ),
    ),
    "OneCycleLR": ("sgd", lambda o, u, n: lrs.OneCycleLR(o, 0.5, total_steps=u(EPOCHS))),
    "OneCycleLR three phases": (
        "adam",
        lambda o, u, n: lrs.OneCycleLR(
            o, 0.5, total_steps=u(EPOCHS), pct_start=0.25, three_phase=True, anneal_strategy="linear"
        ),
    ),
    "SequentialLR warmup, cosine": ("sgd", _warm_cosine),
    "SequentialLR of three": ("sgd", _three),
    "SequentialLR in SequentialLR": ("sgd", _nested),
    "ChainedScheduler": ("sgd", _chained),
    "SequentialLR of a chain": ("sgd", _chained_in_sequential),
}


def rebuilt(o: torch.optim.Optimizer, kind: str, s: State, old: Any) -> Any:
    """A scheduler from scratch with the constants that the state `s` holds. `old` tells the classes."""
    match kind:
        case "StepLR":
            return lrs.StepLR(o, s["step_size"], s["gamma"])
        case "MultiStepLR":
            return lrs.MultiStepLR(
                o, [m for m, times in s["milestones"].items() for _ in range(times)], s["gamma"]
            )
        case "ConstantLR":
            return lrs.ConstantLR(o, s["factor"], s["total_iters"])
        case "LinearLR":
            return lrs.LinearLR(o, s["start_factor"], s["end_factor"], s["total_iters"])
        case "ExponentialLR":
            return lrs.ExponentialLR(o, s["gamma"])
        case "PolynomialLR":
            return lrs.PolynomialLR(o, s["total_iters"], s["power"])
        case "CosineAnnealingLR":
            return lrs.CosineAnnealingLR(o, s["T_max"], s["eta_min"])
        case "CosineAnnealingWarmRestarts":
            return lrs.CosineAnnealingWarmRestarts(o, s["T_0"], s["T_mult"], s["eta_min"])
        case "CyclicLR":
            up = round(s["total_size"] * s["step_ratio"])
            momentum = {}
            if s["cycle_momentum"]:
                momentum = {"base_momentum": s["base_momentums"][0], "max_momentum": s["max_momentums"][0]}
            return lrs.CyclicLR(
                o, s["base_lrs"], s["max_lrs"], up, round(s["total_size"]) - up, s["mode"], s["gamma"],
                cycle_momentum=s["cycle_momentum"], **momentum,
            )  # fmt: skip
        case "OneCycleLR":
            three = len(s["_schedule_phases"]) == 3
            return lrs.OneCycleLR(
                o, 0.5, total_steps=s["total_steps"], pct_start=0.25 if three else 0.3, three_phase=three,
                anneal_strategy=s["_anneal_func_type"],
            )  # fmt: skip
        case "SequentialLR":
            children = [
                rebuilt(o, type(c).__name__, t, c)
                for c, t in zip(old._schedulers, s["_schedulers"], strict=True)
            ]
            return lrs.SequentialLR(o, children, s["_milestones"])
        case "ChainedScheduler":
            return lrs.ChainedScheduler(
                [
                    rebuilt(o, type(c).__name__, t, c)
                    for c, t in zip(old._schedulers, s["_schedulers"], strict=True)
                ]
            )
    raise AssertionError(kind)


def trace(scheduler: Any, opt: torch.optim.Optimizer, steps: int) -> list[tuple[Any, ...]]:
    """What each group is set to, before each of the next steps and after the last."""
    out = [written(opt)]
    for _ in range(steps):
        opt.step()
        scheduler.step()
        out.append(written(opt))
    return out


def written(opt: torch.optim.Optimizer) -> tuple[Any, ...]:
    return tuple((g["lr"], g.get("momentum"), g.get("betas")) for g in opt.param_groups)


def rates(found: Iterable[tuple[Any, ...]]) -> list[float]:
    return [row[0][0] for row in found]
