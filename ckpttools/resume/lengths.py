"""How long the new run is, and what of it is left."""

from __future__ import annotations

import math
from collections.abc import Iterator

from msgspec.structs import replace

from ckpttools.errors import UsageError
from ckpttools.frameworks import framework_of
from ckpttools.frameworks.rules import CAREFUL, About
from ckpttools.resume.forecast import Check, Difference, check
from ckpttools.resume.new_run import NewRun
from ckpttools.training import Training
from ckpttools.transforms.rebase.timeline import Request, timeline


def given(run: NewRun) -> tuple[int | None, int | None, int | None]:
    """The batch per rank, the accumulation and the ranks of the new run, as far as they are said."""
    said, steps = run.stated, run.stated.accumulation
    step = said.micro * run.world_size if said.micro is not None and run.world_size is not None else 0
    if said.total is not None and steps is None and step and not said.total % step:
        steps = said.total // step
    return said.micro, steps, run.world_size


def planned(training: Training, run: NewRun) -> int | None:
    """The length of the new run in the unit of `training.count`; None where nothing says it."""
    if run.stated.steps is not None:
        return run.stated.steps
    epochs = training.epochs if run.stated.epochs is None else run.stated.epochs
    if epochs is not None and _is_another_batch(training, run):
        return _recounted(training, given(run), epochs)
    if run.stated.epochs is not None:
        per_epoch = training.batches if training.unit == "micro" else training.updates
        return None if per_epoch is None else math.ceil(run.stated.epochs * per_epoch)
    if training.total_count is not None:
        return training.total_count
    return next((c.value for c in training.counters if c.role == "total"), None)


def _is_another_batch(training: Training, run: NewRun) -> bool:
    known = training.batch
    same = zip((known.micro, known.accumulation, known.ranks), given(run), strict=True)
    return not all(None in (was, now) or was == now for was, now in same)


def _recounted(
    training: Training, parts: tuple[int | None, int | None, int | None], epochs: int | float
) -> int | None:
    """The updates of so many epochs with another batch, by which some find their place. Others go by the
    epochs that they count.
    """
    if not framework_of(training).rule.recounts:
        return None
    micro, steps, ranks = parts
    plain = replace(training, epochs=epochs, total_count=None)
    request = Request(new_bs=micro, new_accum=steps, new_gpus=ranks, batch_is="per-gpu", epochs=epochs)
    try:
        line = timeline(plain, request).steps[training.unit]
    except UsageError:
        return None
    return line.new_total if line.new.epoch is not None else None


def length(training: Training, run: NewRun) -> Iterator[Difference]:
    """What is left of the run, and another length where the schedule is computed from it."""
    total = planned(training, run)
    inside = _begun(training)
    if framework_of(training).rule.anew and training.epochs is not None and training.batches is None:
        yield Difference(
            about=About.DATA,
            setting="place in the epoch",
            cls=CAREFUL,
            why="its iterations and epochs do not go together: whether it was saved at an epoch's end, from "
            f"which alone {framework_of(training).title} goes on, is not known",
            hint="resume from a checkpoint of an epoch's end",
        )
    elif inside:
        yield Difference(
            about=About.DATA,
            setting="place in the epoch",
            cls=CAREFUL,
            why=f"it was saved {inside} of {training.batches} iterations into an epoch, which "
            f"{framework_of(training).title} begins anew: they are trained on again, while iteration and "
            "schedule count on",
            hint="resume from a checkpoint of an epoch's end, or expect the schedule to end before the run",
        )
    elif total is not None and training.count is not None and training.count >= total:
        yield Difference(
            about=About.LENGTH,
            setting="what is left",
            cls=CAREFUL,
            why=f"nothing, {training.count} of {total} are done: the run is finished, "
            f"{_after_the_end(training, run, total)}",
            hint="to train longer, give the new run more epochs or iterations; look at its schedule",
        )
    for key, counted, was in training.lengths:
        now = run.stated.epochs if counted == "epochs" else run.stated.steps
        if now is not None and was is not None and was != now:
            yield Difference(
                about=About.LENGTH,
                setting=key,
                old=was,
                new=now,
                cls=CAREFUL,
                why="the schedule is computed anew for the new length and continued at the old step",
            )


def _after_the_end(training: Training, run: NewRun, total: int) -> str:
    """What a resume of a finished run does."""
    done, epoch, owner = training.count, training.epoch, framework_of(training)
    if not owner.rule.looks_after or not done:
        return "a resume ends at once"
    if epoch is None or not 0 <= epoch <= 1e9 or _is_another_batch(training, run):
        return f"a resume ends at once; only within its last epoch {owner.title} makes another update first"
    if math.floor(epoch) < math.ceil(total * epoch / done):
        return f"and yet {owner.title}, within its last epoch, makes another update before it ends"
    return "a resume ends at once"


def _begun(training: Training) -> int:
    """Iterations into an epoch that a resume begins anew; 0 at its end, or where that is not known.

    One more or less is the end, too: some hooks save so.
    """
    done, count, batches = training.epochs_done, training.count, training.batches
    if not framework_of(training).rule.anew or done is None or count is None or batches is None:
        return 0
    inside = count - done * batches
    return inside if inside > 1 else 0


def length_check(total: int | None, training: Training, differences: list[Difference]) -> Check:
    known = total is not None and training.count is not None
    text = "the length of the run is not known"
    epochs, done, batches = training.epochs, training.epochs_done, training.batches
    if _begun(training) and epochs is not None and done is not None and batches is not None:
        text = f"{round((epochs - done) * batches)} are left: {done} of {epochs} epochs are done"
    elif total is not None and training.count is not None:
        text = f"{total - training.count} of {total} are left"
    return check(About.LENGTH, text, differences, known=known)
