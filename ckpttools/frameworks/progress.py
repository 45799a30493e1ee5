"""How far a checkpoint is, in one line for people and as values for programs.

    iteration 50 of 52 (epoch 3.85 of 4), lr 4.5e-06 (2 groups), batch 8 = 2 x 2 ranks x 2, train/loss 0.31

What is not known is left out of the line, and null in the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from msgspec import Struct
from msgspec.structs import replace

from ckpttools import schedules
from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import CkptError
from ckpttools.formats.format import Source
from ckpttools.frameworks import read
from ckpttools.schedules.evidence import Known
from ckpttools.training import SavedSchedule, Training, first_of

UNITS = {"micro": "iteration", "update": "step"}


class Progress(Struct, frozen=True, kw_only=True):
    """`rates` are the learning rates of the optimizer's groups; `schedules` are in words."""

    unit: str
    state: Training
    count: int | None
    total: int | None
    epoch: float | None
    epochs: int | float | None
    rates: tuple[float, ...]
    batch: Known
    losses: tuple[tuple[str, float], ...]
    schedules: tuple[str, ...]
    settings: tuple[Mapping[str, object], ...]  # of the optimizer's groups
    framework: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        if self.count is not None:
            total = "" if self.total is None else f" of {self.total}"
            epoch = "" if self.epoch is None else f" ({self._epoch()})"
            yield f"{self.unit} {self.count}{total}{epoch}"
        elif self.epoch is not None:
            yield self._epoch()
        if self.rates:
            shown = " and ".join(dict.fromkeys(f"{rate:.6g}" for rate in self.rates))
            yield f"lr {shown} ({len(self.rates)} group{'s' if len(self.rates) > 1 else ''})"
        if self.batch.micro is not None or self.batch.total is not None:
            yield f"batch {self.batch}".removesuffix(" accumulated")
        for name, value in self.losses:
            yield f"{name} {value:.6g}"

    def _epoch(self) -> str:
        assert self.epoch is not None
        return f"epoch {round(self.epoch, 2):g}" + ("" if self.epochs is None else f" of {self.epochs}")


def progress(source: Source, checkpoint: Checkpoint) -> Progress:
    """Of any checkpoint: weights alone may say a step or a loss, too."""
    state = checkpoint.training
    try:
        training = read(source, checkpoint)
    except CkptError as error:
        notes = (
            () if error.id == "weights-only" else (f"the training state is not understood: {error.message}",)
        )
        nothing = replace(state, count=state.step, notes=notes)
        found = _progress(checkpoint, nothing)
        return replace(found, framework=None, notes=notes)
    return _progress(checkpoint, training)


def _progress(checkpoint: Checkpoint, training: Training) -> Progress:
    batch = training.batch
    groups = training.optimizers[0].groups if training.optimizers else [g.hyper for g in checkpoint.groups]
    rates = [group.get("lr") for group in groups]
    whose = first_of(training.optimizers)
    losses = {"train loss": training.train_loss, "val loss": training.val_loss} | dict(training.losses)
    return Progress(
        unit=UNITS[training.unit],
        state=training,
        count=training.count,
        total=training.total_count,
        epoch=_epoch(training, batch),
        epochs=training.epochs,
        rates=tuple(float(rate) for rate in rates if isinstance(rate, int | float)),
        batch=batch,
        losses=tuple((name.replace("_", " "), value) for name, value in losses.items() if value is not None),
        schedules=tuple(_words(training, each) for each in training.schedules),
        settings=tuple(groups),
        framework=training.framework,
        notes=(*batch.notes, *([f"learning rate and settings are {whose}"] if whose else [])),
    )


def _epoch(training: Training, batch: Known) -> float | None:
    """Epochs done by the counter, where an epoch's length is known, else as the checkpoint says.

    An iteration-based run says 0 to the end: that is left out.
    """
    length: Fraction | None = None
    batches, steps, count = training.batches, batch.accumulation, training.count
    if (
        training.unit == "update"
        and training.remainder == "flush"
        and count is not None
        and batches
        and steps
    ):
        updates = -(-batches // steps)  # the last one of an epoch may have fewer micro-batches
        if training.updates in (None, updates):
            done, inside = divmod(count, updates)
            return done + min(inside * steps, batches) / batches
    if isinstance(training.epoch, float) and not batches:
        return training.epoch  # the Trainer's own, which counts micro-batches
    if training.unit == "micro" and training.batches:
        length = Fraction(training.batches)
    elif training.unit == "update" and training.updates:
        length = Fraction(training.updates)
    elif training.unit == "update" and training.batches and batch.accumulation:
        length = Fraction(training.batches, batch.accumulation)
    if length and training.count is not None:
        return float(training.count / length)
    said = training.epoch
    return None if said is None or (not said and training.count) else float(said)


def _words(training: Training, saved: SavedSchedule) -> str:
    """A schedule in words; its class alone where it cannot be followed."""
    if saved.optimizer >= len(training.optimizers):
        return f"{saved.framework}'s, of an optimizer that is not saved"
    optimizer = training.optimizers[saved.optimizer]
    base = () if optimizer.base_group is None else (optimizer.base_group,)
    groups = [*optimizer.groups, *base]
    try:
        return schedules.recognise(saved.framework, list(saved.states), groups, saved.about).words()
    except CkptError as error:
        return f"not followed: {error.message}"
