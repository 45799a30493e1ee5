"""That what was written holds what was to be written: both are read, and their digests compared.

The digests are those of the Checkpoint that the plan was made from, so a change that was asked for is in
them. Named are kinds of state that the target has no place for, and 16-bit weights that are not their rounded
masters, where it keeps the master alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from ckpttools.checkpoint import Checkpoint
from ckpttools.compare.content import MASTER, WEIGHT
from ckpttools.compare.digests import digests, nbytes_of
from ckpttools.errors import escape
from ckpttools.formats import Source
from ckpttools.location import Location
from ckpttools.operations.digest import Difference, Digested, compare, digest
from ckpttools.operations.sidecar import written_wrong
from ckpttools.operations.stated import described
from ckpttools.operations.writing import Check, Writing
from ckpttools.stores.links import within


def check(source: Source, checkpoint: Checkpoint, how: Writing, *, whole: bool = False) -> Check:
    """A check for `carry_out`: that the files hold what `checkpoint`, made from `source`, does.

    `whole`: they have a place for settings and counters. It raises CkptError "written-wrong" where they do
    not hold it, a defect of ckpttools; the manifest gets the digests.
    """

    def kept(staged: Location, contents: bytes, place: Location) -> tuple[str, bytes]:
        told, made = _compared(_wanted(source, checkpoint, how), staged, how, whole=whole)
        return told, described(contents, place, made.checkpoint, made.digests)

    return kept


def asked(asked: bool | None, source: Source, dst: Location, how: Writing) -> bool:
    """Whether to check: unless said otherwise, where reading twice costs no requests and nobody waits."""
    if asked is not None:
        return asked
    return isinstance(source.target, Path) and isinstance(dst, Path) and how.spread is None


def _wanted(source: Source, checkpoint: Checkpoint, how: Writing) -> Digested:
    """The digests of what is to be written. Reads each tensor once."""
    with within(source.root):
        bar = how.bar(nbytes_of(checkpoint), "digest") if how.bar is not None else nullcontext()
        with bar as progress:
            found = digests(checkpoint, workers=how.workers, bar=progress)
    return Digested(path=source.target, source=source, checkpoint=checkpoint, digests=found)


def _compared(wanted: Digested, staged: Location, how: Writing, *, whole: bool) -> tuple[str, Digested]:
    made = digest(staged, workers=how.workers, bar=how.bar)
    found = compare(wanted, made)
    lost = [each for each in found.different if _is_lost(wanted, made, each)]
    wrong = [each for each in found.different if each not in lost]
    left = [kind for kind in found.one_sided if kind not in (WEIGHT, MASTER)]
    problem = ""
    if wrong:
        problem = f"{wrong[0].kind} of {escape(wrong[0].name)} is another one"
    elif more := [kind for kind, is_left in found.one_sided.items() if not is_left]:
        problem = f"nobody asked for {escape(more[0])}"
    elif not lost and not left and wanted.digests.state != made.digests.state:
        problem = "the names are others"
    elif whole and not (found.settings and found.counters):
        problem = "its settings or counters are others"
    if problem:
        raise written_wrong(staged, problem, "digest", str(staged))
    told = f"digest {made.digests.state}, of what was to be written and of what was"
    if lost or left:
        weights = [f"{len(lost)} 16-bit weights that are not their rounded masters"] if lost else []
        told += f"; left out: {', '.join([*weights, *map(escape, left)])}"
    return told, made


def _is_lost(wanted: Digested, made: Digested, each: Difference) -> bool:
    """Whether it is a 16-bit weight of its own, and the target keeps the fp32 copy alone."""
    kept = made.content.held.get(MASTER, {})
    return each.kind == WEIGHT and each.name in wanted.digests.apart and each.name not in kept
