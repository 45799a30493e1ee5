"""The optimizer's settings and the schedule beside them: could the next update be computed with them, and are
they of one save? Of any container but a DeepSpeed engine's, which formats/engine.py looks at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ckpttools.checkpoint import Checkpoint
from ckpttools.checks.kept import check_kept
from ckpttools.errors import escape
from ckpttools.findings import ERROR, WARNING, Finding
from ckpttools.formats import Source
from ckpttools.formats.engine import odd_settings
from ckpttools.frameworks import framework_of
from ckpttools.training import OptimizerSettings, Place, SavedSchedule, Training

MOST = 2.0**24  # torch counts by one in fp32, which goes no farther
WILD = 1e4  # a learning rate with which nothing is trained


def check_settings(
    source: Source, found: Checkpoint, training: Training, *, rates: bool
) -> Iterator[Finding]:
    """A finding for each setting that cannot be, and for what the files say of each other; `rates`: the
    learning rates were found to be odd already.
    """
    if source.format.tagged or not training.framework:
        return
    for optimizer in training.optimizers:
        for g, group in enumerate(optimizer.groups):
            lr = group.get("lr") if not rates else None  # else the schedule says more
            wild = [("lr", lr, WARNING)] if isinstance(lr, int | float) and WILD < lr < math.inf else []
            for key, value, severity in (*odd_settings(group), *wild):
                yield Finding(
                    id="setting-implausible",
                    severity=severity,
                    file=str(optimizer.places[0].file),
                    where=f"param_groups[{g}].{key}",
                    message=f"is {escape(repr(value), 80)}",
                    hint="a resume takes it from here, not from the new configuration"
                    + (", and fails at its first update" if severity == ERROR else ""),
                )
        yield from _steps(optimizer)
    for saved in training.schedules if not rates else ():
        alone = sum(other.optimizer == saved.optimizer for other in training.schedules) == 1
        if alone and saved.optimizer < len(training.optimizers):
            yield from _last_rates(saved, training.optimizers[saved.optimizer])
    yield from check_kept(found, training)
    yield from _updates(training)
    yield from _equal(training)


def _steps(optimizer: OptimizerSettings) -> Iterator[Finding]:
    """What Adam has counted: its corrections are powers of it."""
    for number in optimizer.counts():
        wild = number > (MOST if isinstance(number, float) else 1e15)
        if 0 <= number < math.inf and not wild:
            continue
        yield Finding(
            id="setting-implausible",
            severity=WARNING if wild else ERROR,
            file=str(optimizer.places[0].file),
            where="state[].step",
            message=f"is {escape(number, 40)}, of the updates that the optimizer has counted",
            hint="use another copy: a resume corrects the moments by it"
            + ("" if wild else ", and its first update fails, or makes NaN of the weights"),
        )
        return


def _last_rates(saved: SavedSchedule, optimizer: OptimizerSettings) -> Iterator[Finding]:
    """What one of torch's schedulers wrote last, against what the optimizer has."""
    last = saved.states[0].get("_last_lr") if len(saved.states) == 1 else None
    if not isinstance(last, list) or not optimizer.first_update or optimizer.base_group is not None:
        return
    have = [group.get("lr") for group in optimizer.groups]
    said = ""
    if len(last) > len(have):  # fewer where some were unfrozen since
        said = f"is of {len(last)} parameter groups, and the optimizer has {len(have)}"
    for written, lr in zip(last, have, strict=False):
        if not (isinstance(written, int | float) and isinstance(lr, int | float)) or said:
            continue
        if 0 <= lr < math.inf and not math.isclose(written, lr, rel_tol=1e-6):  # others are odd by themselves
            said = f"the scheduler is at {written:g}, the optimizer at {lr:g}"
    if said:
        yield Finding(
            id="scheduler-mismatch",
            severity=WARNING,
            file=str(saved.places[0].file),
            where=str(saved.places[0].below("_last_lr")),
            message=said,
            hint="the first update after a resume uses the optimizer's value, later ones the scheduler's",
        )


def _updates(training: Training) -> Iterator[Finding]:
    """The main count against what Adam and the schedule have counted, which lie in other files; with fp16
    some updates may have been passed over.
    """
    main = next((c for c in training.counters if c.role == "position" and c.value == training.count), None)
    if not framework_of(training).rule.apart or main is None or training.is_rebased:
        return
    skipping = training.configuration.get("fp16") is not False
    for place, own, what in _counts_apart(training):
        if own == main.value or (own < main.value and skipping):
            continue
        yield Finding(
            id="counter-mismatch",
            severity=WARNING,
            file=str(place.file),
            where=str(place),
            message=f"the {what} {own} updates, and {main.places[0].file.name} counts {main.value}: it was "
            "begun anew, the run was rebased to another batch size, or the files are of different saves",
            hint="a resume takes both as they are: look at the times of the files, or use another checkpoint",
        )


def _counts_apart(training: Training) -> Iterator[tuple[Place, int, str]]:
    for optimizer in training.optimizers:
        if (steps := optimizer.steps) is not None:
            yield Place(file=optimizer.places[0].file, at=("state[]", "step")), steps, "optimizer made"
            break
    for saved in training.schedules:
        for state, place in zip(saved.states, saved.places, strict=True):
            made = state.get("last_epoch")
            if (
                isinstance(made, int) and saved.repeats == 1 and "num_bad_epochs" not in state
            ):  # of evaluations
                yield place.below("last_epoch"), made, "schedule counts"


def _equal(training: Training) -> Iterator[Finding]:
    """Two counts of one thing: a resume goes on with both. Hooks may save one apart."""
    named = {counter.name: counter for counter in training.counters}
    found = [named[name] for name in framework_of(training).rule.equal if name in named]
    if len(found) < 2 or abs(found[0].value + found[0].offset - found[1].value - found[1].offset) <= 1:
        return
    first, other = found
    yield Finding(
        id="counter-mismatch",
        severity=WARNING,
        file=str(other.places[0].file),
        where=other.name,
        message=f"counts {other.value + other.offset}, and {first.name} {first.value + first.offset}",
        hint="one of them was edited: a resume goes on with both, in different parts of the run",
    )
