"""timm's schedulers, where a training script saved them: timm itself does not.

Their learning rate is a formula of the epoch, or of the update where t_in_epochs is false. The count is not
in the state: about["count"] gives it, or about["counts"] those that it can be, of which the saved rate tells
(scripts step before they save, or after, and count from 0 or 1). The class is recognised by its fields:

    CosineLRScheduler     t_initial, k_decay, cycle_*     TanhLRScheduler       t_initial, lb, ub, cycle_*
    PolyLRScheduler       t_initial, power, cycle_*       StepLRScheduler       decay_t (a number)
    MultiStepLRScheduler  decay_t (a list)                others                not computed

Source: timm 1.0.31, timm/scheduler/*.py.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ckpttools.errors import UsageError
from ckpttools.schedules.closed import ClosedMachine
from ckpttools.schedules.lengths import Steps
from ckpttools.schedules.program import (
    Program,
    State,
    damaged,
    real,
    reals,
    rescaled,
    rounding,
    scaled_group,
    whole,
)

CYCLES = frozenset({"t_initial", "cycle_mul", "cycle_decay", "cycle_limit", "warmup_prefix", "lr_min"})
WARMUP = frozenset({"warmup_t", "warmup_lr_init", "warmup_steps"})


def kind_of(state: Mapping[str, Any]) -> str:
    """The class that a state is of."""
    if not state.keys() >= WARMUP | {"base_values", "param_group_field", "t_in_epochs"}:
        return "unknown"
    if state.keys() >= CYCLES:
        for field, name in (("lb", "Tanh"), ("power", "Poly"), ("k_decay", "Cosine")):
            if field in state:
                return name
    if "decay_rate" in state and "decay_t" in state:
        return "MultiStep" if isinstance(state["decay_t"], (list, tuple)) else "Step"
    return "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimmProgram(Program):
    """`counted`: the epoch or update that the saved rate is of, None where that is not known."""

    kind: str
    counted: int | None
    has_noise: bool

    @property
    def families(self) -> tuple[str, ...]:
        return (f"timm {self.kind}LRScheduler" if self.kind != "unknown" else "timm, unknown",)

    @property
    def count(self) -> int:
        return self.counted or 0

    @property
    def by_epoch(self) -> bool | None:
        found = self.saved_states[0].get("t_in_epochs")
        return found if isinstance(found, bool) else None

    @property
    def known(self) -> bool:
        return self.kind != "unknown" and not self.has_noise and self.counted is not None

    def words(self) -> str:
        words = Program.words(self)
        return words if self.counted is not None else f"{words.removesuffix(' 0')} ?"

    def machine(self, *, fresh: bool) -> ClosedMachine:
        return self._at(0) if fresh else self._machine(ClosedMachine.loaded, self.count)

    def _at(self, count: int) -> ClosedMachine:
        return self._machine(ClosedMachine.at, count)

    def _machine(self, make: Callable[..., ClosedMachine], count: int) -> ClosedMachine:
        state = self.saved_states[0]

        def write(groups: Sequence[State], done: int) -> None:
            values = _values(self.kind, state, done) if self.known else [math.nan for _ in groups]
            for group, value in zip(groups, values, strict=True):
                group["lr"] = value * group["lr_scale"] if "lr_scale" in group else value

        def mark(states: Sequence[State], groups: Sequence[State], done: int) -> None:
            """The state does not hold the count."""

        return make(self.saved_states, self.saved_groups, count, write, mark)

    def length(self) -> int | None:
        s = self.saved_states[0]
        if "t_initial" not in s or s.get("cycle_mul", 1) != 1:
            return None
        if self.kind == "unknown":
            return None
        total = int(s["t_initial"] * max(1, s["cycle_limit"]))
        return total + (int(s["warmup_t"]) if s["warmup_prefix"] else 0)

    def rebased(self, steps: Steps, *, warmup: str = "scale", plateau: bool = False) -> TimmProgram:
        if steps.is_identity:
            return self
        if self.by_epoch:
            return self.with_notes("the schedule counts epochs: it is left as it is")
        if self.counted is None:
            raise UsageError(
                "schedule-unknown",
                "timm does not save its schedule's count, and no counter of the checkpoint gives the rate",
                why="its place on the new clock cannot be told",
                hint="--counters-only leaves it alone and moves the counters; then set the scheduler up anew",
            )
        target = steps.position(self.count)
        if self.kind == "unknown":
            return replace(self, counted=target).with_notes("the schedule is not known: it is left as it is")
        s, notes = dict(self.saved_states[0]), list[str]()
        for key in ("t_initial", "decay_t", "warmup_t"):
            old = s.get(key)
            if not old or (key == "warmup_t" and warmup == "keep"):
                continue
            if isinstance(old, (list, tuple)):
                s[key] = type(old)(rescaled(x, steps.length(Fraction(x))) for x in old)
                continue
            exact = steps.length(Fraction(old))
            s[key] = rescaled(old, exact)
            notes += rounding(key, old, exact, s[key], "it ends {off} updates {way}")
        if s["warmup_t"]:
            goal = s["base_values"]
            if self.kind == "Tanh" and not s["warmup_prefix"]:
                goal = _main("Tanh", s, s["warmup_t"])
            s["warmup_steps"] = [(v - s["warmup_lr_init"]) / s["warmup_t"] for v in goal]
        noise = s.get("noise_range_t")
        if isinstance(noise, (list, tuple)):
            s["noise_range_t"] = type(noise)(rescaled(x, steps.length(Fraction(x)), least=0) for x in noise)
        elif isinstance(noise, (int, float)):
            s["noise_range_t"] = rescaled(noise, steps.length(Fraction(noise)), least=0)
        changed = replace(self, saved_states=(s,), counted=target).with_notes(*notes)
        if not self.known:
            return changed
        after = changed._at(target)
        return replace(changed, saved_groups=tuple(after.groups))

    def scaled(self, factor: float) -> TimmProgram:
        if factor == 1:
            return self
        s = dict(self.saved_states[0])
        for key in ("base_values", "warmup_steps") if self.kind != "unknown" else ():
            if isinstance(s.get(key), list) and (key != "warmup_steps" or s["warmup_t"]):
                s[key] = [x * factor for x in s[key]]
        for key in ("lr_min", "warmup_lr_init"):
            if key in s and self.kind != "unknown":
                s[key] *= factor
        groups = tuple(scaled_group(g, factor) for g in self.saved_groups)
        return replace(self, saved_states=(s,), saved_groups=groups)


MAX_POWER = 1000  # whole numbers to a higher one would fill the memory


def recognise_timm(
    states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> TimmProgram:
    """Raises UsageError where a value that the formula needs cannot be."""
    if len(states) != 1:
        raise damaged(f"timm uses one scheduler, here are {len(states)}")
    s, kind = dict(states[0]), kind_of(states[0])
    for i, group in enumerate(groups):
        real(group, "lr", where=f"param_groups[{i}]")
    if kind != "unknown":
        if s["param_group_field"] != "lr":
            kind = "unknown"
        reals(s, "base_values", len(groups))
        reals(s, "warmup_steps", len(groups))
        whole(s, "warmup_t")
        real(s, "warmup_lr_init")
        for key in (
            "t_initial",
            "cycle_mul",
            "cycle_decay",
            "cycle_limit",
            "lr_min",
            "k_decay",
            "power",
            "lb",
            "ub",
        ):
            if key in s:
                number = real(s, key, least=1e-9 if key in ("t_initial", "cycle_mul") else -math.inf)
                if key in ("k_decay", "power") and abs(number) > MAX_POWER:
                    raise damaged(f"{key} is {number}")
        noise = s.get("noise_range_t")
        for i, edge in enumerate(
            noise if isinstance(noise, (list, tuple)) else [0 if noise is None else noise]
        ):
            real({f"noise_range_t[{i}]": edge}, f"noise_range_t[{i}]")
        if kind == "Step":
            real(s, "decay_t", least=1e-9)
        if kind == "MultiStep":
            reals(s, "decay_t", len(s["decay_t"]))
    program = TimmProgram(
        saved_states=(s,),
        saved_groups=tuple(map(dict, groups)),
        about=about,
        kind=kind,
        counted=whole({**about}, "count") if "count" in about else None,
        has_noise=s.get("noise_range_t") is not None,
    )
    if kind == "unknown":
        return program.with_notes(
            "this scheduler of timm is not known: its state and the learning rate are left"
        )
    if program.has_noise:
        return program.with_notes(
            "the schedule adds random noise: the learning rate is left until the next update"
        )
    if program.counted is not None:
        return program.compared(program._at(program.count).groups)
    return _counted(program, [n for n in about.get("counts", ()) if type(n) is int and 0 <= n <= 10**15])


def _counted(program: TimmProgram, counts: Sequence[int]) -> TimmProgram:
    """With the first of `counts` that gives the saved learning rates; with none where no one does."""
    for count in counts:
        found = replace(program, counted=count)
        with suppress(UsageError):  # a formula need not hold for every count
            found = found.compared(found._at(count).groups)
            if found.explained:
                return found
    return replace(program, explained=not counts)


def _values(kind: str, s: State, t: int) -> list[float]:
    if t < s["warmup_t"]:
        return [s["warmup_lr_init"] + t * rise for rise in s["warmup_steps"]]
    return _main(kind, s, t)


def _main(kind: str, s: State, t: int) -> list[float]:
    if s["warmup_prefix"]:
        t = t - s["warmup_t"]
    if kind == "Step":
        return [v * float(s["decay_rate"]) ** (t // s["decay_t"]) for v in s["base_values"]]
    if kind == "MultiStep":
        return [
            v * float(s["decay_rate"]) ** bisect.bisect_right(s["decay_t"], t + 1) for v in s["base_values"]
        ]
    first, mul, low = s["t_initial"], s["cycle_mul"], s["lr_min"]
    if mul != 1:
        i = math.floor(math.log(1 - t / first * (1 - mul), mul))
        length = mul**i * first
        at = t - (1 - mul**i) / (1 - mul) * first
    else:
        i = t // first
        length, at = first, t - first * i
    if i >= s["cycle_limit"]:
        return [low for _ in s["base_values"]]
    tops = [v * float(s["cycle_decay"]) ** i for v in s["base_values"]]
    if kind == "Tanh":
        part = at / length
        shape = 1 - math.tanh(s["lb"] * (1.0 - part) + s["ub"] * part)
        return [low + 0.5 * (top - low) * shape for top in tops]
    k = s["k_decay"]
    if kind == "Poly":
        fall = (1 - at**k / length**k) ** s["power"]
        return [low + (top - low) * fall for top in tops]
    wave = 1 + math.cos(math.pi * at**k / length**k)
    return [low + 0.5 * (top - low) * wave for top in tops]
