"""Saved schedules, old and new: what one step of them is, and what changes in their states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from ckpttools import schedules
from ckpttools.errors import UsageError
from ckpttools.schedules import Program
from ckpttools.schedules.lengths import Steps, Unit
from ckpttools.training import Edit, SavedSchedule, Training, equal
from ckpttools.transforms.rebase.marks import noted_unit
from ckpttools.transforms.rebase.timeline import Request, Timeline
from ckpttools.tree import Key


class Scheduled(Struct, frozen=True, kw_only=True):
    """One saved schedule with its program before and after; no steps where it counts epochs."""

    saved: SavedSchedule
    old: Program
    new: Program
    unit: Unit | Literal["epoch"]
    steps: Steps | None

    @property
    def noted(self) -> tuple[Unit | Literal["epoch"], int]:
        """What a mark keeps of it: the unit, and how often it is stepped for each."""
        return self.unit, self.saved.repeats if self.steps is None else self.steps.new.repeats


def scheduled(training: Training, line: Timeline, saved: SavedSchedule, request: Request) -> Scheduled:
    """The schedule before and after. Raises UsageError for one that is unknown, damaged or ambiguous."""
    if saved.optimizer >= len(training.optimizers):
        raise UsageError(
            "no-optimizer",
            "a schedule is saved, but not the optimizer's settings that it acts on",
            where=saved.places[0].file,
            why="the learning rate that it left behind, and the one to start from, are not known",
            hint="name the whole checkpoint; --counters-only moves the counters alone",
        )
    beside = [other for other in training.schedules if other.optimizer == saved.optimizer]
    if len(beside) > 1:
        raise UsageError(
            "schedule-unknown",
            f"{len(beside)} schedules act on one optimizer: {', '.join(each.name for each in beside)}",
            where=saved.places[0].file,
            why="in which order and when each is stepped is not saved, so the rate after them is not known",
            hint="--counters-only leaves them alone and moves the counters; then set them up anew",
        )
    optimizer = training.optimizers[saved.optimizer]
    base = () if optimizer.base_group is None else (optimizer.base_group,)
    groups = (*optimizer.groups, *base)
    try:
        program = schedules.recognise(saved.framework, list(saved.states), list(groups), saved.about)
        return _scheduled(training, line, saved, program, request)
    except UsageError as error:
        where = f"{saved.places[0].file}: {saved.name}"
        error.where = where if error.where in ("", str(saved.places[0].file)) else f"{where}, {error.where}"
        raise


def _scheduled(
    training: Training, line: Timeline, saved: SavedSchedule, program: Program, request: Request
) -> Scheduled:
    if "unknown" in program.families:
        raise UsageError(
            "schedule-unknown",
            f"the saved scheduler is of no known class; its fields: {', '.join(map(str, saved.states[0]))}",
            where=saved.places[0].file,
            why="which of its fields count iterations cannot be told, and half a rebase would be wrong",
            hint="--counters-only leaves it alone and moves the counters; then set the scheduler up anew",
        )
    if program.contradiction is not None:
        own, replayed = program.contradiction
        raise UsageError(
            "schedule-contradicts",
            f"the scheduler left a learning rate of {own:.6g}, where {', '.join(program.families)} with its "
            f"constants gives {replayed:.6g} after {program.count} steps",
            where=saved.places[0].file,
            why="it is another class with the same fields, or its constants were changed on the way: a "
            "schedule that is replayed from them would go on at a wrong rate",
            hint="--counters-only leaves it alone and moves the counters; then set the scheduler up anew",
        )
    unit = _unit(training, saved, program, request)
    if unit == "epoch":
        return Scheduled(saved=saved, old=program, new=program, unit=unit, steps=None)
    steps = line.steps[unit]
    if saved.repeats != 1:
        steps = _repeated(training, steps, saved.repeats, line)
    if not steps.is_identity and (fields := list(_of_functions(saved.states))):
        raise UsageError(
            "schedule-unknown",
            f"the function of {', '.join(program.families)} is an object whose fields are saved: "
            f"{', '.join(map(str, dict.fromkeys(fields)))}",
            where=saved.places[0].file,
            why="torch loads them over those of the new run, and which of them count steps cannot be told",
            hint="--counters-only leaves it alone and moves the counters; then set the scheduler up anew",
        )
    new = program.rebased(steps, warmup=request.warmup)
    return Scheduled(saved=saved, old=program, new=new, unit=unit, steps=steps)


def _of_functions(states: object) -> Iterator[object]:
    """The fields of objects given as functions that may count steps: all but flags, texts and shares."""
    if isinstance(states, list | tuple):
        for each in states:
            yield from _of_functions(each)
    elif isinstance(states, Mapping):
        yield from _of_functions(states.get("_schedulers"))
        held = states.get("lr_lambdas")
        for fields in held if isinstance(held, list) else ():
            for name, value in fields.items() if isinstance(fields, Mapping) else ():
                share = isinstance(value, float) and abs(value) <= 1
                if not share and not isinstance(value, bool | str | None):
                    yield name


def _repeated(training: Training, steps: Steps, repeats: int, line: Timeline) -> Steps:
    """accelerate steps a scheduler once per process: another number of processes steps it more often."""
    per_rank = repeats == training.batch.ranks
    return replace(
        steps,
        old=replace(steps.old, repeats=repeats),
        new=replace(steps.new, repeats=line.new.ranks if per_rank else repeats),
        old_total=None,
        new_total=None,
    )


def stepped(training: Training, saved: SavedSchedule, program: Program) -> Unit | Literal["epoch"] | None:
    """What one step of the schedule is: a micro-batch, an update or an epoch; None where nothing tells."""
    if program.by_epoch:
        return "epoch"
    if saved.unit is not None:
        return saved.unit
    noted = noted_unit(training, saved)
    if noted is not None:
        return noted
    found: set[Unit | Literal["epoch"]] = {
        unit for count, unit in _counts(training, saved) if count == program.count
    }
    if "micro" in found and "update" in found:
        found.discard("micro")  # without accumulation they are the same
    if training.epochs_done is not None and program.count in (training.epochs_done, training.epochs_done + 1):
        found.add("epoch")
    return found.pop() if len(found) == 1 else None


def _counts(training: Training, saved: SavedSchedule) -> list[tuple[int | None, Unit]]:
    """What the checkpoint counts, which a schedule may follow."""
    counts: list[tuple[int | None, Unit]] = [
        (c.value + c.offset, c.unit) for c in training.counters if c.role == "position"
    ]
    if saved.optimizer < len(training.optimizers):
        counts.append((training.optimizers[saved.optimizer].steps, "update"))
    return counts


def _unit(
    training: Training, saved: SavedSchedule, program: Program, request: Request
) -> Unit | Literal["epoch"]:
    """The same, or as it is asked for. Raises UsageError where neither tells."""
    unit = request.schedule_unit or stepped(training, saved, program)
    if unit is not None:
        return unit
    names = {"update": "updates", "micro": "micro-batches"}
    counts = dict.fromkeys(
        f"{count} {names[unit]}" for count, unit in _counts(training, saved) if count is not None
    )
    known = ", ".join(counts) or "nothing"
    raise UsageError(
        "schedule-unit",
        f"{', '.join(program.families)} was stepped {program.count} times: per epoch, update or batch?",
        where=saved.places[0].file,
        why=f"the checkpoint counts {known}, epoch {training.epochs_done}: it does not say which one it "
        "follows",
        hint="say it with --schedule-unit epoch, update or micro",
    )


def state_edits(each: Scheduled) -> Iterator[Edit]:
    """What changes in the scheduler states."""
    for place, old, new in zip(each.saved.places, each.saved.states, each.new.states(), strict=True):
        for keys, before, after in differences(old, new):
            yield Edit(place=place.below(*keys), old=before, new=after, why="schedule")


def config_edits(each: Scheduled) -> Iterator[Edit]:
    """Constants that are saved apart from the state: DeepSpeed's, in every copy of ds_config."""
    if each.steps is None:
        return
    for setting in each.new.settings:
        for place in each.saved.config_places:
            at = place.below(*setting.name.split("."))
            yield Edit(place=at, old=setting.old, new=setting.new, why="schedule")


def differences(old: object, new: object, *keys: Key) -> Iterator[tuple[tuple[Key, ...], object, object]]:
    """The leaves at which two plain values differ, with the keys that lead there."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and list(old) == list(new):
        for key in old:
            yield from differences(old[key], new[key], *keys, key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, *keys, i)
    elif type(old) is not type(new) or not equal(old, new):
        yield keys, old, new
