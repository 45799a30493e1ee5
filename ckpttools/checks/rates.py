"""The saved learning rate against the one that the saved schedule gives at its own count.

The schedule's constants and its count are in the checkpoint, so its rate can be computed anew. A rate that is
none of its own was edited, damaged, or set by the training code on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ckpttools import schedules
from ckpttools.errors import CkptError
from ckpttools.findings import ERROR, WARNING, Finding
from ckpttools.formats.engine import odd_settings
from ckpttools.schedules.program import Machine, Program, advance
from ckpttools.training import OptimizerSettings, SavedSchedule, Training

MAX_STEPS = 100_000  # replayed one by one: a second
WITHIN = 0.01  # closed forms and replays agree to 1e-6; a rate within a percent is no damage
RUINOUS = 1000  # times the schedule's rate: the first update leaves nothing of the weights


def check_rates(training: Training) -> Iterator[Finding]:
    """A finding for each optimizer whose rate its schedule does not give; nothing where that is not known."""
    for saved in training.schedules:
        alone = sum(other.optimizer == saved.optimizer for other in training.schedules) == 1
        if alone and saved.optimizer < len(training.optimizers):
            yield from _compare(saved, training.optimizers[saved.optimizer])


def _compare(saved: SavedSchedule, optimizer: OptimizerSettings) -> Iterator[Finding]:
    groups = [dict(group) for group in optimizer.groups]
    if not optimizer.first_update or optimizer.base_group is not None:
        return
    if any(list(odd_settings(group)) for group in groups):
        return  # reported by themselves
    if any(group.get("relative_step") for group in groups):
        return  # Adafactor finds its rates itself
    try:
        program = schedules.recognise(saved.framework, list(saved.states), groups, saved.about)
    except CkptError as error:
        if error.id == "schedule-damaged" and saved.framework in schedules.WHOLE:
            yield Finding(
                id=error.id,
                severity=WARNING,
                file=str(saved.places[0].file),
                where=saved.name,
                message=error.message,
                hint="use another copy, or build the scheduler anew in the training code",
            )
        return
    try:
        if not program.known or not 0 < program.count <= MAX_STEPS:
            return
        machine = program.machine(fresh=True)
        advance(machine, program.count)
    except CkptError:
        return
    yield from _counts(saved, program, machine)
    for g, (group, replayed) in enumerate(zip(groups, machine.groups, strict=True)):
        have, want = group.get("lr"), replayed.get("lr")
        if not isinstance(have, int | float) or not isinstance(want, int | float) or math.isnan(want):
            continue
        if math.isclose(have, want, rel_tol=WITHIN, abs_tol=1e-12):
            continue
        ruinous = have > RUINOUS * max(abs(want), 1e-3)
        kind = ", ".join(program.families)
        yield Finding(
            id="rate-unexpected",
            severity=ERROR if ruinous else WARNING,
            file=str(optimizer.places[0].file),
            where=f"param_groups[{g}].lr",
            message=f"is {have:g}, where {kind} gives {want:g} after {program.count} steps",
            why="the first update after a resume uses the optimizer's",
            hint=f"use another copy; if it was set by hand, {_after(program, machine, g)}",
        )
        return


def _counts(saved: SavedSchedule, program: Program, replayed: Machine) -> Iterator[Finding]:
    """MMEngine's schedulers count the steps of their own span apart, and compute with them."""
    for i, (state, own) in enumerate(zip(program.saved_states, replayed.states, strict=False)):
        made, wanted = state.get("last_step"), own.get("last_step")
        if isinstance(made, int) and isinstance(wanted, int) and made != wanted:
            yield Finding(
                id="scheduler-mismatch",
                severity=WARNING,
                file=str(saved.places[0].file),
                where=f"{saved.name}[{i}].last_step",
                message=f"is {made}, where {program.count} steps of the schedule make it {wanted}",
                why="the schedule would go on from another place than the run",
                hint="use another copy: it was edited",
            )


def _after(program: Program, replayed: Machine, g: int) -> str:
    """What the next step makes of a rate that is not the schedule's: only a product goes on from it."""
    try:
        loaded = program.machine(fresh=False)
        advance(loaded, 1)
        advance(replayed, 1)
    except CkptError:
        return "what the schedule's next step makes of it is not known"
    after, own = loaded.groups[g]["lr"], replayed.groups[g]["lr"]
    if math.isclose(after, own, rel_tol=WITHIN):
        return f"it lasts until the schedule's next step, which gives {own:g}"
    return f"the schedule goes on from it: its next step gives {after:g}, not {own:g}"
