"""MMEngine's param_schedulers: several schedulers that act on the same param_groups, by epoch or iteration.

The state holds the counter and all constants, and wins over the new configuration. Schedulers that count
epochs are left alone; those that count iterations are moved, from the configuration's epoch values where
MMEngine itself converted them (`config`), else by rescaling.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from msgspec import Struct

from ckpttools.errors import UsageError
from ckpttools.schedules.lengths import Steps
from ckpttools.schedules.mmengine.config import converted, kind_named, matching, written_schedulers
from ckpttools.schedules.mmengine.lengths import Rescaling
from ckpttools.schedules.mmengine.steps import NEVER, PLATEAU, UNKNOWN, check, restart, step
from ckpttools.schedules.program import (
    Program,
    State,
    advance,
    computing,
    damaged,
    real,
    reals,
    scaled_group,
    too_long,
)
from ckpttools.schedules.torch.rates import EITHER, annealing


class MMEngineMachine(Struct):
    """`epoch` iterations make one epoch; None where every scheduler counts the same thing."""

    states: list[State]
    groups: list[State]
    kinds: tuple[str, ...]
    anneal: str
    epoch: int | None
    count: int

    def step(self) -> None:
        """One iteration, and the end of an epoch where it is one; one epoch where all count epochs."""
        self.count += 1
        mixed = len({s["by_epoch"] for s in self.states}) > 1
        for ends_epoch in (False, True):
            if ends_epoch and (self.epoch is None or self.count % self.epoch):
                break
            for state, kind in zip(self.states, self.kinds, strict=True):
                if not mixed or state["by_epoch"] == ends_epoch:
                    step(state, kind, self.groups, self.anneal)
            if not mixed:
                break


@dataclass(frozen=True, slots=True, kw_only=True)
class MMEngineProgram(Program):
    """`epoch`: iterations per epoch, where it is known; needed where some schedulers count epochs."""

    kinds: tuple[str, ...]
    epoch: int | None = None
    anneal: str = "cos"
    replays: bool = True
    hidden: int = 0  # groups at the end that the caller did not give

    def groups(self) -> list[State]:
        shown = len(self.saved_groups) - self.hidden
        return Program.groups(self)[:shown]

    @property
    def families(self) -> tuple[str, ...]:
        names = {"lr": "LR", "momentum": "Momentum"}
        return tuple(
            kind + names.get(s["param_name"], "ParamScheduler") + (" by epoch" if s["by_epoch"] else "")
            for kind, s in zip(self.kinds, self.saved_states, strict=True)
        )

    @property
    def by_epoch(self) -> bool | None:
        return all(s["by_epoch"] for s in self.saved_states)

    @property
    def count(self) -> int:
        counted = [s for s in self.saved_states if not s["by_epoch"]] or self.saved_states
        return max(int(s["_global_step"]) for s in counted)

    @property
    def known(self) -> bool:
        return self.replays

    @property
    def unknown(self) -> str:
        if PLATEAU in self.kinds:
            return "ReduceOnPlateau follows a metric"
        if UNKNOWN in self.kinds:
            return "the scheduler's class is not known"
        if self.mixed and self.epoch is None:
            return "the iterations of an epoch are not known"
        return "the schedule has ended"

    @property
    def mixed(self) -> bool:
        """Whether some schedulers count epochs and some iterations."""
        return len({s["by_epoch"] for s in self.saved_states}) > 1

    def machine(self, *, fresh: bool) -> MMEngineMachine:
        states, groups = copy.deepcopy(list(self.saved_states)), copy.deepcopy(list(self.saved_groups))
        made = MMEngineMachine(states, groups, self.kinds, self.anneal, self.epoch, self.count)
        if fresh:
            made.count = 0
            for group in groups:
                moved = [s.get("param_name") for s in states]
                for name in (name for name in ("lr", "momentum") if name in moved):
                    group[name] = group[f"initial_{name}"]
            with computing():
                for state, kind in zip(states, self.kinds, strict=True):
                    restart(state, kind, groups, self.anneal)
        return made

    def words(self) -> str:
        pairs = zip(self.families, self.saved_states, strict=True)
        spans = (f"{name} {s['begin']}-{s['end'] if s['end'] < NEVER else ''}" for name, s in pairs)
        return f"{', '.join(spans)}, at {self.count}"

    def length(self) -> int | None:
        ends = [int(s["end"]) for s in self.saved_states if s["end"] < NEVER and s["param_name"] == "lr"]
        return max(ends, default=None)

    def rebased(self, steps: Steps, *, warmup: str = "scale", plateau: bool = False) -> MMEngineProgram:
        if steps.is_identity:
            return self
        if self.by_epoch:
            return self.with_notes("the schedule counts epochs: it is left as it is")
        old_epoch, new_epoch = _whole(steps.old.epoch) or self.epoch, _whole(steps.new.epoch)
        states = copy.deepcopy(list(self.saved_states))
        to = Rescaling(steps, keep_warmup=warmup == "keep")
        entries: list[Any] = [None for _ in states]
        if old_epoch and new_epoch:
            entries = matching(written_schedulers(self.about.get("cfg")), states, self.kinds, old_epoch)
        for state, kind, entry in zip(states, self.kinds, entries, strict=True):
            if entry is None and not state["by_epoch"]:
                to.keep(state, kind)
        for state, kind, entry in zip(states, self.kinds, entries, strict=True):
            if not state["by_epoch"]:
                lengths = converted(entry, new_epoch) if entry is not None and new_epoch else None
                to.rescale(state, kind, lengths or {})
        changed = replace(self, saved_states=tuple(states), epoch=new_epoch).with_notes(*to.notes)
        return changed.placed(steps.position(self.count))

    def placed(self, count: int) -> MMEngineProgram:
        """These constants after `count` iterations of a run from scratch."""
        if self.mixed and self.epoch is None:
            states = [s if s["by_epoch"] else _moved(s, count) for s in self.saved_states]
            return replace(self, saved_states=tuple(states), replays=False).with_notes(_unknown(self))
        after = replayed(self, count)
        states = []
        for old, new in zip(self.saved_states, after.states, strict=True):
            state = {key: new[key] for key in old}
            if any(math.isnan(x) for x in _last(new)):
                state["_last_value"] = old["_last_value"]
            states.append(old if old["by_epoch"] and set(old) >= {"monitor", "patience"} else state)
        groups = [
            {k: v if isinstance(new[k], float) and math.isnan(new[k]) else new[k] for k, v in old.items()}
            for old, new in zip(self.saved_groups, after.groups, strict=True)
        ]
        found = replace(self, saved_states=tuple(states), saved_groups=tuple(groups))
        if math.isnan(after.groups[0]["lr"]):
            return replace(found, replays=False).with_notes(_unknown(self))
        return replace(found, replays=True)

    def scaled(self, factor: float) -> MMEngineProgram:
        if factor == 1:
            return self
        states = []
        for state in copy.deepcopy(list(self.saved_states)):
            if state["param_name"] == "lr":
                for key in ("base_values", "_last_value", "min_values"):
                    if key in state:
                        state[key] = _times(state, key, factor)
                for key in ("eta_min", "eta_max"):
                    if isinstance(state.get(key), (int, float)):
                        state[key] *= factor
                    elif isinstance(state.get(key), list):
                        state[key] = _times(state, key, factor)
            states.append(state)
        groups = tuple(scaled_group(g, factor) for g in self.saved_groups)
        return replace(self, saved_states=tuple(states), saved_groups=tuple(groups))


def _last(state: State) -> list[float]:
    """The numbers that a scheduler noted as its last ones; none where the value cannot be."""
    values = state.get("_last_value")
    return [x for x in values if isinstance(x, float)] if isinstance(values, list) else []


def _times(state: State, key: str, factor: float) -> list[float]:
    values = state[key]
    if not isinstance(values, (list, tuple)):
        raise damaged(f"{key} is not a list")
    return [x * factor for x in reals(state, key, len(values))]


def recognise_mmengine(
    states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> MMEngineProgram:
    """`groups` with base_param_settings as the last one, where the checkpoint has it.

    MMEngine schedules it like a group where there are several. Where it is missing it is made of the states'
    last values, and left out again of `groups()`.
    """
    plain = [dict(g) for g in groups]
    hidden = _hidden(states, len(plain))
    plain += hidden
    _complete(plain, states)
    own = tuple(map(dict, states))
    kinds = tuple(check(s, plain) for s in own)
    epoch = about.get("units_per_epoch")
    program = MMEngineProgram(
        saved_states=own,
        saved_groups=tuple(plain),
        about=about,
        kinds=kinds,
        epoch=epoch if type(epoch) is int and epoch > 0 else None,
        hidden=len(hidden),
    )
    if program.mixed and program.epoch is None:
        return replace(program, replays=False).with_notes(
            "some schedulers count epochs and some iterations, and the iterations of an epoch are not known"
        )
    entries = [e for e in written_schedulers(about.get("cfg")) if kind_named(e) == "OneCycle"]
    written = {str(e.get("anneal_strategy", "cos")) for e in entries if "OneCycle" in kinds}
    named = next(filter(None, map(annealing, own)), None)
    if len(written) == 1 and named is None:
        named = "linear" if written == {"linear"} else "cos"
    if named is not None:
        program = replace(program, anneal=named)
    elif "OneCycle" in kinds:
        off = {
            kind: abs(replayed(replace(program, anneal=kind), program.count).groups[0]["lr"] - plain[0]["lr"])
            for kind in ("cos", "linear")
        }
        if program.count and math.isclose(off["linear"], off["cos"], abs_tol=1e-6 * plain[0]["lr"]):
            program = program.with_notes(EITHER)
        else:
            program = replace(program, anneal="linear" if off["linear"] < off["cos"] else "cos")
    after = replayed(program, program.count).groups
    if math.isnan(after[0]["lr"]):
        return replace(program, replays=False).with_notes(_unknown(program))
    return program.compared(after, "_last_value")


def replayed(program: MMEngineProgram, count: int) -> MMEngineMachine:
    """The schedule after `count` steps of a run from scratch."""
    if too_long(count):
        raise UsageError(
            "schedule-unknown",
            f"{', '.join(program.families)} after {count} steps: too many to replay one by one",
            why="schedulers that act on the same value have no formula for a distant step",
        )
    machine = program.machine(fresh=True)
    advance(machine, count)
    return machine


def _hidden(states: Sequence[Mapping[str, Any]], groups: int) -> list[State]:
    """What stands for base_param_settings, where the states have one value more than there are groups."""
    found: State = {}
    for state in states:
        name, bases, last = (state.get(key) for key in ("param_name", "base_values", "_last_value"))
        if name not in ("lr", "momentum") or not isinstance(bases, list) or len(bases) != groups + 1:
            continue
        found[f"initial_{name}"] = bases[-1]
        found[name] = last[-1] if isinstance(last, list) and last else bases[-1]
    if found:
        found.setdefault("lr", 0.0)
    return [found] if found else []


def _complete(groups: list[State], states: Sequence[Mapping[str, Any]]) -> None:
    """Initial values where an optimizer did not save them, from base_values."""
    for index, group in enumerate(groups):
        real(group, "lr", where=f"param_groups[{index}]")
        for state in states:
            name, values = state.get("param_name"), state.get("base_values")
            if name not in ("lr", "momentum"):
                continue
            if (
                name == "momentum"
                and "momentum" not in group
                and isinstance(group.get("betas"), (list, tuple))
            ):
                group["momentum"] = group["betas"][0]
            if f"initial_{name}" not in group and isinstance(values, (list, tuple)) and len(values) > index:
                group[f"initial_{name}"] = values[index]
            group.setdefault(f"initial_{name}", group.get(name))
            real(group, f"initial_{name}", where=f"param_groups[{index}]")
            real(group, str(name), where=f"param_groups[{index}]")
        group.setdefault("initial_lr", group["lr"])


def _unknown(program: MMEngineProgram) -> str:
    return (
        f"{program.unknown}: its counter is moved, and the learning rate stays at "
        f"{program.saved_groups[0]['lr']:.6g} until the first step, off by at most what the schedule changes "
        "in one step"
    )


def _moved(state: State, count: int) -> State:
    last = -1 if count < state["begin"] else min(count, state["end"] - 1) - state["begin"]
    return {**state, "_global_step": count, "last_step": last}


def _whole(value: Fraction | None) -> int | None:
    return int(value) if value is not None and value.denominator == 1 else None
