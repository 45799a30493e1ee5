"""Counters, logs and batch settings: whole numbers that follow from the two batches alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from msgspec.structs import replace

from ckpttools.schedules import Setting
from ckpttools.schedules.lengths import Batch, Steps, Unit, nearest
from ckpttools.training import BatchField, Counter, Edit, StepList, Training
from ckpttools.transforms.rebase.timeline import Request, Timeline


def counter_edits(training: Training, counter: Counter, line: Timeline, request: Request) -> Iterator[Edit]:
    """The counter in all its places."""
    steps = line.steps[counter.unit]
    new = _counted(training, counter, steps, line, request)
    if new is None or new == counter.value:
        return
    for place in counter.places:
        yield Edit(place=place, old=counter.value, new=new, why="counter")


def settings(training: Training, line: Timeline, request: Request) -> Iterator[Setting]:
    """The batch, and lengths that the new run takes from its own configuration."""
    yield from _batch(training, line)
    for counter in training.counters:
        if counter.config is not None:
            new = _counted(training, counter, line.steps[counter.unit], line, request)
            if new is not None and new != counter.value:
                yield Setting(name=counter.name, old=counter.value, new=new, where=counter.config)


def _batch(training: Training, line: Timeline) -> Iterator[Setting]:
    """Each setting of the new run's batch, also one that stays; what nobody knows stays as it is."""
    old, new = line.shown(line.old), line.shown(line.new)
    for what, name, where in (*training.batch_names, ("ranks", "processes", "the launcher")):
        was, now = getattr(old, what), getattr(new, what)
        if now is not None:
            yield Setting(name=name, old=was, new=now, where=where)


def _counted(
    training: Training, counter: Counter, steps: Steps, line: Timeline, request: Request
) -> int | None:
    done, part = divmod(counter.value + counter.offset, counter.repeats)
    if part or counter.repeats != 1:
        each = replace(counter, value=done, offset=0, repeats=1)
        new = _counted(training, each, steps, line, request)
        return None if new is None else new * counter.repeats + part
    match counter.role:
        case "position":
            return steps.position(done) - counter.offset
        case "inside":
            start = 0
            if steps.old.epoch is not None and training.epochs_done:
                start = math.floor(training.epochs_done * steps.old.epoch)
            return _moved(steps, start + done) - _moved(steps, start) - counter.offset
        case "total":
            return max(1, nearest(steps.length(done))) - counter.offset
        case "warmup":
            return counter.value if request.warmup == "keep" else max(1, nearest(steps.length(done)))
        case "samples":
            count = training.count if training.unit == "update" else _updates(training)
            nominal = count is not None and counter.value == count * line.old.total
            return steps.position(count) * line.new.total if nominal and count is not None else None
        case "skipped":
            count = _updates(training)
            if count is None or not 0 <= done <= count:
                return None
            return steps.position(count) - steps.position(count - done)


def _moved(steps: Steps, count: int) -> int:
    return replace(steps, old_total=None, new_total=None).position(count)


def _updates(training: Training) -> int | None:
    """DeepSpeed's own count of updates, where the main counter is another."""
    return next((c.value for c in training.counters if c.name == "global_steps"), training.count)


def history_edits(history: StepList, steps: Steps) -> Iterator[Edit]:
    """The steps of a log: a resumed run appends later ones."""
    for old, place in zip(history.values, history.places, strict=True):
        new = steps.position(old)
        if new != old:
            yield Edit(place=place, old=old, new=new, why="log")


def batch_edits(field: BatchField, new: Batch) -> Iterator[Edit]:
    """A saved batch setting."""
    value = getattr(new, field.which)
    if value != field.value:
        for place in field.places:
            yield Edit(place=place, old=field.value, new=value, why="batch")


def with_unit(training: Training, unit: Unit | None, accumulation: int | None) -> Training:
    """With the main counter's unit as asked for, or as the optimizer's own count of updates shows it.

    Plain training code may count micro-batches or updates and does not say which.
    """
    accumulation, count = accumulation or training.batch.accumulation or 1, training.count
    steps = next((o.steps for o in training.optimizers if o.steps is not None), None)
    if unit is None and training.framework == "plain" and accumulation > 1 and count is not None:
        unit = "micro" if steps is not None and count != steps == count // accumulation else None
    if unit is None or unit == training.unit:
        return training
    counters = (replace(c, unit=unit) if c.unit == training.unit else c for c in training.counters)
    saved = (replace(s, unit=unit) if s.unit == training.unit else s for s in training.schedules)
    logs = (replace(h, unit=unit) if h.unit == training.unit else h for h in training.histories)
    return replace(
        training, unit=unit, counters=tuple(counters), schedules=tuple(saved), histories=tuple(logs)
    )
