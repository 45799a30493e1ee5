"""The checkpoint of a run that a resume would take."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ckpttools import runs
from ckpttools.checks import Verdict, verify
from ckpttools.location import Location
from ckpttools.operations.writing import Bar
from ckpttools.progress import Progress
from ckpttools.stores.files import named


def latest(
    folder: str | Location, *, verified: bool = False, workers: int = 0, bar: Bar | None = None
) -> runs.Choice:
    """The newest checkpoint of a run, why it is the newest, and what contradicts it.

    With `verified` every byte of each is checked, newest first, until one is whole.

    >>> choice = latest("fixtures/hf-trainer/plain")
    >>> choice.path.name, choice.why
    ('checkpoint-4', 'no pointer file; the newest of 2 by step 4')
    """
    if not verified:
        return runs.newest(named(folder))

    def check(path: Location) -> Verdict:
        return verify(path, workers=workers, bar=_bar(bar, path.name))

    return runs.newest_verified(named(folder), check)


def _bar(bar: Bar | None, label: str) -> Callable[[int], AbstractContextManager[Progress | None]]:
    return (lambda nbytes: bar(nbytes, label)) if bar is not None else (lambda _: nullcontext())
