"""What a recognised schedule can do, whatever framework saved it.

A saved learning-rate schedule is a counter, constants, and the values that the scheduler last wrote into the
optimizer's param_groups. Rebasing changes the constants, and finds the values by *replay*: the library's own
floating point operations, in the library's order, from the initial learning rate on, as often as the new
counter says. So the result has the very bits of a run that was started from scratch.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol, Self

from msgspec import Struct

from ckpttools.errors import UsageError
from ckpttools.schedules.lengths import Steps, nearest

State = dict[str, Any]

# steps that are replayed; beyond, closed forms answer
REPLAY = 1_000_000
# what schedulers write into a param_group; the others are theirs but constant
LIVE = ("lr", "momentum", "betas")
ABSOLUTE = ("initial_lr", "max_lr", "min_lr")


class Setting(Struct, frozen=True):
    """A value that the checkpoint does not hold and that the user must set in `where` for the new run."""

    name: str
    old: object
    new: object
    where: str


class Machine(Protocol):
    """A schedule in motion. `step` changes `states` and `groups` in place, as the library would."""

    states: list[State]
    groups: list[State]

    def step(self) -> None:
        """One unit more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program(ABC):
    """Schedules that act on one optimizer.

    `notes` say what cannot be exact, one sentence each; `settings` what lives outside the checkpoint. All
    learning rates are those used *for* a unit (an update, a micro-batch or an epoch), before the scheduler
    is stepped after it. NaN stands for a learning rate that cannot be known (a function that is not saved).
    """

    saved_states: tuple[State, ...]
    saved_groups: tuple[State, ...]
    about: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    explained: bool = True  # whether a replay gives the saved learning rates
    contradiction: tuple[float, float] | None = None  # the scheduler's own rate, and the replayed one

    @property
    @abstractmethod
    def families(self) -> tuple[str, ...]:
        """What was recognised, for display: `SequentialLR[LinearLR, CosineAnnealingLR]`."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Steps that the schedule has made: 0 after construction."""

    @property
    def by_epoch(self) -> bool | None:
        """Whether one step is an epoch, where the state says so. Such a schedule is never rescaled."""
        return None

    @property
    def known(self) -> bool:
        """Whether the learning rate can be computed; otherwise rebasing maps counters only."""
        return True

    @property
    def unknown(self) -> str:
        """Why it cannot be computed, in words."""
        return "the schedule's function is not in the checkpoint"

    @abstractmethod
    def rebased(self, steps: Steps, *, warmup: str = "scale", plateau: bool = False) -> Program:
        """The same place in the data on the new clock.

        `warmup="keep"` leaves the length of a warmup as it is, in units. `plateau` says that a scheduler
        driven by a metric is stepped once per unit (its patience is then scaled); by default it is left.
        """

    @abstractmethod
    def scaled(self, factor: float) -> Program:
        """All absolute learning rates times `factor`."""

    @abstractmethod
    def length(self) -> int | None:
        """The units after which the schedule has run out, where it says so."""

    @abstractmethod
    def machine(self, *, fresh: bool) -> Machine:
        """A copy set in motion: as constructed anew with these constants, or as loaded from the state."""

    def states(self) -> list[State]:
        """The scheduler states, with every key that the saved ones have."""
        return copy.deepcopy(list(self.saved_states))

    def groups(self) -> list[State]:
        """For each param_group, the values that schedulers write or read there."""
        return [
            {key: copy.deepcopy(group[key]) for key in (*LIVE, *ABSOLUTE) if key in group}
            for group in self.saved_groups
        ]

    def words(self) -> str:
        """What is running and where: `PolynomialLR 0-100, at 7`."""
        end = self.length()
        return f"{', '.join(self.families)}{'' if end is None else f' 0-{end}'}, at {self.count}"

    def curve(self, n: int) -> list[float]:
        """The learning rate of group 0 in units 0 to n - 1 of a run from scratch with these constants."""
        return list(rates(self.machine(fresh=True), n))

    def ahead(self, n: int) -> list[float]:
        """The learning rate of group 0 in the next n units, when this state is loaded and stepped on."""
        return list(rates(self.machine(fresh=False), n))

    def compared(
        self, replayed: Sequence[State], key: str = "", *, by: str = "the saved constants give"
    ) -> Self:
        """With what is to be said where the replayed groups have other rates than the saved ones.

        Where the list `key` of a state has such a rate, too, the scheduler is not what it was taken for; else
        somebody else changed it, which is noted.
        """
        found = self
        for at, (old, new) in enumerate(zip(self.saved_groups, replayed, strict=True)):
            saved, given = old["lr"], new["lr"]
            first = old.get("initial_lr")
            floor = 1e-9 * abs(first) if isinstance(first, int | float) else 0
            if math.isclose(given, saved, rel_tol=1e-6, abs_tol=1e-15 + floor):
                continue
            lists = (s[key] for s in self.saved_states if isinstance(s.get(key), list | tuple))
            own = [each[at] for each in lists if len(each) > at]
            if any(isinstance(each, int | float) and math.isclose(each, saved, rel_tol=1e-6) for each in own):
                return replace(found, explained=False, contradiction=(saved, given))
            of = f" of group {at}" if at else ""
            found = replace(found, explained=False).with_notes(
                f"the saved learning rate{of} is {saved:.6g}, where {by} {given:.6g} after {self.count} "
                "steps: something else changed it, or these are another run's; a rebased one follows them"
            )
        return found

    def with_notes(self, *notes: str) -> Self:
        """Also these notes, each once."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))


def rates(machine: Machine, n: int) -> Iterator[float]:
    """The learning rates of group 0 for the next n units."""
    for done in range(n):
        if done:
            advance(machine, 1)
        yield _number(machine.groups[0]["lr"])


def advance(machine: Machine, n: int) -> None:
    """Steps, and a check of what they led to."""
    with computing():
        for _ in range(n):
            machine.step()
    for group in machine.groups:
        _number(group["lr"])


@contextmanager
def computing() -> Iterator[None]:
    """Turns arithmetic that a state's values make impossible into an error of the file's."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise damaged(f"its values cannot be computed with: {error}") from error


def _number(lr: object) -> float:
    if isinstance(lr, complex) or not isinstance(lr, (int, float)):
        raise damaged(f"its constants give a learning rate of {lr!r}")
    return lr


def too_long(count: int) -> bool:
    """Whether replaying so many steps is out of the question."""
    return count > REPLAY


def scaled_group(group: State, factor: float) -> State:
    """A param_group with its learning rates times `factor`."""
    rates = ("lr", *ABSOLUTE)
    return {k: v * factor if k in rates and type(v) in (int, float) else v for k, v in group.items()}


# --- lengths ------------------------------------------------------------------------------------------


def plain(value: Fraction) -> str:
    """A fraction for people: 3.5, 130/3."""
    if value.denominator == 1:
        return str(value.numerator)
    short = float(value)
    return f"{short:g}" if Fraction(f"{short:g}") == value else f"{value} ({short:.4g})"


def rescaled(value: int | float, exact: Fraction, *, least: int = 1) -> int | float:
    """The new length with the type of the old one: whole numbers are rounded, other floats are not."""
    if isinstance(value, float):
        return (
            float(max(Fraction(least), exact))
            if not value.is_integer()
            else float(max(least, nearest(exact)))
        )
    return max(least, nearest(exact))


def rounding(what: str, value: int | float, exact: Fraction, found: int | float, effect: str) -> list[str]:
    """A note where a length had to be rounded; `effect` holds {off}, the difference in units, and {way}."""
    off = Fraction(found) - exact
    if not off:
        return []
    text = effect.format(off=plain(abs(off)), way="late" if off > 0 else "early")
    return [f"{what} {value} becomes {plain(exact)}, rounded to {plain(Fraction(found))}: {text}"]


# --- reading plain values -----------------------------------------------------------------------------


def damaged(message: str, where: str = "") -> UsageError:
    """A saved schedule whose values cannot be."""
    return UsageError(
        "schedule-damaged",
        f"the saved schedule is damaged: {message}",
        where=where,
        why="its learning rates cannot be computed",
        hint="use an older checkpoint, or build the scheduler anew",
    )


def whole(state: Mapping[str, Any], key: str, *, least: int = 0, most: int = 10**15, where: str = "") -> int:
    """An int of a state; bool is none."""
    value = state.get(key)
    if type(value) is not int or not least <= value <= most:
        raise damaged(f"{key} is {value!r}, not a whole number of at least {least}", where)
    return value


def real(state: Mapping[str, Any], key: str, *, least: float = -math.inf, where: str = "") -> int | float:
    """A finite int or float of a state."""
    value: Any = state.get(key)
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= 1e15:
        raise damaged(
            f"{key} is {value!r}, not a number" + (f" of at least {least:g}" * (least > -1e9)), where
        )
    number: int | float = value
    return number


def reals(state: Mapping[str, Any], key: str, count: int, *, where: str = "") -> list[Any]:
    """A list of `count` finite numbers."""
    value = state.get(key)
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise damaged(f"{key} is not a list of {count} numbers, one for each param_group", where)
    for i, _ in enumerate(value):
        real({f"{key}[{i}]": value[i]}, f"{key}[{i}]", where=where)
    return list(value)
