"""The newest checkpoint of a run, why it is the newest, and what says otherwise.

Frameworks leave a pointer beside the checkpoints: `last_checkpoint` (MMEngine and `ckpt train`: a path or a
name) and `latest` (DeepSpeed: a tag). A resume follows it, so it wins; where another checkpoint is further
on, that is said. A pointer may be stale after a copy: its last path component is then looked for beside it.
Where it is not, the path itself counts, as it does for MMEngine. Without a pointer it is the one that is
furthest on and holds what a resume needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.checks.verdict import Verdict
from ckpttools.errors import CkptError, Unsupported, UsageError, escape
from ckpttools.findings import ERROR
from ckpttools.frameworks import POINTERS
from ckpttools.location import Location, below
from ckpttools.numbered import numbers, shape
from ckpttools.runs.find import Entry, common, runs
from ckpttools.stores.files import entries, exists, is_file, is_link, small_text
from ckpttools.stores.links import absolute, resolved


class Choice(Struct, frozen=True, kw_only=True):
    """The checkpoint that was chosen and why; which newer ones were passed over, each with the reason.

    `notes` say where modification time, names, counters and pointers disagree.
    """

    path: Location
    why: str
    passed_over: tuple[tuple[Location, str], ...] = ()
    notes: tuple[str, ...] = ()


def newest(folder: Location) -> Choice:
    """The checkpoint that a resume would take, in a run's folder or anywhere below.

    Raises CkptError where a pointer leads nowhere, UsageError where there is no checkpoint.
    """
    return choice(runs(folder), folder)


def choice(found: list[list[Entry]], folder: Location) -> Choice:
    """The same for a folder whose runs are known. Raises as `newest` does."""
    run = found[0][0].run if found else folder
    among = _among(found, folder)
    if found and found[0][0].path == folder:
        notes = tuple(_unfit(found[0], folder))
        return replace(_furthest(found[0]), why="the folder is itself a checkpoint", notes=notes)
    for place in dict.fromkeys((folder, run)):
        for name in POINTERS:
            if (named := _named(place, name, found[0] if found else [])) is not None:
                notes = (*among, *_behind(named.path, found[0] if found else []), *_pointers(place))
                return replace(named, notes=notes)
    if not found:
        raise nothing(folder)
    taken = _furthest(found[0])
    return replace(taken, notes=(*among, *_disagreements(found[0]), *_unfit(found[0], taken.path)))


def newest_verified(
    folder: Location, verify: Callable[[Location], Verdict], found: list[list[Entry]] | None = None
) -> Choice:
    """The newest checkpoint that passes `verify`, and what is wrong with the newer ones.

    `found` are the runs to look at, where they are known.
    """
    found = runs(folder) if found is None else found
    if not found:
        raise nothing(folder)
    passed: list[tuple[Location, str]] = []
    candidates = found[0] if any(_could(entry) for entry in found[0]) else []
    for entry in found[0]:
        if candidates and entry.problem is None and entry.resumes is False:
            passed.append((entry.path, NO_STATE))
            continue
        problem = _problem(entry.path, verify)
        if problem is None:
            at = f" ({entry.at})" if entry.at else ""
            return Choice(
                path=entry.path,
                why=f"the newest of {len(found[0])} that passes every check{at}",
                passed_over=tuple(passed),
                notes=(*_among(found, folder), *_disagreements(found[0])),
            )
        passed.append((entry.path, problem))
    raise CkptError(
        "none-verified",
        f"none of the {len(found[0])} checkpoints passes verify",
        where=found[0][0].run,
        why="\n".join(f"{path.name}: {problem}" for path, problem in passed[:10]),
        hint="ckpt verify each of them, and mend the one with the least damage",
    )


NO_STATE = "it holds no optimizer state: weights alone"


def _could(entry: Entry) -> bool:
    """Whether a resume could take it, for all that its headers say."""
    return entry.problem is None and entry.resumes is not False


def _furthest(found: list[Entry]) -> Choice:
    """The first that a resume could take; else the first that can be read; else the first."""
    taken = next(filter(_could, found), None)
    if taken is None:
        taken = next((entry for entry in found if entry.problem is None), found[0])
    newer = found[: found.index(taken)]
    counter = common(found)
    by = f"{counter} {taken.count(counter)}" if counter and taken.count(counter) is not None else ""
    by = by or ("its name" if _alike(found) else "modification time")
    return Choice(
        path=taken.path,
        why=f"no pointer file; the newest of {len(found)} by {by}",
        passed_over=tuple((entry.path, _reason(entry)) for entry in newer),
    )


def _reason(entry: Entry) -> str:
    return f"{entry.problem.message} [{entry.problem.id}]" if entry.problem is not None else NO_STATE


def _alike(found: list[Entry]) -> bool:
    return len({shape(entry.path.name) for entry in found}) == 1


def _disagreements(found: list[Entry]) -> Iterator[str]:
    """Where time or names give another answer than the order of the checkpoints, newest first."""
    could = [entry for entry in found if _could(entry)]
    if len(could) < 2:
        return
    taken = could[0]
    of = f"{escape(taken.path.name)} is at {taken.at or '?'}"
    by_time = max(could, key=lambda entry: entry.time)
    if by_time.time > taken.time:
        yield (
            f"by modification time {escape(by_time.path.name)} ({by_time.at or '?'}) is the newest, but "
            f"{of}: a framework that goes by time takes the former"
        )
    alike = [entry for entry in could if shape(entry.path.name) == shape(taken.path.name)]
    by_name = max(alike, key=lambda entry: numbers(entry.path.name))
    if numbers(by_name.path.name) > numbers(taken.path.name) and not _at_one(by_name, taken):
        yield (
            f"by the number in its name {escape(by_name.path.name)} ({by_name.at or '?'}) is the newest, but "
            f"{of}: a framework that goes by names takes the former"
        )
    if common(found) is None and len({shape(entry.path.name) for entry in could}) > 1:
        yield "they state no counter in common: compared by their names and modification times"


def _behind(path: Location, found: list[Entry]) -> Iterator[str]:
    """What a pointer's reader should know: it names one that is not the furthest, or cannot resume."""
    named = next((entry for entry in found if entry.path == path), None)
    if named is None:
        return
    if isinstance(named.problem, Unsupported):
        yield f"whether what the pointer names can be resumed from is not known: {_reason(named)}"
    elif not _could(named):
        yield f"what the pointer names cannot be resumed from: {_reason(named)}; ckpt latest --verified"
    further = next(filter(_could, found), named)
    if _at_one(further, named):
        return
    if further is not named and found.index(further) < found.index(named):
        yield (
            f"the pointer names {named.at or escape(path.name)}, but {escape(further.path.name)} is newer"
            + (f" ({further.at})" if further.at else "")
        )


def _at_one(one: Entry, other: Entry) -> bool:
    """Whether both say that they are equally far: then neither is newer for a resume."""
    return bool(one.at) and one.at == other.at


def _unfit(found: list[Entry], path: Location) -> Iterator[str]:
    """That the one that is furthest cannot be resumed from, where none can be."""
    for entry in found:
        if entry.path == path and isinstance(entry.problem, Unsupported):
            yield f"whether {escape(path.name)} can be resumed from is not known: {_reason(entry)}"
        elif entry.path == path and not _could(entry):
            yield f"{escape(path.name)} cannot be resumed from: {_reason(entry)}"


def _pointers(place: Location) -> Iterator[str]:
    """Two pointers that name different checkpoints."""
    names = {entry.name for entry in entries(place) if is_file(entry) and not is_link(entry)}
    if all(name in names for name in POINTERS):
        first, second = (PurePath(small_text(place / name, 4096).strip()).name for name in POINTERS)
        if first != second:
            yield f"{POINTERS[0]} names {escape(first)}, {POINTERS[1]} names {escape(second)}"


def _among(found: list[list[Entry]], folder: Location) -> tuple[str, ...]:
    """That several runs lie below, whose counters do not compare."""
    if len(found) < 2:
        return ()
    taken = found[0]
    last = max(found, key=lambda run: max(entry.time for entry in run))
    name = escape(below(taken[0].run, folder))
    notes = [f"{len(found)} runs are below; {name} is taken, the newest by "]
    if last is taken:
        notes[0] += "modification time"
    else:
        notes[0] += f"its name, though {escape(below(last[0].run, folder))} was written later"
    return tuple(notes)


def _problem(path: Location, verify: Callable[[Location], Verdict]) -> str | None:
    try:
        verdict = verify(path)
    except CkptError as error:
        return f"{error.message} [{error.id}]"
    bad = [finding for finding in verdict.findings if finding.severity == ERROR]
    if not bad:
        return None
    file = bad[0].file
    place = "" if file == str(path) else file.removeprefix(f"{path}/")
    said = " ".join(part for part in (place, bad[0].where) if part)
    return f"{said}{': ' * bool(said)}{bad[0].message} [{bad[0].id}]"


def nothing(folder: Location) -> CkptError:
    why = "neither a pointer file nor anything that looks like a checkpoint is in it or below"
    hint = "name the run's own folder, where its checkpoints lie"
    listed = entries(folder)
    if links := [entry.name for entry in listed if is_link(entry)]:
        why += f"; links that lead out of it are not followed: {', '.join(map(escape, links[:5]))}"
        hint = "name what the link leads to; files that are links are read with --follow-symlinks"
    if pointer := next((entry.name for entry in listed if entry.name in POINTERS), None):
        why = f"nothing in it or below looks like one; what {pointer} names lies elsewhere, or is gone"
        hint = f"ckpt latest {escape(folder)} says where"
    return UsageError("no-checkpoints", "the folder holds no checkpoints", where=folder, why=why, hint=hint)


def _named(place: Location, name: str, found: list[Entry]) -> Choice | None:
    """What a pointer names; people make links of that name, too, to the checkpoint itself."""
    entry = next((entry for entry in entries(place) if entry.name == name), None)
    if entry is None:
        return None
    if is_link(entry) and isinstance(place, Path):
        target = resolved(place / name)
        led = next((each.path for each in found if resolved(each.path) == target), None)
        if led is not None:
            return Choice(path=led, why=f"{name} is a link to {escape(led.name)}")
    return _pointed(place, name) if is_file(entry) else None


def _pointed(folder: Location, name: str) -> Choice:
    text = small_text(folder / name, 4096).strip()
    for path, how in _readings(folder, text):
        if exists(path):
            return Choice(path=path, why=f"{name} names {escape(text)}{how}")
    raise CkptError(
        "pointer-dangling",
        f"{name} names {escape(text)}, which is not there",
        where=folder / name,
        why="a resume from this folder would fail, or start anew",
        hint="ckpt latest --verified takes the newest good one",
    )


def _readings(folder: Location, text: str) -> Iterator[tuple[Location, str]]:
    """What a pointer's text can mean: a name beside it, a path from there (DeepSpeed's tags may be such), or
    a path whose last part lies beside it.
    """
    base, parts = PurePath(text).name, PurePath(text).parts
    if len(parts) > 1 and not PurePath(text).is_absolute() and ".." not in parts and text.isprintable():
        yield folder / "/".join(parts), ""
    if base and base not in (".", "..") and base.isprintable():
        in_place = text == base or PurePath(text) == absolute(folder) / base
        moved = "" if in_place else ", found beside the pointer"
        yield folder / base, moved
        if PurePath(text).is_absolute() and text.isprintable() and isinstance(folder, Path):
            yield Path(text), ", which lies elsewhere"  # MMEngine's out_dir
