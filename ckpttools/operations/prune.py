"""Removing old checkpoints: a plan of what goes and why the rest stays, then its execution.

Whatever ends the program in between leaves no half checkpoint (execute.removing), and the next prune deletes
the rest. A manifest beside a single file goes before the file: a manifest without its file would describe
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath

from msgspec import Struct, field
from msgspec.structs import replace

from ckpttools import checks, manifest, runs
from ckpttools.checks import Verdict
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.execute.removing import delete, freed, remove_whole
from ckpttools.location import Location, below
from ckpttools.operations import slim as slimming
from ckpttools.operations.replacing import holding, somebodys
from ckpttools.operations.slim import Slim
from ckpttools.operations.writing import Bar
from ckpttools.runs import needs, pins
from ckpttools.runs.find import Entry
from ckpttools.runs.kinds import is_counted
from ckpttools.runs.retain import Decision, Policy, decide, require_best, states_best
from ckpttools.stores.files import is_file, is_folder, is_link, local, size_of, small_text, walk
from ckpttools.stores.links import resolved

CARD, CARD_NBYTES = "README.md", 1 << 20


class Pruning(Struct, frozen=True, kw_only=True):
    """What a prune removes, or removed. `nbytes` is what that frees: a file with another hard link frees
    nothing. `left` is what an interrupted prune left, which goes as well. `slimmed` maps what goes to the
    folder that keeps its weights. `verified`: every byte of what stays was read."""

    folder: Path
    runs: tuple[tuple[Path, tuple[Decision, ...]], ...]
    nbytes: int
    verified: bool
    left: tuple[Path, ...] = ()
    slimmed: Mapping[Path, Slim] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def removed(self) -> tuple[Entry, ...]:
        """Oldest first, run by run."""
        return tuple(d.entry for _, decisions in self.runs for d in reversed(decisions) if d.goes)

    @property
    def kept(self) -> tuple[Decision, ...]:
        return tuple(d for _, decisions in self.runs for d in decisions if not d.goes)


def prune(
    folder: str | Path,
    *,
    keep_last: int | None = None,
    per_kind: bool = False,
    keep_best: str | None = None,
    keep_every: int | None = None,
    keep_within: float | None = None,
    slim: bool = False,
    verified: bool = False,
    dry_run: bool = False,
    workers: int = 0,
    bar: Bar | None = None,
) -> Pruning:
    """Remove the old checkpoints of each run below a folder; the headers of what stays are checked first.

    `keep_last` counts good ones only. `keep_best` is a metric ("val_loss", "accuracy:max"), "" the validation
    loss; `keep_every` a number of steps; `keep_within` seconds. With `verified` every byte of what stays is
    read; with `slim` the weights of what goes are kept, in weights-of-NAME beside it. The newest good one,
    the one written last, the best, and what is pinned, named by a pointer or needed by something else stay
    always. Raises UsageError where nothing says what to keep, or that cannot be told.

    >>> plan = prune("fixtures/hf-trainer/plain", keep_last=1, dry_run=True)
    >>> [entry.path.name for entry in plan.removed], plan.kept[0].reasons
    (['checkpoint-2'], ('one of the last 1',))
    """
    policy = Policy(last=keep_last, per_kind=per_kind, best=keep_best, every=keep_every, within=keep_within)
    plan = plan_of(Path(folder), policy, slim=slim, verified=verified, workers=workers, bar=bar)
    if not dry_run:
        carry_out(plan, workers=workers, bar=bar)
    return plan


def plan_of(
    folder: Path,
    policy: Policy,
    *,
    slim: bool = False,
    verified: bool = False,
    workers: int = 0,
    bar: Bar | None = None,
    found: list[list[Entry]] | None = None,
) -> Pruning:
    """Decide, and touch nothing. `found` are the runs to look after, newest first each, where it is not
    all of those below. Raises CkptError as `prune` does.
    """
    around = needs.around(folder)
    left = around.left
    if found is None:
        found = runs.grouped(folder)
    else:
        found = [run for run in found if run]
        left = tuple(path for path in left if any(path.parent == run[0].run for run in found))
    if not found and not left:
        raise runs.nothing(folder)
    require_best((entry for run in found for entry in run), policy)
    verify = partial(_good, verified=verified, workers=workers, bar=bar)
    everything = [local(entry.path) for run in found for entry in run]
    decided: list[tuple[Path, tuple[Decision, ...]]] = []
    notes: list[str] = []
    slimmed: dict[Path, Slim] = {}
    for run in found:
        best = needs.stated_best(run)

        def held(entry: Entry, run: list[Entry] = run, best: dict[str, str] = best) -> Iterator[str]:
            yield from _held(entry, local(run[0].run), folder, around, everything, local(run[0].path))
            for path, metric in best.items():
                if needs.names(path, entry.path):
                    yield f"its framework names it as the best by {escape(metric)}"

        decisions = decide(run, policy, good=verify, held=held, now=time.time())
        if not any(d.good for d in decisions):
            notes.append(f"{escape(run[0].run)}: nothing is removed, no checkpoint of it is known to be good")
            decisions = [_stays(d, "no checkpoint of the run is known to be good") for d in decisions]
        unknown = policy.best is not None and not any(states_best(entry, policy) for entry in run)
        if unknown and any(d.goes for d in decisions):
            notes.append(f"{escape(run[0].run)}: nothing is removed, none of it states how good it is")
            decisions = [_stays(d, "it may be the best: none of the run states it") for d in decisions]
        if slim:
            decisions = [_slimmed(decision, slimmed) for decision in decisions]
        if not verified:  # headers that are whole say nothing of the rest
            decisions = [replace(d, good=None) if d.good else d for d in decisions]
        decided.append((local(run[0].run), tuple(decisions)))
    gone = [local(d.entry.path) for _, decisions in decided for d in decisions if d.goes]
    return Pruning(
        folder=folder,
        runs=tuple(decided),
        nbytes=freed(file for path in (*gone, *left) for file in _tree(path))
        - sum(each.nbytes for each in slimmed.values()),
        verified=verified,
        left=left,
        slimmed=slimmed,
        notes=tuple(notes),
    )


def _slimmed(decision: Decision, slimmed: dict[Path, Slim]) -> Decision:
    """The decision, with what keeps the weights noted; it stays where they cannot be kept."""
    if not decision.goes:
        return decision
    path = local(decision.entry.path)
    if decision.entry.resumes is False:
        return _stays(decision, "it holds weights alone")
    try:
        planned = slimming.planned(path)
    except CkptError as error:
        return _stays(decision, f"its weights cannot be kept: {error.message}")
    if any(each.destination == planned.destination for each in slimmed.values()):
        name = escape(planned.destination.name)
        return _stays(decision, f"its weights cannot be kept: {name} is to be another's")
    slimmed[path] = planned
    return decision


def _stays(decision: Decision, why: str) -> Decision:
    return Decision(entry=decision.entry, reasons=decision.reasons or (why,), good=decision.good)


def _good(entry: Entry, *, verified: bool, workers: int, bar: Bar | None) -> bool | None:
    label = entry.path.name
    shown: checks.Bar | None = (lambda nbytes: bar(nbytes, label)) if bar is not None else None
    try:
        verdict: Verdict = checks.verify(entry.path, quick=not verified, workers=workers, bar=shown)
    except CkptError as error:
        return False if error.exit_code == 1 else None
    return True if verdict.ok else False if verdict.exit_code == 1 else None


def _held(
    entry: Entry, run: Path, folder: Path, around: needs.Around, everything: list[Path], newest: Path
) -> Iterator[str]:
    """Why it may not go, whatever the policy says. `newest` of its run always stays."""
    path = local(entry.path)
    whole = resolved(path)
    pin = pins.above(path, folder)
    if pin is not None:
        yield str(pin)
    elif any(whole in place.parents for place in map(resolved, around.pinned)):
        yield "pinned: something in it"
    try:
        for place, text in needs.pointers(run, folder):
            if needs.names(text, path):
                yield f"{place.name} names it"
    except CkptError as error:
        yield f"what a pointer names is not known: {error.message}"
    why = needs.needed(path, around)
    if why is not None:
        yield why
    if resolved(path) == resolved(folder) or any(path in other.parents for other in everything):
        yield "other checkpoints are in it, or it is the folder itself"
    if whole in (here := resolved(Path()), *here.parents):
        yield "the working directory is in it"
    if is_folder(path) and not is_link(path):
        try:
            own = [each for each in somebodys(path) if not _is_card(each, newest / below(each, path))]
            own += sorted(place for place in holding(path) if _is_anothers(below(place, path), newest))
        except CkptError as error:
            yield error.message
        else:
            if own:
                yield f"it holds what is somebody's own: {escape(below(own[0], path))}"


def _is_anothers(place: str, newest: Path) -> bool:
    """Whether a folder with weights within a checkpoint is none that its run writes again and again, as the
    newest has it, but another run's, or one of its checkpoints."""
    inside = place not in ("", ".")
    return inside and (not is_folder(newest / place) or any(map(is_counted, PurePath(place).parts)))


def _is_card(path: Location, newest: Path) -> bool:
    """Whether it is a model card as PEFT writes it into each save: the newest one has the same."""
    if path.name != CARD or path == newest or not is_file(newest) or size_of(path) != size_of(newest):
        return False
    return small_text(path, CARD_NBYTES) == small_text(newest, CARD_NBYTES)


def _tree(path: Path) -> Iterator[Path]:
    if is_link(path) or not is_folder(path):
        yield path
        place = local(manifest.beside(path))
        if is_file(place):
            yield place
        return
    yield from (local(place) for place, entry in walk(path) if not is_folder(entry))


def carry_out(
    plan: Pruning,
    *,
    workers: int = 0,
    bar: Bar | None = None,
) -> None:
    """Remove what the plan says, its weights kept first where it says so. Raises CkptError where weights
    cannot be kept, UsageError where one of them is no longer what the plan saw, or the system refuses; what
    was removed before stays removed.
    """
    for path in plan.left:
        with _removing(path):
            delete(path)
    for run, decisions in plan.runs:
        for decision in reversed(decisions):
            if decision.goes:
                kept = plan.slimmed.get(local(decision.entry.path))
                if kept is not None:
                    _refuse_changed(decision.entry, run, plan.folder)
                    slimming.carry_out(local(decision.entry.path), kept, workers=workers, bar=bar)
                _remove(decision.entry, run, plan.folder)


def _remove(entry: Entry, run: Path, folder: Path) -> None:
    path = local(entry.path)
    _refuse_changed(entry, run, folder)
    with _removing(path):
        remove_whole(path, None if is_folder(path) else local(manifest.beside(path)))


def _refuse_changed(entry: Entry, run: Path, folder: Path) -> None:
    """Raises UsageError where somebody wrote, pinned or named it since the plan was made."""
    now = runs.extent(entry.path)
    try:
        named = any(needs.names(text, entry.path) for _, text in needs.pointers(run, folder))
    except CkptError:
        named = True
    if now != (entry.time, entry.nbytes) or named or pins.above(entry.path, folder) is not None:
        raise UsageError(
            "prune-changed",
            "the checkpoint changed after the plan was made",
            where=entry.path,
            why="it was written, pinned or named by a pointer meanwhile; it was left",
            hint="run ckpt prune again",
        )


@contextmanager
def _removing(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UsageError(
            "prune-changed",
            "the checkpoint went while it was to be removed",
            where=path,
            why="something else removes here as well; what was removed before stays removed",
            hint="run ckpt prune again",
        ) from None
    except OSError as error:
        raise UsageError(
            "not-removed",
            f"the system refused to remove it: {escape(error.strerror)}",
            where=path,
            why="what was removed before stays removed; no checkpoint is left in half",
            hint="mend the permissions and run ckpt prune again: it goes on where this one stopped",
        ) from None
