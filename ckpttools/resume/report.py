"""What a forecast says: each difference with its class, the framework's error, where training goes on.

Three classes:

    safe         nothing of the saved state is lost, or the setting has no part in it
    careful      it loads and goes on, but not as before: a person should read why
    impossible   it does not load, or it loads something wrong
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Class = Literal["safe", "careful", "impossible"]
SAFE: Class = "safe"
CAREFUL: Class = "careful"
IMPOSSIBLE: Class = "impossible"
_ORDER: tuple[Class, ...] = (SAFE, CAREFUL, IMPOSSIBLE)


def worst(classes: Iterable[Class]) -> Class:
    """The worst of some classes; safe for none.

    >>> worst(["safe", "careful"])
    'careful'
    """
    return max(classes, key=_ORDER.index, default=SAFE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The error that the framework raises: its class and the beginning or core of its text.

    `moment` orders refusals: what is met first is what the user sees.
    """

    moment: int
    error: str
    text: str

    @property
    def when(self) -> str:
        return next(name for limit, name in _WHEN if self.moment < limit)


# the moments of a launch, in the order in which DeepSpeed comes to them (runtime/engine.py)
CONFIG, OPTIMIZER, SCHEDULER = 10, 20, 30
FILES, MODULE, FROZEN, WHOLE_OPTIMIZER, SCHEDULE_STATE = 40, 50, 55, 60, 65
RANKS, SHARDS, ALIGNMENT, OPTIMIZER_STATE = 70, 75, 80, 85
UPDATE = 90
_WHEN = (
    (FILES, "while the engine is built"),
    (UPDATE, "while loading"),
    (UPDATE + 10, "at the first update"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One setting that is another in the new run. `refusal` is what the framework raises because of it."""

    setting: str
    old: object
    new: object
    cls: Class
    why: str
    hint: str = ""
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A tensor of the checkpoint and of the new model that do not fit."""

    name: str
    problem: str  # "missing" in the checkpoint, "unexpected" in it, "shape" or "dtype"
    saved: str
    wanted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overridden:
    """A value of the new configuration that has no effect, because the checkpoint's is used."""

    setting: str
    configured: object
    used: object
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A line of the check-list: True, False, or None where it cannot be told."""

    name: str
    ok: bool | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoResume:
    """What one framework's own rule would take in a folder; `path` is None where it finds nothing."""

    framework: str
    path: Path | None
    why: str
    problem: str = ""
    found: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Learning rates per parameter group: of the first resumed update, and of the one after it.

    `next` is None where it is not forecast; `note` then says why.
    """

    first: tuple[float, ...] = ()
    next: tuple[float, ...] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Everything that is known before the job starts."""

    path: Path
    format: str
    step: int | None = None
    epoch: int | float | None = None
    samples: int | None = None
    rates: Rates = field(default_factory=Rates)
    loads: tuple[str, ...] = ()  # what will be loaded, in words
    checks: tuple[Check, ...] = ()
    differences: tuple[Difference, ...] = ()
    tensors: tuple[Mismatch, ...] = ()
    overridden: tuple[Overridden, ...] = ()
    auto_resume: tuple[AutoResume, ...] = ()
    notes: tuple[str, ...] = ()
    damaged: bool = False

    @property
    def refusal(self) -> Refusal | None:
        """What the framework raises first; None where it raises nothing, which need not mean all is well."""
        found = [d.refusal for d in self.differences if d.refusal is not None]
        return min(found, key=lambda refusal: refusal.moment, default=None)

    @property
    def verdict(self) -> Class:
        return IMPOSSIBLE if self.damaged else worst(d.cls for d in self.differences)

    @property
    def resumes(self) -> bool:
        return self.verdict != IMPOSSIBLE
