"""The learning rates with which a framework's own run goes on, where it saves its schedule itself."""

from __future__ import annotations

import math

from msgspec.structs import replace

from ckpttools import schedules
from ckpttools.errors import CkptError
from ckpttools.resume.forecast import Rates
from ckpttools.resume.new_run import real
from ckpttools.schedules import Program
from ckpttools.training import SavedSchedule, Training, first_of
from ckpttools.transforms.rebase.scheduled import stepped

ENDS = "none: the run ends with that update"


def ahead(training: Training, schedule: SavedSchedule, *, engine: bool) -> int | None:
    """Steps of a schedule from the checkpoint to the next update: none where it steps by updates.

    A schedule of micro-batches steps inside an update that is made of several. DeepSpeed's `engine` begins a
    new update when it has loaded, MMEngine's own wrapper goes on in the one that was begun. None where it is
    not known how many micro-batches make an update.
    """
    if schedule.unit != "micro":
        return 0
    parts = training.batch.accumulation
    if parts is None or parts == 1:
        return parts and 0
    if engine:
        return parts - 1
    return None if training.count is None else parts - 1 - training.count % parts


def rates(
    training: Training | None, *, engine: bool = False, ranks: int | None = None, left: int | None = None
) -> Rates:
    """Of a schedule that the framework saves beside the optimizer; `engine`: DeepSpeed makes the updates.

    `ranks` are the new run's, where they are others; `left` is what is left of it, in its own units.
    """
    if training is None or not training.optimizers:
        return Rates(note="no optimizer's settings are in the checkpoint")
    found = _of_first(training, engine=engine, ranks=ranks, left=left)
    notes = filter(None, (first_of(training.optimizers), found.note))
    return replace(found, note="; ".join(notes))


def _of_first(training: Training, *, engine: bool, ranks: int | None, left: int | None) -> Rates:
    optimizer = training.optimizers[0]
    found = [real(group.get("lr")) for group in optimizer.groups]
    if not found or any(lr is None for lr in found):
        return Rates(note="the optimizer's settings hold no learning rate")
    first = tuple(lr for lr in found if lr is not None)
    note = "" if optimizer.first_update else "the framework computes it anew before the first update"
    own = [s for s in training.schedules if s.optimizer == 0]
    if not own:
        return Rates(first=first, next=None, note=note or "no schedule is saved: what follows is the code's")
    if len(own) > 1:
        return Rates(first=first, note=f"not forecast: {together(len(own))}")
    try:
        base = () if optimizer.base_group is None else (optimizer.base_group,)
        groups = [*optimizer.groups, *base]
        program = schedules.recognise(own[0].framework, own[0].states, groups, own[0].about)
        if not program.known:
            return Rates(first=first, note=f"not forecast: {program.unknown}")
        if not program.explained:
            return Rates(first=first, note=f"not forecast: {unexplained(program)}")
        machine = program.machine(fresh=False)
        unit = stepped(training, own[0], program)
        if unit is None or unit == "epoch":
            machine.step()
            return Rates(first=first, note=_by_epoch(float(machine.groups[0]["lr"]), known=unit is not None))
        skipped = ahead(training, replace(own[0], unit=unit), engine=engine)
        if skipped is None:
            return Rates(note="how many micro-batches make an update is not known")
        parts = (training.batch.accumulation or 1) if unit == "micro" else _repeats(training, own[0], ranks)
        for _ in range(skipped):
            machine.step()
        if skipped:
            first = tuple(float(group["lr"]) for group in machine.groups[: len(found)])
        if skipped and _is_last(training, skipped):
            return Rates(first=first, last=True, note=ENDS)
        for _ in range(parts):
            machine.step()
        following = tuple(float(group["lr"]) for group in machine.groups[: len(found)])
    except CkptError as error:
        return Rates(first=first, note=f"not forecast: {error.message}")
    if any(map(math.isnan, following)):
        return Rates(first=first, note=f"not forecast: {program.unknown}")
    if not skipped and unit == "update" and left == 1:
        return Rates(first=first, last=True, note=ENDS)
    return Rates(first=first, next=following, note=note)


def _repeats(training: Training, schedule: SavedSchedule, ranks: int | None) -> int:
    """Steps of a schedule for each update: accelerate steps it once per process."""
    per_rank = schedule.repeats == training.batch.ranks
    return ranks if ranks is not None and per_rank and schedule.repeats > 1 else schedule.repeats


def _by_epoch(rate: float, *, known: bool) -> str:
    """What is told of a schedule that need not step with the next update."""
    when = "" if math.isnan(rate) else f"; its next step gives {rate:.6g}"
    if known:
        return f"the schedule is stepped once per epoch{when}"
    return f"not forecast: whether the schedule is stepped by update, batch or epoch is not saved{when}"


def together(schedules: int) -> str:
    """Why nothing is foretold where several were saved apart."""
    return f"{schedules} schedules act on one optimizer: in which order and when they step is not saved"


def unexplained(program: Program) -> str:
    """Why nothing is foretold by a schedule that does not give the rate that is saved."""
    return (
        f"{', '.join(program.families)} with the saved constants does not give the saved learning rate after "
        f"{program.count} steps"
    )


def _is_last(training: Training, skipped: int) -> bool:
    """Whether the run is over with the update that ends `skipped` micro-batches after the next one begins."""
    return (
        training.count is not None
        and training.total_count is not None
        and training.count + skipped + 1 >= training.total_count
    )
