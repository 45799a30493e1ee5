"""The schedules of transformers' Trainer: a LambdaLR whose function is a name in the training arguments.

    scheduler.pt {"base_lrs", "last_epoch", "_step_count", "_last_lr", ..., "lr_lambdas": [{} or None]}

The counter and base_lrs come from the checkpoint, every other constant from the arguments of the new run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ckpttools.schedules.closed import ClosedMachine
from ckpttools.schedules.lengths import Steps, nearest
from ckpttools.schedules.program import (
    Program,
    Setting,
    State,
    damaged,
    real,
    reals,
    rescaled,
    rounding,
    scaled_group,
    whole,
)
from ckpttools.schedules.torch.program import TorchProgram, recognise_torch
from ckpttools.schedules.torch.states import LAMBDA, kind_of
from ckpttools.schedules.transformers.formulas import (
    ARGS,
    NAMES,
    factor_of,
    stable_steps,
    timescale_of,
)

WHERE = "training arguments"
ABSOLUTE_KWARGS = ("min_lr", "lr_end")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerProgram(Program):
    """`about`: "lr_scheduler_type", "warmup_steps" (or a share below 1, or "warmup_ratio"), "max_steps",
    "lr_scheduler_kwargs", and "learning_rate" where it is known."""

    @property
    def name(self) -> str:
        """The schedule's name in the training arguments."""
        return str(self.about["lr_scheduler_type"])

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """lr_scheduler_kwargs."""
        return _kwargs(self.about)

    @property
    def total(self) -> int:
        """The run's updates; 0 where the schedule does not need them."""
        return max(0, int(self.about.get("max_steps") or 0))

    @property
    def warmup(self) -> int:
        """The updates of the warmup."""
        return warmup_of(self.about, self.total)

    @property
    def families(self) -> tuple[str, ...]:
        return (f"transformers {self.name}",)

    @property
    def count(self) -> int:
        return int(self.saved_states[0]["last_epoch"])

    def machine(self, *, fresh: bool) -> ClosedMachine:
        return self._at(0) if fresh else self._machine(self.count, loaded=True)

    def _at(self, count: int) -> ClosedMachine:
        return self._machine(count, loaded=False)

    def _machine(self, count: int, *, loaded: bool) -> ClosedMachine:
        bases = self.saved_states[0]["base_lrs"]
        factor = factor_of(self.name, self.warmup, self.total, self.kwargs, _default_lr(self.about, bases))
        behind = self.saved_states[0].get("_step_count", 0) - self.count

        def write(groups: Sequence[State], done: int) -> None:
            part = factor(done)
            for group, base in zip(groups, bases, strict=True):
                group["lr"] = base * part

        def mark(states: Sequence[State], groups: Sequence[State], done: int) -> None:
            state = states[0]
            state["last_epoch"] = done
            if "_step_count" in state and behind in (0, 1, 2):
                state["_step_count"] = done + behind
            if "_last_lr" in state:
                state["_last_lr"] = [group["lr"] for group in groups]

        make = ClosedMachine.loaded if loaded else ClosedMachine.at
        return make(self.saved_states, self.saved_groups, count, write, mark)

    def length(self) -> int | None:
        if self.name == "warmup_stable_decay":
            stable = stable_steps(self.warmup, self.total, self.kwargs)
            return self.warmup + stable + whole(self.kwargs, "num_decay_steps", where=ARGS)
        if self.name in ("constant", "constant_with_warmup", "inverse_sqrt"):
            return None
        return self.total

    def rebased(self, steps: Steps, *, warmup: str = "scale", plateau: bool = False) -> TrainerProgram:
        if steps.is_identity:
            return self
        about, settings, notes = dict(self.about), list(self.settings), []
        old_total, old_warmup = self.total, self.warmup
        if old_total:
            about["max_steps"] = total = max(1, nearest(steps.length(old_total)))
            notes += rounding(
                "max_steps", old_total, steps.length(old_total), total, "it ends {off} updates {way}"
            )
        share = _share(self.about)
        if old_warmup and (share is None or warmup == "keep"):
            exact = Fraction(old_warmup) if warmup == "keep" else steps.length(old_warmup)
            about["warmup_steps"] = found = max(1, nearest(exact))
            about.pop("warmup_ratio", None)
            notes += rounding("warmup_steps", old_warmup, exact, found, "the warmup ends {off} updates {way}")
        kwargs = self._kwargs_after(steps, about, notes)
        if kwargs or "lr_scheduler_kwargs" in about:
            about["lr_scheduler_kwargs"] = kwargs or about["lr_scheduler_kwargs"]
        for key in ("max_steps", "warmup_steps"):
            if about.get(key) != self.about.get(key):
                settings.append(Setting(key, self.about.get(key), about[key], WHERE))
        for key, value in kwargs.items():
            if value != self.kwargs.get(key):
                settings.append(Setting(f"lr_scheduler_kwargs.{key}", self.kwargs.get(key), value, WHERE))
        changed = replace(self, about=about, settings=tuple(settings)).with_notes(*notes)
        after = changed._at(steps.position(self.count))
        groups = tuple(
            {key: new[key] for key in old} for old, new in zip(self.saved_groups, after.groups, strict=True)
        )
        return replace(changed, saved_states=tuple(after.states), saved_groups=groups)

    def _kwargs_after(self, steps: Steps, about: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
        """The entries of lr_scheduler_kwargs on the new clock."""
        kwargs = dict(self.kwargs)
        warmup, total = warmup_of(about, int(about.get("max_steps") or 0)), int(about.get("max_steps") or 0)
        if self.name == "inverse_sqrt":
            old = timescale_of(self.warmup, kwargs)
            exact = steps.length(Fraction(old))
            found = rescaled(old, exact)
            if "timescale" in kwargs or found != timescale_of(warmup, {}):
                kwargs["timescale"] = found
                notes += rounding("timescale", old, exact, found, "the decay is as if {off} updates {way}")
        if self.name == "warmup_stable_decay":
            decay = whole(kwargs, "num_decay_steps", where=ARGS)
            stable = stable_steps(self.warmup, self.total, kwargs)
            begins = self.warmup + stable  # where the decay begins, and where it ends
            ends = begins + decay
            new_end = total if ends == self.total else nearest(steps.length(ends))
            new_begin = nearest(steps.length(begins))
            notes += rounding(
                "the begin of the decay", begins, steps.length(begins), new_begin, "it is {off} updates {way}"
            )
            kwargs["num_decay_steps"] = max(1, new_end - new_begin)
            if kwargs.get("num_stable_steps") is not None:
                kwargs["num_stable_steps"] = max(0, new_begin - warmup)
        return kwargs

    def scaled(self, factor: float) -> TrainerProgram:
        if factor == 1:
            return self
        about, settings, kwargs = dict(self.about), list(self.settings), dict(self.kwargs)
        state = dict(self.saved_states[0])
        about["learning_rate"] = old = _default_lr(self.about, state["base_lrs"])
        about["learning_rate"] *= factor
        settings.append(Setting("learning_rate", old, about["learning_rate"], WHERE))
        for key in ABSOLUTE_KWARGS:
            if isinstance(kwargs.get(key), (int, float)):
                kwargs[key] *= factor
                settings.append(Setting(f"lr_scheduler_kwargs.{key}", self.kwargs[key], kwargs[key], WHERE))
        if kwargs:
            about["lr_scheduler_kwargs"] = kwargs
        for key in ("base_lrs", "_last_lr"):
            if key in state:
                state[key] = [x * factor for x in state[key]]
        groups = tuple(scaled_group(g, factor) for g in self.saved_groups)
        return replace(
            self, about=about, settings=tuple(settings), saved_states=(state,), saved_groups=groups
        )


def recognise_trainer(
    states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> TrainerProgram | TorchProgram:
    """A TorchProgram where the schedule is no formula of transformers' (a metric, a user's function)."""
    name = about.get("lr_scheduler_type")
    if len(states) != 1 or kind_of(states[0]) != LAMBDA or str(name) not in NAMES:
        return recognise_torch(states, groups, about)
    state = states[0]
    whole(state, "last_epoch")
    reals(state, "base_lrs", len(groups))
    if "_step_count" in state:
        whole(state, "_step_count")
    for i, group in enumerate(groups):
        real(group, "lr", where=f"param_groups[{i}]")
    if about.get("max_steps") is not None:
        whole(about, "max_steps", least=-1, where=ARGS)
    program = TrainerProgram(saved_states=(dict(state),), saved_groups=tuple(map(dict, groups)), about=about)
    if not program.total and name not in ("constant", "constant_with_warmup", "inverse_sqrt"):
        return recognise_torch(states, groups, about)
    found = [
        tried.compared(
            tried._at(program.count).groups, "_last_lr", by=f"{name} of {program.total} updates gives"
        )
        for lr in _defaults(about, state["base_lrs"])
        for tried in (replace(program, about={**about, "learning_rate": lr}),)
    ]
    return next((each for each in found if each.explained), found[0])


def _defaults(about: Mapping[str, Any], bases: Sequence[float]) -> list[float]:
    """What the optimizer's default learning rate may be, the likeliest first: min_lr and lr_end are parts of
    it, whatever rates single groups were given. A rebase may have scaled all rates but the saved arguments.
    """
    given = _default_lr(about, bases)
    return list(dict.fromkeys([given, *bases] if given in bases else [bases[0], given, *bases]))


def warmup_of(about: Mapping[str, Any], total: int) -> int:
    """The warmup's updates: a count, or a share of the total."""
    share = _share(about)
    if share is not None:
        return math.ceil(total * share)
    return int(about.get("warmup_steps") or 0)


def _share(about: Mapping[str, Any]) -> float | None:
    steps, ratio = about.get("warmup_steps") or 0, about.get("warmup_ratio") or 0
    steps = real({"warmup_steps": steps}, "warmup_steps", least=0, where=ARGS)
    ratio = real({"warmup_ratio": ratio}, "warmup_ratio", least=0, where=ARGS)
    if steps >= 1:
        return None
    return float(steps or ratio) or None


def _kwargs(about: Mapping[str, Any]) -> Mapping[str, Any]:
    kwargs = about.get("lr_scheduler_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise damaged("lr_scheduler_kwargs are not a mapping", ARGS)
    return kwargs


def _default_lr(about: Mapping[str, Any], bases: Sequence[float]) -> float:
    given = about.get("learning_rate")
    return bases[0] if given is None else float(real({"learning_rate": given}, "learning_rate", where=ARGS))
