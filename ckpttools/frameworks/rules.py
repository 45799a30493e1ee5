"""What another setting does to a resumed run, in three classes, and what is known of a framework for it.

    safe         nothing of the saved state is lost, or the setting has no part in it
    careful      it loads and goes on, but not as before, or that cannot be told: a person should read why
    impossible   it does not load, or it loads something wrong

Rules were seen in runs of the libraries, and in their sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Literal

from msgspec import Struct

from ckpttools.location import Location

Class = Literal["safe", "careful", "impossible"]
SAFE: Class = "safe"
CAREFUL: Class = "careful"
IMPOSSIBLE: Class = "impossible"
CLASSES: tuple[Class, ...] = (SAFE, CAREFUL, IMPOSSIBLE)


def worst(classes: Iterable[Class]) -> Class:
    """The worst of some classes; safe for none.

    >>> worst(["safe", "careful"])
    'careful'
    """
    return max(classes, key=CLASSES.index, default=SAFE)


class About(Enum):
    """What a difference is about: a line of the check-list."""

    BATCH = "effective batch"
    ENGINE = "ranks, stage and dtype"
    SCHEDULE = "schedule"
    MODEL = "model"
    OPTIMIZER = "optimizer"
    DATA = "data order"
    LENGTH = "length"
    CHOICE = "newest"
    STATE = "consistent"
    SETTING = "other settings"


class Rule(Struct, frozen=True, kw_only=True):
    """What a framework does with another batch, and where the schedule's constants come from.

    `saved` says that they come from the checkpoint; `strict` that names are compared while loading; `prefix`
    that DDP's `module.` is removed before; `needs_optimizer` that weights alone are refused; `recounts` that
    a resume finds its place by the number of updates of the new batch; `apart` that the optimizer lies in a
    file of its own; `anew` that a resume within an epoch begins that epoch anew and counts on, so that a run
    of epochs ends with its epochs; `looks_after` that it looks only after an update whether all are made, so
    that a finished run, resumed within its last epoch, makes another. `equal` are counters that are the same
    in every save.
    """

    batch: str
    constants: str
    saved: bool = True
    strict: bool = True
    prefix: bool = True
    needs_optimizer: bool = False
    recounts: bool = False
    apart: bool = False
    anew: bool = False
    looks_after: bool = False
    equal: tuple[str, ...] = ()


class Setting(Struct, frozen=True, kw_only=True):
    """Settings of a framework's configuration, by a pattern of their paths, and what another value does."""

    pattern: str
    about: About = About.SETTING
    cls: Class
    why: str


class Lack(Struct, frozen=True, kw_only=True):
    """A file that a resume needs and that is not there, or a mark that the save was not finished."""

    about: About
    setting: str
    cls: Class
    why: str
    hint: str = ""


class AutoResume(Struct, frozen=True, kw_only=True):
    """What one framework's own rule would take in a folder; `path` is None where it finds nothing."""

    framework: str
    path: Location | None
    why: str
    problem: str = ""
    found: tuple[str, ...] = ()
