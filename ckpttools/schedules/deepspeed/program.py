"""DeepSpeed's own schedulers: the checkpoint holds the counter, ds_config all constants.

    {"last_batch_iteration": k}        k + 1 steps made; skipped (overflowed) updates do not count

On resume the learning rate of the first update is the one of the optimizer's param_groups; then the scheduler
of the *new* configuration goes on from k. Its constants are therefore settings of the new run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ckpttools.schedules.closed import ClosedMachine
from ckpttools.schedules.deepspeed.formulas import (
    LENGTHS,
    RATES,
    cosine_ratio,
    each,
    gamma,
    rule_of,
    share,
    warmed,
)
from ckpttools.schedules.lengths import Steps
from ckpttools.schedules.program import (
    Program,
    Setting,
    State,
    damaged,
    real,
    rescaled,
    rounding,
    scaled_group,
    whole,
)

CONFIG = "ds_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedProgram(Program):
    """`about` is ds_config's "scheduler"; `bases` the optimizer's own learning rates, where they matter."""

    bases: tuple[float, ...]

    @property
    def name(self) -> str:
        """The class that ds_config names."""
        return str(self.about["type"])

    @property
    def params(self) -> Mapping[str, Any]:
        """Its constants."""
        return _params(self.about)

    @property
    def families(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def count(self) -> int:
        return int(self.saved_states[0]["last_batch_iteration"]) + 1

    @property
    def known(self) -> bool:
        return self.name in LENGTHS and not any(map(math.isnan, self.bases))

    def machine(self, *, fresh: bool) -> ClosedMachine:
        return self._at(0) if fresh else self._machine(ClosedMachine.loaded, self.count)

    def _at(self, count: int) -> ClosedMachine:
        return self._machine(ClosedMachine.at, count)

    def _machine(self, make: Any, count: int) -> ClosedMachine:
        if self.name in LENGTHS:
            rule = rule_of(self.name, self.params, self.saved_groups, self.bases)
        else:
            rule = None

        def write(groups: Sequence[State], done: int) -> None:
            if rule is None:
                for group in groups:
                    group["lr"] = math.nan
                return
            values = rule(done - 1)
            for i, group in enumerate(groups):
                group["lr"] = values.lrs[i]
                if values.betas is not None:
                    group["betas"] = type(group["betas"])(values.betas[i])

        def mark(states: Sequence[State], groups: Sequence[State], done: int) -> None:
            states[0]["last_batch_iteration"] = done - 1

        made: ClosedMachine = make(self.saved_states, self.saved_groups, count, write, mark)
        return made

    def length(self) -> int | None:
        p = self.params
        if "total_num_steps" in LENGTHS.get(self.name, ()):
            return round(real(p, "total_num_steps", least=0, where=CONFIG))
        return None

    def rebased(self, steps: Steps, *, warmup: str = "scale", plateau: bool = False) -> DeepSpeedProgram:
        if steps.is_identity:
            return self
        params, settings, notes = dict(self.params), list(self.settings), []
        for key, default in LENGTHS.get(self.name, {}).items():
            old = params.get(key, default)
            if not old or (key == "warmup_num_steps" and warmup == "keep"):
                continue
            exact = steps.length(Fraction(real({key: old}, key, least=0, where=CONFIG)))
            found = rescaled(old, exact)
            if key.startswith(("cycle", "lr_range")):
                effect = "the k-th cycle comes k x {off} units {way}"
            else:
                effect = "it ends {off} units {way}"
            notes += rounding(key, old, exact, found, effect)
            if found != old:
                params[key] = found
                settings.append(Setting(f"scheduler.params.{key}", old, found, CONFIG))
        about = {**self.about, "params": params}
        changed = replace(self, about=about, settings=tuple(settings)).with_notes(
            *notes, *_logarithmic(self, params)
        )
        target = steps.position(self.count)
        if not changed.known:
            states = ({**self.saved_states[0], "last_batch_iteration": target - 1},)
            return replace(changed, saved_states=states)
        after = changed._at(target)
        groups = tuple(
            {key: new[key] for key in old} for old, new in zip(self.saved_groups, after.groups, strict=True)
        )
        return replace(changed, saved_states=tuple(after.states), saved_groups=groups)

    def scaled(self, factor: float) -> DeepSpeedProgram:
        if factor == 1:
            return self
        params, settings = dict(self.params), list(self.settings)
        for key, default in RATES.get(self.name, {}).items():
            old = params.get(key, default)
            if old is not None:
                params[key] = [x * factor for x in old] if isinstance(old, (list, tuple)) else old * factor
                if params[key] != old:
                    settings.append(Setting(f"scheduler.params.{key}", old, params[key], CONFIG))
        optimizer_lr = _optimizer_lr(self.about)
        about: dict[str, Any] = {**self.about, "params": params}
        if optimizer_lr is not None:
            settings.append(Setting("optimizer.params.lr", optimizer_lr, optimizer_lr * factor, CONFIG))
            about["lr"] = optimizer_lr * factor
        groups = tuple(scaled_group(g, factor) for g in self.saved_groups)
        bases = tuple(base * factor for base in self.bases)
        return replace(self, about=about, saved_groups=groups, bases=bases, settings=tuple(settings))


def recognise_deepspeed(
    states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> DeepSpeedProgram:
    """`about` holds "type" and "params"; for WarmupCosineLR also the optimizer's "lr", or "optimizer"."""
    if len(states) != 1:
        raise damaged(f"DeepSpeed saves one scheduler, here are {len(states)}")
    whole(states[0], "last_batch_iteration", least=-1)
    for i, group in enumerate(groups):
        real(group, "lr", where=f"param_groups[{i}]")
    given = about.get("type")
    name = given if isinstance(given, str) else None
    plain_groups = tuple(map(dict, groups))
    program = DeepSpeedProgram(
        saved_states=tuple(map(dict, states)),
        saved_groups=plain_groups,
        about={
            **about,
            "type": name or "a scheduler that ds_config does not name",
        },
        bases=tuple(math.nan for _ in groups),
    )
    if name not in LENGTHS:
        return program.with_notes(
            "ds_config does not say which scheduler this is: its counter is moved, and the learning rate "
            f"stays at {groups[0]['lr']:.6g} until the first step, off by at most what the schedule changes "
            "in one step"
        )
    program = replace(program, bases=tuple(_bases(program)))
    if any(map(math.isnan, program.bases)):
        return program.with_notes(
            "the optimizer's own learning rate, which the schedule multiplies, is neither in ds_config nor "
            "to be read off the saved one: the counter is moved, and the learning rate is left as it is"
        )
    if not program.count:  # 0.14.5 leaves the optimizer's own rate until the first step, 0.16.9 does not
        return program
    return program.compared(program._at(program.count).groups, by="ds_config's constants give")


def _params(about: Mapping[str, Any]) -> Mapping[str, Any]:
    params = about.get("params")
    if params is None:
        return {}
    if not isinstance(params, Mapping):
        raise damaged("the scheduler's params are not a mapping", CONFIG)
    return params


def _optimizer_lr(about: Mapping[str, Any]) -> float | None:
    found = about.get("lr")
    if found is None and isinstance(optimizer := about.get("optimizer"), Mapping):
        params = optimizer.get("params")
        found = params.get("lr") if isinstance(params, Mapping) else None
    return None if found is None or isinstance(found, str) else float(real({"lr": found}, "lr", where=CONFIG))


def _bases(program: DeepSpeedProgram) -> list[float]:
    """The learning rates that the optimizer was built with: ds_config's, else read off the saved ones."""
    name, params, k = program.name, program.params, program.count - 1
    given = _optimizer_lr(program.about)
    lows = [0.0] * len(program.saved_groups)
    if name == "WarmupCosineLR":
        part = cosine_ratio(params)(k)
    elif name == "WarmupLR" and params.get("warmup_max_lr") is None:
        part = gamma(name, params)(k) if k >= 0 else 0.0
        lows = each(params, "warmup_min_lr", 0.0, len(lows))
    else:
        return [0.0 for _ in lows]
    out = []
    for low, group in zip(lows, program.saved_groups, strict=True):
        saved = group["lr"]
        if given is not None and (not part or math.isclose(low + (given - low) * part, saved, rel_tol=1e-9)):
            out.append(given)
        elif part:
            out.append(_inverse(saved, low, part))
        else:
            out.append(math.nan)
    return out


def _inverse(saved: float, low: float, part: float) -> float:
    """x with low + (x - low) * part == saved, to the last bit where there is one; the shortest of these."""
    near = low + (saved - low) / part
    for digits in range(1, 17):
        short = float(f"{near:.{digits}g}")
        if low + (short - low) * part == saved:
            return short
    return near


def _logarithmic(old: DeepSpeedProgram, params: Mapping[str, Any]) -> list[str]:
    """A logarithmic warmup has no counterpart of another length: ln(t + 1) / ln(W) changes its shape."""
    if not old.name.startswith("Warmup") or params.get("warmup_type", "log") == "linear":
        return []
    before, after = warmed(old.params), warmed(params)
    if before == after:
        return []
    parts = [i / 100 for i in range(100)]
    off = max(abs(_log_at(p, before) - _log_at(p, after)) for p in parts)
    return [
        f"the logarithmic warmup of {before} steps is another curve with {after}: at the same place in the "
        f"data it differs by up to {100 * off:.1f} % of the peak, and not at all after the warmup"
    ]


def _log_at(part: float, warmup: int) -> float:
    return share({}, int(part * warmup), warmup)
