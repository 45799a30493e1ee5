"""Every check: on one checkpoint, or on everything that a folder holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ckpttools import checks, runs
from ckpttools.checks import Verdict, refused
from ckpttools.checks.changing import changing
from ckpttools.checks.held import KEYS
from ckpttools.checks.verdict import Delivered
from ckpttools.errors import CkptError, UsageError
from ckpttools.formats import Folder, locate
from ckpttools.formats.locate import checkpoints, lost_parts
from ckpttools.frameworks import POINTERS
from ckpttools.location import Location
from ckpttools.numbered import numbers, shape
from ckpttools.operations.writing import Bar
from ckpttools.runs.find import paths
from ckpttools.stores.files import entries, exists, is_folder, is_link, local, named
from ckpttools.stores.links import absolute, within
from ckpttools.suggest import did_you_mean

if TYPE_CHECKING:
    from ckpttools.checks.contents import Passing
    from ckpttools.checks.subset import Subset
    from ckpttools.operations.verify_spread import Shared

TRIED = 5  # older checkpoints whose headers are read


def verify(
    path: str | Location,
    *,
    tag: str | None = None,
    quick: bool = False,
    require: Collection[str] = (),
    subset: str | None = None,
    workers: int = 0,
    key: str | None = None,
) -> Verdict:
    """Whether a checkpoint is whole: structure, checksums, completeness, and that its files belong together.

    Damage is in the verdict's findings. `quick` leaves the bytes of the tensors alone; `require` names what
    must be there (optimizer, scheduler, step, epoch, train_loss, val_loss); `subset` ("5%", "2/7") is the
    part of the bytes that is read. Raises UsageError where there is nothing that can be checked.

    >>> verdict = verify("fixtures/trainer/z2_bf16_2")
    >>> verdict.ok, verdict.format, verdict.state.step
    (True, 'zero2', 3)
    """
    part = part_of(subset)
    return checks.verify(
        named(path), tag, quick=quick, require=known(require), subset=part, workers=workers, key=key
    )


def part_of(subset: str | None) -> Subset | None:
    """Raises UsageError for what is neither P% nor N/T."""
    if subset is None:
        return None
    from ckpttools.checks.subset import Subset  # numpy: of no use to headers

    return Subset.parse(subset)


def known(require: Collection[str]) -> Collection[str]:
    """The keys that can be asked for. Raises UsageError for another."""
    for key in require:
        if key not in KEYS:
            raise UsageError(
                "bad-usage",
                f"{key!r} cannot be required",
                where="--require",
                why="it is not among what a checkpoint is looked through for",
                hint=f"{did_you_mean(key, KEYS)} what can be: {', '.join(KEYS)}".strip(),
            )
    return require


def members(path: str | Location, *, newest: bool = False) -> tuple[Location, ...]:
    """The checkpoints that a path means: itself, or all that a run or a tree of runs holds, newest first.

    `newest` is the one that a resume would take. Raises CkptError where a pointer leads nowhere.
    """
    path = named(path)
    if not is_folder(path):
        return (path,)
    if newest:
        return (runs.newest(path).path,)
    found = paths(path)
    if len(found) > 1:
        return tuple(entry.path for entry in runs.find(path))
    if found and found[0] != path:
        if not any(entry.name in POINTERS for entry in entries(path)):
            return found
        try:
            locate(path)
        except UsageError:
            return found
        except CkptError:
            return (path,)  # its own verdict says what is wrong
    return (path,)


def verify_each(
    paths: Sequence[Location],
    *,
    tag: str | None = None,
    newest: bool = False,
    quick: bool = False,
    write_manifest: bool = False,
    require: Collection[str] = (),
    subset: str | None = None,
    workers: int = 0,
    bar: Bar | None = None,
    key: str | None = None,
    passing: Passing | None = None,
) -> Iterator[Verdict]:
    """The verdicts on all that the paths mean; what cannot be checked is one of them, and raises alone.

    `write_manifest`: beside the files of each good one. Raises UsageError for what contradicts itself.
    """
    if subset is not None and (quick or write_manifest):
        other = "--quick" if quick else "--write-manifest"
        raise UsageError(
            "bad-usage",
            f"--subset and {other} cannot go together",
            where="--subset",
            why=f"a part of the bytes is read, and {other} {'reads none' if quick else 'needs all'}",
            hint="leave one out",
        )
    part, keys = part_of(subset), known(require)
    for path in paths:
        found = verify_all(
            path,
            tag=tag,
            newest=newest,
            quick=quick,
            describe=write_manifest,
            require=keys,
            subset=part,
            workers=workers,
            bar=bar,
            key=key,
            passing=passing,
        )
        for verdict in found if len(paths) == 1 else _caught(path, found):
            if verdict.manifest is not None and verdict.ok:
                from ckpttools.execute import small

                place, contents = verdict.manifest
                small.replace(local(place), contents, unseen=True)
            yield verdict


def _caught(path: Location, verdicts: Iterator[Verdict]) -> Iterator[Verdict]:
    """With the error that ends them as one of them."""
    try:
        yield from verdicts
    except CkptError as error:
        yield refused(path, error)


def shared(*, quick: bool, subset: str | None) -> Shared:
    """This process's part of what many verify. Raises UsageError where nothing is shared, or no launcher is
    there.
    """
    from ckpttools.launch import worker
    from ckpttools.operations.verify_spread import Shared

    if quick or subset is not None:
        raise UsageError(
            "bad-usage",
            f"--spread and {'--quick' if quick else '--subset'} cannot go together",
            where="--spread",
            why="it shares all bytes, and the other reads " + ("none" if quick else "a part"),
            hint="leave one out",
        )
    return Shared(worker())


def verify_all(
    path: str | Location,
    *,
    tag: str | None = None,
    newest: bool = False,
    quick: bool = False,
    describe: bool = False,
    require: Collection[str] = (),
    subset: Subset | None = None,
    workers: int = 0,
    bar: Bar | None = None,
    key: str | None = None,
    passing: Passing | None = None,
) -> Iterator[Verdict]:
    """The verdict on each checkpoint of a folder, newest first; one of several that cannot be checked has a
    verdict too. Raises UsageError where nothing can be checked.

    >>> [verdict.path.name for verdict in verify_all("fixtures/hf-trainer/plain")]
    ['checkpoint-4', 'checkpoint-2']
    """
    require = known(require)
    paths = members(path, newest=newest) if tag is None else (named(path),)
    for each in paths:
        shown = _labelled(bar, each.name if tag is None else "verify") if bar is not None else None
        try:
            yield checks.verify(
                each,
                tag,
                quick=quick,
                describe=describe,
                require=require,
                subset=subset,
                workers=workers,
                bar=shown,
                key=key,
                passing=passing,
            )
        except Delivered:
            continue
        except CkptError as error:
            if len(paths) == 1:
                raise
            gone = error.id == "not-found" and not is_link(each) and not exists(each)
            yield refused(each, changing(each) if gone else error)
    if len(paths) > 1:
        yield from _pointers(named(path))
    if tag is None and not newest and paths != (named(path),):
        yield from _lost_parts(named(path))


def _lost_parts(path: Location) -> Iterator[Verdict]:
    """What a pipeline of several models lists and does not have."""
    if not is_folder(path):
        return
    try:
        with within(path):
            lost = lost_parts(Folder.of(path))
    except CkptError as error:
        lost = [(path, error)]
    yield from (refused(part, error) for part, error in lost)


def _pointers(folder: Location) -> Iterator[Verdict]:
    """A run's pointer that leads nowhere: no checkpoint is bad, and a resume from the run would fail."""
    try:
        runs.newest(folder)
    except CkptError as error:
        yield replace(refused(folder, error), format="run")


def _labelled(bar: Bar, label: str) -> checks.Bar:
    return lambda nbytes: bar(nbytes, label)


def older(path: Location) -> Location | None:
    """The newest before a damaged checkpoint whose headers are good: beside it, and named alike."""
    path = absolute(path)
    try:
        beside = [each for each in checkpoints(path.parent) if shape(each.name) == shape(path.name)]
    except CkptError:
        return None
    before = sorted(
        (p for p in beside if numbers(p.name) < numbers(path.name)), key=lambda p: numbers(p.name)
    )
    for each in reversed(before[-TRIED:]):
        try:
            if checks.verify(each, quick=True).ok:
                return each
        except CkptError:
            continue
    return None
