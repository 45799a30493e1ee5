"""The note of a rebase in the checkpoint that it made, so that it is not done twice by mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ckpttools.errors import UsageError
from ckpttools.schedules.lengths import Batch, Unit
from ckpttools.training import ABSENT, Edit, SavedSchedule, Training
from ckpttools.transforms.rebase.timeline import Request, Timeline

# a schedule's unit, and how often it is stepped for each
NotedSchedule = tuple[Unit | Literal["epoch"], int]


def refuse_repeated(training: Training, request: Request) -> None:
    """Raise UsageError for a checkpoint that is the result of a rebase, unless another one is asked for."""
    if request.again or not _is_marked(training):
        return
    assert training.marked is not None
    old, new = (_batch_of(training.marked.get(key)) for key in ("from", "to"))
    raise UsageError(
        "rebased-already",
        f"the checkpoint was rebased already, from a batch of {old or '?'} to {new or '?'}",
        why="doing it twice would move the position and the schedule once more",
        hint="start from the original, or add --force if you mean another change on top of it",
    )


def _is_marked(training: Training) -> bool:
    """Whether the noted rebase is of this very checkpoint.

    Training code that saves the keys it loaded carries the note on, but its runs count further.
    """
    return training.marked is not None and training.marked.get("count") == training.count


def _batch_of(noted: object) -> Batch | None:
    """A batch as a mark notes it."""
    if not isinstance(noted, Mapping):
        return None
    micro, ranks, accumulation = (noted.get(key) for key in ("micro", "gpus", "accumulation"))
    if not (isinstance(micro, int) and isinstance(ranks, int) and isinstance(accumulation, int)):
        return None
    return Batch(micro=micro, ranks=ranks, accumulation=accumulation)


def with_mark(training: Training) -> Training:
    """With the batch that the last rebase was for, where the checkpoint says no other."""
    noted = _batch_of((training.marked or {}).get("to")) if _is_marked(training) else None
    if noted is None:
        return training
    return replace(
        training,
        micro=training.micro or noted.micro,
        accumulation=training.accumulation or noted.accumulation,
        ranks=training.ranks or noted.ranks,
    )


def noted_unit(training: Training, saved: SavedSchedule) -> Unit | Literal["epoch"] | None:
    """What an earlier rebase found the unit to be."""
    units = (training.marked or {}).get("schedule_units") if _is_marked(training) else None
    index = next(i for i, each in enumerate(training.schedules) if each is saved)
    found = units[index] if isinstance(units, list) and index < len(units) else None
    return found if found in ("micro", "update", "epoch") else None


def mark(
    training: Training,
    line: Timeline,
    request: Request,
    count: int | None,
    schedules: Sequence[NotedSchedule],
) -> Iterator[Edit]:
    """The note of this rebase: batches, counts, and how each schedule is stepped."""
    assert training.marker is not None
    batches = {"from": line.old, "to": line.new}
    noted = {
        **{
            key: {"micro": batch.micro, "gpus": batch.ranks, "accumulation": batch.accumulation}
            for key, batch in batches.items()
        },
        "count": count,
        "old_count": training.count,
        "lr_scaling": request.lr_scaling,
        "schedule_units": [unit for unit, _ in schedules],
        "schedule_repeats": [repeats for _, repeats in schedules],
    }
    old = ABSENT if training.marked is None else training.marked
    yield Edit(place=training.marker, old=old, new=noted, why="marker")
