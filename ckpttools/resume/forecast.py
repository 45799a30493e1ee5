"""What a forecast says: each difference with its class, the framework's error, where training goes on."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, auto
from typing import Literal

from msgspec import Struct, field

from ckpttools.frameworks.rules import IMPOSSIBLE, SAFE, About, AutoResume, Class, worst
from ckpttools.location import Location

Problem = Literal["missing", "unexpected", "shape", "dtype"]  # missing in the checkpoint


class Moment(IntEnum):
    """The moments of a launch, in the order in which DeepSpeed comes to them (runtime/engine.py)."""

    CONFIG = auto()
    OPTIMIZER_NAME = auto()
    OPTIMIZER = auto()
    UNTESTED_OPTIMIZER = auto()
    DTYPES = auto()
    SCHEDULER = auto()
    UNIVERSAL = auto()
    FILES = auto()
    MODULE = auto()
    FROZEN = auto()
    WHOLE_OPTIMIZER = auto()  # stage 0: the optimizer lies in the model file
    SCHEDULE_STATE = auto()
    RANKS = auto()
    SHARDS = auto()
    ALIGNMENT = auto()
    OPTIMIZER_STATE = auto()
    DATA = auto()
    UPDATE = auto()

    @property
    def when(self) -> str:
        if self < Moment.FILES:
            return "while the engine is built"
        return "at the first update" if self is Moment.UPDATE else "while loading"


class Refusal(Struct, frozen=True, kw_only=True):
    """The error that the framework raises: its class and the beginning or core of its text.

    What is met first, by `moment`, is what the user sees.
    """

    moment: Moment
    error: str
    text: str


class Difference(Struct, frozen=True, kw_only=True):
    """One setting that is another in the new run. `refusal` is what the framework raises because of it."""

    about: About
    setting: str
    old: object = None
    new: object = None
    cls: Class
    why: str
    hint: str = ""
    refusal: Refusal | None = None


class Mismatch(Struct, frozen=True, kw_only=True):
    """A tensor of the checkpoint and of the new model that do not fit."""

    name: str
    problem: Problem
    saved: str
    wanted: str


class Overridden(Struct, frozen=True, kw_only=True):
    """A value of the new configuration that has no effect, because the checkpoint's is used."""

    setting: str
    saved: object = None  # the setting of the run that saved
    configured: object
    used: object
    why: str
    effect: str = ""  # what the new value does later, where it does something
    hint: str = ""


class Check(Struct, frozen=True, kw_only=True):
    """A line of the check-list: True, False, or None where it cannot be told."""

    about: About | str
    ok: bool | None
    text: str

    @property
    def name(self) -> str:
        return self.about.value if isinstance(self.about, About) else self.about


def check(about: About, good: str, differences: Iterable[Difference], *, known: bool = True) -> Check:
    """The line of the differences about one thing; `good` is its text where none of them matters.

    Without `known` nobody said what is to be compared, which is no yes.
    """
    own = [d for d in differences if d.about is about]
    cls = worst(d.cls for d in own)
    if cls == SAFE:
        return Check(about=about, ok=True if known else None, text=good)
    bad = next(d for d in own if d.cls == cls)
    change = "" if bad.old is None and bad.new is None else f"{_shown(bad.old)} -> {_shown(bad.new)}: "
    return Check(about=about, ok=False, text=f"{bad.setting}: {change}{bad.why}")


def _shown(value: object) -> str:
    return "nothing" if value is None else str(value)


class Rates(Struct, frozen=True, kw_only=True):
    """Learning rates per parameter group: of the first resumed update, and of the one after it.

    `next` is None where it is not forecast; `note` then says why.
    """

    first: tuple[float, ...] = ()
    next: tuple[float, ...] | None = None
    note: str = ""
    last: bool = False  # the run ends with the first update


class Forecast(Struct, frozen=True, kw_only=True):
    """Everything that is known before the job starts."""

    path: Location
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
        raised = [d.refusal for d in self.differences if d.refusal is not None]
        return min(raised, key=lambda refusal: refusal.moment, default=None)

    @property
    def verdict(self) -> Class:
        return IMPOSSIBLE if self.damaged else worst(d.cls for d in self.differences)

    @property
    def resumes(self) -> bool:
        return self.verdict != IMPOSSIBLE
