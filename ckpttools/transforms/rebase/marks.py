"""The note of a rebase in the checkpoint that it made, so that it is not done twice by mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from ckpttools.errors import UsageError
from ckpttools.schedules.evidence import Known, known, stated
from ckpttools.schedules.lengths import Unit
from ckpttools.training import ABSENT, Edit, SavedSchedule, Training, noted_arguments
from ckpttools.transforms.rebase.timeline import Request, Timeline

# a schedule's unit, and how often it is stepped for each
NotedSchedule = tuple[Unit | Literal["epoch"], int]


def refuse_repeated(training: Training, request: Request) -> None:
    """Raise UsageError for a checkpoint that is the result of a rebase, unless another one is asked for."""
    if request.again or not training.is_rebased:
        return
    assert training.marked is not None
    old, new = (_batch_of(training.marked.get(key)) for key in ("from", "to"))
    raise UsageError(
        "rebased-already",
        f"the checkpoint was rebased already, from a batch of {old} to {new}",
        why="doing it twice would move the position and the schedule once more",
        hint="start from the original, or add --again if you mean another change on top of it",
    )


def _batch_of(noted: object) -> Known:
    """A batch as a mark notes it."""
    values = noted if isinstance(noted, Mapping) else {}
    facts = [
        fact
        for what, key in (("micro", "micro"), ("ranks", "gpus"), ("accumulation", "accumulation"))
        if isinstance(values.get(key), int)
        for fact in stated(what, values[key], "the note")  # type: ignore[arg-type]
    ]
    return known(facts)


def noted_unit(training: Training, saved: SavedSchedule) -> Unit | Literal["epoch"] | None:
    """What an earlier rebase found the unit to be."""
    units = (training.marked or {}).get("schedule_units") if training.is_rebased else None
    index = next(i for i, each in enumerate(training.schedules) if each is saved)
    found = units[index] if isinstance(units, list) and index < len(units) else None
    return found if found in ("micro", "update", "epoch") else None


def mark(
    training: Training,
    line: Timeline,
    request: Request,
    count: int | None,
    schedules: Sequence[NotedSchedule],
    arguments: Mapping[str, object],
) -> Iterator[Edit]:
    """The note of this rebase: batches, counts (`counted` is the optimizer's own, which stays), how each
    schedule is stepped, and the arguments that the new run is to have, of which files beside still have the
    old ones.
    """
    assert training.marker is not None
    batches = {"from": line.shown(line.old), "to": line.shown(line.new)}
    noted: dict[str, object] = {
        **{
            key: {"micro": batch.micro, "gpus": batch.ranks, "accumulation": batch.accumulation}
            for key, batch in batches.items()
        },
        "count": count,
        "old_count": training.count,
        "counted": training.optimizers[0].steps if training.optimizers else None,
        "lr_scaling": request.lr_scaling,
        "schedule_units": [unit for unit, _ in schedules],
        "schedule_repeats": [repeats for _, repeats in schedules],
    }
    if known := {**noted_arguments(training.marked, training.count), **arguments}:
        noted["arguments"] = known
    old = ABSENT if training.marked is None else training.marked
    yield Edit(place=training.marker, old=old, new=noted, why="marker")
