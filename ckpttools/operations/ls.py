"""The checkpoints of a run or of a tree of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

from msgspec import Struct

from ckpttools import checks, runs
from ckpttools.checks import Verdict, refused
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.findings import ERROR
from ckpttools.formats.files import DANGEROUS
from ckpttools.location import Location
from ckpttools.operations.writing import Bar
from ckpttools.runs import needs, pins
from ckpttools.runs.choose import Choice
from ckpttools.runs.find import Entry
from ckpttools.runs.kinds import Kind, kind
from ckpttools.runs.retain import best_of
from ckpttools.stores.files import named
from ckpttools.stores.links import resolved
from ckpttools.stores.once import once

LATEST, BEST, PINNED, WEIGHTS = "latest", "best", "pinned", "weights only"
DAMAGED, BAD, GOOD, UNKNOWN = "damaged (headers)", "damaged", "verified", "not checked"
RUNS = "would run code"
WRONG = frozenset((DAMAGED, BAD, RUNS))
ORDERS: dict[str, Callable[[Entry], object]] = {
    "time": lambda entry: -entry.time,
    "size": lambda entry: -entry.nbytes,
    "name": lambda entry: entry.path.name,
}
SORTS = ("progress", *ORDERS)


class Listed(Struct, frozen=True, kw_only=True):
    """A checkpoint and what is to be known of it. `why` tells what is damaged, or why it is pinned."""

    entry: Entry
    kind: Kind | None
    marks: tuple[str, ...]
    why: tuple[str, ...] = ()


class Run(Struct, frozen=True, kw_only=True):
    """The checkpoints of a run. `notes` say where times, names or pointers disagree with the order."""

    path: Location
    checkpoints: tuple[Listed, ...]
    latest: Location | None
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing damaged was seen, and nothing that would run code."""
        return self.latest is not None and not any(WRONG & set(each.marks) for each in self.checkpoints)


def ls(
    folder: str | Location,
    *,
    sort: str = "progress",
    verify: bool = False,
    workers: int = 0,
    bar: Bar | None = None,
    found: list[list[Entry]] | None = None,
) -> tuple[Run, ...]:
    """Every checkpoint below a folder by run, the furthest first, as far as their headers say.

    `sort` is one of SORTS; with `verify` every byte is read. `found` are the
    runs, where they were looked for already. Raises UsageError where there is none.

    >>> (run,) = ls("fixtures/hf-trainer/plain")
    >>> [(each.entry.path.name, each.kind, each.entry.state.step, each.marks) for each in run.checkpoints]
    [('checkpoint-4', 'step', 4, ('latest',)), ('checkpoint-2', 'step', 2, ())]
    """
    folder = named(folder)
    if sort not in SORTS:
        raise UsageError(
            "bad-usage",
            f"{sort!r} is no order",
            where="--sort",
            why="these are known of every checkpoint",
            hint=f"one of {', '.join(SORTS)}",
        )
    found = runs.runs(folder) if found is None else found
    if not found:
        raise runs.nothing(folder)
    verdict = (lambda path: _verdict(path, workers, bar)) if verify else None
    with nullcontext() if verify else once():
        return tuple(
            _run(entries, folder if len(found) == 1 else entries[0].run, folder, sort, verdict)
            for entries in found
        )


def _run(
    found: list[Entry], at: Location, top: Location, sort: str, verify: Callable[[Location], Verdict] | None
) -> Run:
    notes: list[str] = []
    chosen: Choice | None = None
    try:
        chosen = runs.choice([found], at)
        notes += chosen.notes
    except CkptError as error:
        notes.append(f"{error.message} [{error.id}]")
    named = needs.stated_best(found)
    best = None if named else best_of(found)
    latest = resolved(chosen.path) if chosen is not None else None
    listed: list[Listed] = []
    for entry in _sorted(found, sort):
        marks, why = [], []
        if latest is not None and latest == resolved(entry.path):
            marks.append(LATEST)
        if kind(entry) == "best" or entry is best or any(needs.names(name, entry.path) for name in named):
            marks.append(BEST)
        pin = pins.above(entry.path, top)
        if pin is not None:
            marks.append(PINNED)
            why.append(str(pin))
        if entry.resumes is False:
            marks.append(WEIGHTS)
        for mark, reason in _state(entry, verify):
            marks.append(mark)
            why += [reason] if reason else []
        listed.append(Listed(entry=entry, kind=kind(entry), marks=tuple(marks), why=tuple(why)))
    if latest is not None and not any(LATEST in each.marks for each in listed):
        notes.append(f"a resume would take {escape(chosen.path if chosen else latest)}, which is not listed")
    return Run(
        path=found[0].run,
        checkpoints=tuple(listed),
        latest=chosen.path if chosen is not None else None,
        notes=tuple(notes),
    )


def _state(entry: Entry, verify: Callable[[Location], Verdict] | None) -> Iterator[tuple[str, str]]:
    """Whether it is whole, as far as that was looked at, and what is wrong."""
    problem = entry.problem
    if verify is not None:
        verdict = verify(entry.path)
        bad = next((f for f in verdict.findings if f.severity == ERROR), None)
        mark = GOOD if verdict.ok else BAD if verdict.exit_code == 1 else UNKNOWN
        mark = RUNS if bad is not None and bad.id == DANGEROUS else mark
        yield mark, f"{bad.message} [{bad.id}]" if bad is not None else ""
    elif problem is not None:
        mark = RUNS if problem.id == DANGEROUS else DAMAGED if problem.exit_code == 1 else UNKNOWN
        yield mark, f"{problem.message} [{problem.id}]"


def _verdict(path: Location, workers: int, bar: Bar | None) -> Verdict:
    shown: checks.Bar | None = (lambda nbytes: bar(nbytes, path.name)) if bar is not None else None
    try:
        return checks.verify(path, workers=workers, bar=shown)
    except CkptError as error:
        return refused(path, error)


def _sorted(found: list[Entry], sort: str) -> list[Entry]:
    return list(found) if sort == "progress" else sorted(found, key=ORDERS[sort])  # type: ignore[arg-type]
