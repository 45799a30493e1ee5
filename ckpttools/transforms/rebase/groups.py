"""param_groups: the learning rate of the first update in every copy, and its scale with the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from ckpttools.errors import UsageError
from ckpttools.training import Edit, OptimizerSettings, Place, equal
from ckpttools.transforms.rebase.scheduled import Scheduled
from ckpttools.transforms.rebase.timeline import Request, Timeline

CYCLES = ("OneCycle", "CyclicLR", "Momentum")  # schedules that may move betas, too


def optimizer_edits(
    optimizer: OptimizerSettings, moved: Sequence[Scheduled], factor: float
) -> Iterator[Edit]:
    """The learning rate (and cycled betas or momentum) in every copy of the param_groups."""
    new: list[dict[str, object]] = [{} for _ in (*optimizer.groups, optimizer.base_group)]
    if factor != 1:
        for into, group in zip(new, (*optimizer.groups, optimizer.base_group or {}), strict=True):
            for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                value = group.get(key)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    into[key] = value * factor
    for each in moved:
        for into, values in zip(new, each.new.groups(), strict=False):
            into |= values
    for g, group in enumerate(optimizer.groups):
        for place in optimizer.places:
            yield from group_edits(place.below(g), group, new[g])
    if optimizer.base is not None and optimizer.base_group is not None:
        yield from group_edits(optimizer.base, optimizer.base_group, new[len(optimizer.groups)])


def group_edits(place: Place, group: Mapping[str, object], new: Mapping[str, object]) -> Iterator[Edit]:
    """New values of settings that the group has."""
    for key, value in new.items():
        if key in group and not equal(group[key], value):
            yield Edit(place=place.below(key), old=group[key], new=value, why="optimizer")


def factor_of(request: Request, ratio: Fraction) -> float:
    """How much the learning rate grows with the batch."""
    kappa = float(ratio)
    match request.lr_scaling:
        case "linear":
            return kappa
        case "sqrt" | "adam-sde":
            return math.sqrt(kappa)
        case _:
            return 1.0


def adam_sde_edits(
    optimizer: OptimizerSettings, moved: Sequence[Scheduled], ratio: Fraction
) -> Iterator[Edit]:
    """1 - beta grows with the batch and eps shrinks with its root (Malladi et al. 2022, for Adam)."""
    kappa = float(ratio)
    if any(name in family for each in moved for family in each.new.families for name in CYCLES):
        raise UsageError(
            "lr-scaling",
            "--lr-scaling adam-sde cannot be combined with a schedule that cycles Adam's betas",
            where=optimizer.places[0].file,
            why="the schedule would overwrite them with its own at the first step",
            hint="use --lr-scaling sqrt",
        )
    for g, group in enumerate(optimizer.groups):
        betas, eps = group.get("betas"), group.get("eps")
        if not isinstance(betas, list | tuple) or not isinstance(eps, float):
            raise UsageError(
                "lr-scaling",
                "--lr-scaling adam-sde needs an optimizer with betas and eps",
                where=optimizer.places[0].file,
                why="the rule is about Adam's averages; this optimizer has none",
                hint="use --lr-scaling linear for SGD, or sqrt",
            )
        new = [1 - kappa * (1 - float(beta)) for beta in betas]
        if not all(1e-9 < beta < 1 for beta in new):
            raise UsageError(
                "lr-scaling",
                f"with a batch {kappa:g} times as large, Adam's betas would be "
                + ", ".join(f"{beta:g}" for beta in new),
                where=optimizer.places[0].file,
                why="the rule holds only while 1 - beta, times the growth, stays below 1",
                hint="take a smaller step, or --lr-scaling sqrt",
            )
        changed = {"betas": type(betas)(new), "eps": eps / math.sqrt(kappa)}
        for place in optimizer.places:
            yield from group_edits(place.below(g), group, changed)


def notes_of_scaling(request: Request, line: Timeline, factor: float) -> Iterator[str]:
    """What to know about the scale of the learning rate."""
    if request.lr_scaling == "none":
        if line.ratio != 1:
            yield (
                f"the effective batch is {float(line.ratio):g} times the old one, and the learning rate "
                "keeps its scale; --lr-scaling changes it"
            )
        return
    yield (
        f"learning rates are multiplied by {factor:g} ({request.lr_scaling}); those in the new run's "
        "configuration must be, too"
    )
    if request.lr_scaling in ("sqrt", "adam-sde") and line.ratio != 1:
        yield (
            "AdamW's weight decay per epoch goes with lr x decay / batch: to keep it, multiply weight_decay "
            f"by {factor:g}, too"
        )
