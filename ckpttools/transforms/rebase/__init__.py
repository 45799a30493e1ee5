"""Rebase: the same place in the data and in the schedule, for another batch size.

Counters move to the same sample, every constant of the schedule that counts iterations follows, and the
learning rate is found again by replaying the schedule from its start with the new constants. It is written
into the scheduler's state and into param_groups of every shard, because that value governs the first
update. Adam's `step` and moments stay: they count and average updates that were really made, and the bias
correction must go on from there.

    timeline     the two runs: batches, lengths of epochs, how counts map
    scheduled    saved schedules before and after
    counters, groups   what else changes
    marks        the note that a checkpoint was rebased
    curves       the learning rate over samples
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.errors import UsageError
from ckpttools.schedules import Setting
from ckpttools.training import Edit, Training
from ckpttools.transforms.rebase import counters, groups, marks
from ckpttools.transforms.rebase.curves import Curve, Moved, curves
from ckpttools.transforms.rebase.scheduled import Scheduled, config_edits, scheduled, state_edits
from ckpttools.transforms.rebase.timeline import Request, Timeline, timeline

__all__ = ["Curve", "Rebased", "Request", "curves", "rebase"]

ADAM = (
    "Adam's step and moments are left alone: they count and average the updates that were made, and the bias "
    "correction goes on from there"
)


class Rebased(Struct, frozen=True, kw_only=True):
    """What changes. `settings` and `outside` are the new run's, which no checkpoint can carry."""

    timeline: Timeline
    old_count: int | None
    new_count: int | None
    samples: tuple[float, float] | None  # seen by the old count, and by the new one
    ahead: int  # samples after the new count's place, at which the run goes on all the same
    families: tuple[str, ...]
    lr: tuple[float, float] | None  # of the next update, before and after; None where it is not in the file
    edits: tuple[Edit, ...]
    settings: tuple[Setting, ...]
    outside: tuple[str, ...]
    notes: tuple[str, ...]
    moved: tuple[Moved, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether no byte of the checkpoint changes."""
        return not self.edits


def rebase(training: Training, request: Request) -> Rebased:
    """Everything that another batch size changes in a checkpoint. Raises UsageError with a reason."""
    marks.refuse_repeated(training, request)
    training = counters.with_unit(training, request.unit, request.old_accum)
    line = timeline(training, request)
    _refuse_finished(training, line)
    _refuse_unscheduled(training, request)
    saved = () if request.counters_only else training.schedules
    factor = groups.factor_of(request, line.ratio)
    found = [scheduled(training, line, each, request) for each in saved]
    if factor != 1:
        found = [replace(each, new=each.new.scaled(factor)) for each in found]
    count = None if training.count is None else line.steps[training.unit].position(training.count)
    # a later edit of the same place counts: two frameworks may have saved the same schedule
    edits = {(e.place.file, e.place.at): e for e in _edits(training, request, line, found, factor)}
    if edits and training.marker is not None:
        noted = [each.noted for each in found]
        for edit in marks.mark(training, line, request, count, noted, _arguments(found)):
            edits[edit.place.file, edit.place.at] = edit
    settings = [setting for each in found for setting in each.new.settings]
    if training.epochs is not None:  # a run that is set by epochs finds its number of steps itself
        settings = [setting for setting in settings if setting.name != "max_steps"]
    settings += counters.settings(training, line, request)
    return Rebased(
        timeline=line,
        old_count=training.count,
        new_count=count,
        samples=_samples(training, line, count),
        ahead=_ahead(training, line) if edits else 0,
        families=tuple(name for each in found for name in each.new.families),
        lr=_first_lr(training, edits.values()),
        edits=tuple(edits.values()),
        settings=tuple(dict.fromkeys(settings)),
        outside=training.outside,
        notes=tuple(dict.fromkeys(_notes(training, request, line, found, factor, changed=bool(edits)))),
        moved=tuple((each.old, each.new, each.steps) for each in found if each.steps is not None),
    )


def _arguments(found: Iterable[Scheduled]) -> dict[str, object]:
    """What the Trainer's arguments are to be: of its schedules nothing else is saved."""
    trainers = (each for each in found if each.saved.framework == "transformers")
    return {setting.name: setting.new for each in trainers for setting in each.new.settings}


def _ahead(training: Training, line: Timeline) -> int:
    return (training.inside or 0) % line.new.total


def _edits(
    training: Training, request: Request, line: Timeline, found: list[Scheduled], factor: float
) -> Iterator[Edit]:
    for counter in training.counters:
        yield from counters.counter_edits(training, counter, line, request)
    for history in training.histories:
        yield from counters.history_edits(history, line.steps[history.unit])
    for each in found:
        yield from state_edits(each)
        yield from config_edits(each)
    for i, optimizer in enumerate(training.optimizers):
        own = [each for each in found if each.saved.optimizer == i]
        yield from groups.optimizer_edits(optimizer, own, factor)
        if request.lr_scaling == "adam-sde":
            yield from groups.adam_sde_edits(optimizer, own, line.ratio)
    for field in training.batch_fields:
        yield from counters.batch_edits(field, line.new)


def _notes(
    training: Training,
    request: Request,
    line: Timeline,
    found: list[Scheduled],
    factor: float,
    *,
    changed: bool,
) -> Iterator[str]:
    yield from training.notes
    yield from training.batch.notes
    yield from _of_unit(training, request)
    yield from line.notes
    for each in found:
        yield from each.new.notes
        if each.steps is None:
            yield f"{', '.join(each.new.families)} is stepped once per epoch: it stays as it is"
    if changed:
        yield from training.stays
    if changed and any(optimizer.steps is not None for optimizer in training.optimizers):
        yield ADAM
    over = _ahead(training, line)
    if changed and over:
        yield (
            f"the run goes on at the very next sample, {over} after the place that its counter stands for: "
            "no sample is seen again, and the epoch may come to one update less"
        )
    yield from groups.notes_of_scaling(request, line, factor)
    yield from _of_ranks(training, line)


def _of_unit(training: Training, request: Request) -> Iterator[str]:
    """That plain training code may count something else than updates: the optimizer counted otherwise."""
    steps = next((o.steps for o in training.optimizers if o.steps is not None), None)
    if training.framework != "plain" or training.unit != "update" or request.unit is not None:
        return
    if None not in (steps, training.count) and steps != training.count:
        yield (
            f"the counter is {training.count}, and the optimizer made {steps} updates: it is taken as "
            "a count of updates; --unit micro takes it as one of micro-batches"
        )


def _of_ranks(training: Training, line: Timeline) -> Iterator[str]:
    """Files that are partitioned over ranks stay so."""
    parts = len(training.optimizers[0].places) if training.optimizers else 0
    if line.new.ranks != line.old.ranks and parts > 1:
        yield (
            f"the files stay partitioned for {parts} ranks: for {line.new.ranks}, run ckpt reshard "
            f"--world-size {line.new.ranks} on the result"
        )


# --- before anything else -------------------------------------------------------------------------------


def _refuse_finished(training: Training, line: Timeline) -> None:
    steps = line.steps[training.unit]
    if training.count is None or steps.old_total is None or training.count < steps.old_total:
        return
    raise UsageError(
        "run-finished",
        f"the run is at its end: {training.count} of {steps.old_total}",
        why="nothing is left to train, so there is no schedule to go on with",
        hint="to train longer, start a new schedule from the weights: ckpt extract --weights-only",
    )


def _refuse_unscheduled(training: Training, request: Request) -> None:
    if training.schedules or request.counters_only or training.follows:
        return
    if training.count is None and not training.optimizers:
        raise UsageError(
            "weights-only",
            "the checkpoint holds no counter, schedule or optimizer",
            why="there is nothing that a batch size could change",
            hint="name the training checkpoint itself, not weights that were taken from one",
        )
    raise UsageError(
        "no-schedule",
        "no learning-rate schedule is saved in the checkpoint",
        why="its learning rate was constant, or came from code that saved nothing",
        hint="if it is constant, or follows from the counters, add --counters-only",
    )


# --- the result -----------------------------------------------------------------------------------------


def _samples(training: Training, line: Timeline, new_count: int | None) -> tuple[float, float] | None:
    if training.count is None or new_count is None:
        return None
    steps = line.steps[training.unit]
    return float(steps.old.samples_at(training.count)), float(steps.new.samples_at(new_count))


def _first_lr(training: Training, edits: Iterable[Edit]) -> tuple[float, float] | None:
    """The first group's learning rate for the next update, as saved and as it will be."""
    optimizer = next((o for o in training.optimizers if o.first_update and o.groups), None)
    if optimizer is None:
        return None
    old = optimizer.groups[0].get("lr")
    if not isinstance(old, float | int):
        return None
    place = optimizer.places[0].below(0, "lr")
    new = next((e.new for e in edits if e.place == place), old)
    assert isinstance(new, float | int)
    return float(old), float(new)
