"""What folders hold and where links lead, looked up once: for a look at many checkpoints.

A listing of a thousand asks for the names in each folder again and again, of every format and framework.
Within `once` the first answer holds, as if all had been asked at one moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

from ckpttools.location import Location

P = TypeVar("P", bound=Location)
T = TypeVar("T")
_answers: ContextVar[dict[object, Any] | None] = ContextVar("answers", default=None)


@contextmanager
def once() -> Iterator[None]:
    """Answers are kept meanwhile; in a scope within another, by the outer one."""
    token = _answers.set({} if _answers.get() is None else _answers.get())
    try:
        yield
    finally:
        _answers.reset(token)


@contextmanager
def anew() -> Iterator[None]:
    """Nothing is kept meanwhile, and no kept answer taken: for a look at what may have changed since."""
    token = _answers.set(None)
    try:
        yield
    finally:
        _answers.reset(token)


def kept(look: Callable[[P], T]) -> Callable[[P], T]:
    """A function of a place whose answers `once` keeps. An error is no answer."""

    @wraps(look)
    def asked(place: P) -> T:
        answers = _answers.get()
        if answers is None:
            return look(place)
        key = look, place
        if key not in answers:
            answers[key] = look(place)
        found: T = answers[key]
        return found

    return asked


def is_kept() -> bool:
    """Whether answers are kept at the moment."""
    return _answers.get() is not None
