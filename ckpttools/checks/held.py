"""What a checkpoint of any format holds for a resume: optimizer, scheduler, counters, losses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from ckpttools import frameworks
from ckpttools.checkpoint import FP32, Checkpoint
from ckpttools.checks.keys import SCHEDULERS
from ckpttools.errors import CkptError, Unsupported
from ckpttools.findings import ERROR, INFO, Finding
from ckpttools.formats import Source
from ckpttools.formats.counters import OPTIMIZER
from ckpttools.training import Training
from ckpttools.tree import Value

KEYS = ("optimizer", "scheduler", "step", "epoch", "train_loss", "val_loss")
Held = Mapping[str, bool | None]  # by KEYS; None: not known


def holds(source: Source, found: Checkpoint) -> tuple[Held, Training, CkptError | None]:
    """Whether each of KEYS is there; everything is False for weights alone, None where it cannot be told.
    With the counters and losses, as the framework means them, and what it finds damaged in its own state.
    """
    damage: CkptError | None = None
    training: Training | None = None
    known = True
    try:
        training = frameworks.read(source, found)
    except Unsupported as reason:
        known = reason.id == "weights-only"
    except CkptError as error:
        known, damage = False, error if error.exit_code == 1 else None
    state = training if training is not None else found.training
    logged = {name for name, _ in training.losses} if training is not None else set()
    optimizer = scheduler = None if not known else False
    if training is not None:
        optimizer, scheduler = bool(training.optimizers), bool(training.schedules)
    if source.format.resumes:
        optimizer = bool(optimizer or _has_optimizer(found))
        kept = found.training.scheduler or any(_filled(found.client.get(key)) for key in SCHEDULERS)
        scheduler = bool(scheduler or kept)
    counts = training.counters if training is not None else ()
    held = {
        "optimizer": optimizer,
        "scheduler": scheduler,
        "step": state.step is not None or state.iteration is not None or bool(counts),
        "epoch": state.epoch is not None,
        "train_loss": state.train_loss is not None or "loss" in logged,
        "val_loss": state.val_loss is not None or "eval_loss" in logged,
    }
    return held, state, damage


def _has_optimizer(found: Checkpoint) -> bool:
    """Whether a format with a place for it has any of its state or settings, be it without names."""
    known = any(group.hyper or group.scalars or group.state.keys() - {FP32} for group in found.groups)
    return known or any(_filled(found.client.get(key)) for key in OPTIMIZER)


def _filled(value: Value) -> bool:
    return value is not None and value != {} and value != []


def lacks(held: Held) -> tuple[str, ...]:
    """Optimizer and scheduler, where a training checkpoint has none. Nothing is asked of weights alone."""
    trained = held.get("optimizer") or held.get("step")
    return tuple(key for key in ("optimizer", "scheduler") if trained and held[key] is False)


def check_held(found: Checkpoint, held: Held, require: Collection[str]) -> Iterator[Finding]:
    """A note of what a training checkpoint lacks; an error for what was asked for."""
    for key in require:
        if not held[key]:
            yield Finding(
                id="required-missing",
                severity=ERROR,
                file=str(found.path),
                where=key,
                message="is not there, and was asked for"
                if held[key] is False
                else "cannot be found in this layout, and was asked for",
                why="--require",
                hint="use another checkpoint to resume from",
            )
    missing = [key for key in lacks(held) if key not in require]
    if missing:
        yield Finding(
            id="training-lacks",
            severity=INFO,
            file=str(found.path),
            message=f"a training checkpoint without {' and '.join(missing)}: a resume begins "
            f"{'it' if len(missing) == 1 else 'them'} anew",
        )
