"""What a checkpoint of any format holds for a resume: optimizer, scheduler, counters, losses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from ckpttools import frameworks
from ckpttools.checkpoint import Checkpoint
from ckpttools.checks.keys import SCHEDULERS, has_any
from ckpttools.containers import fields, jsons
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import CkptError, Unsupported
from ckpttools.findings import ERROR, INFO, Finding
from ckpttools.formats import Source
from ckpttools.formats.torch import OPTIMIZER
from ckpttools.formats.zero.join import ZeroFolder
from ckpttools.stores.files import is_file
from ckpttools.training import Training

KEYS = ("optimizer", "scheduler", "step", "epoch", "train_loss", "val_loss")
Held = Mapping[str, bool | None]  # by KEYS; None: not known


def holds(source: Source, found: Checkpoint) -> Held:
    """Whether each of KEYS is there; everything is False for weights alone, None where it cannot be told."""
    training: Training | None = None
    known = True
    try:
        training = frameworks.read(source, found)
    except Unsupported as reason:
        known = reason.id == "weights-only"
    except CkptError:
        known = False  # damage that is reported by itself
    state, log = found.train_state, _logged(source)
    root = fields.as_mapping(found.template.value) if isinstance(found.template, TorchFile) else None
    optimizer = scheduler = None if not known else False
    if training is not None:
        optimizer, scheduler = bool(training.optimizers), bool(training.schedules)
    if isinstance(found.template, ZeroFolder):
        moments = any(rank.moments[g] for rank in found.template.ranks for g in range(len(rank.moments)))
        optimizer = moments or any(group.hyper for group in found.groups)
        scheduler = scheduler or fields.as_mapping(found.template.model.root.get("lr_scheduler")) is not None
    if root is not None:
        optimizer = optimizer or has_any(root, OPTIMIZER)
        scheduler = scheduler or has_any(root, SCHEDULERS)
    if found.layout.format == "dcp":
        optimizer = bool(found.groups) or any(name in found.client for name in OPTIMIZER)
        scheduler = bool(scheduler or state.scheduler)
    counts = training.counters if training is not None else ()
    epoch = training.epoch if training is not None else None
    return {
        "optimizer": optimizer,
        "scheduler": scheduler,
        "step": state.step is not None or state.iteration is not None or bool(counts),
        "epoch": state.epoch is not None or epoch is not None or "epoch" in log,
        "train_loss": state.train_loss is not None or "loss" in log,
        "val_loss": state.val_loss is not None or "eval_loss" in log,
    }


def _logged(source: Source) -> set[str]:
    """What the Trainer's own file says: its epoch, and the losses in its log."""
    path = source.root / "trainer_state.json"
    try:
        state = jsons.read(path, allow_nan=True) if is_file(path) else {}
    except CkptError:
        return set()  # reported by itself
    history = state.get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    logged = {key for entry in entries for key in ("loss", "eval_loss") if key in entry}
    return logged | {"epoch"} & state.keys()


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
            where="",
            message=f"a training checkpoint without {' and '.join(missing)}: a resume begins "
            f"{'it' if len(missing) == 1 else 'them'} anew",
        )
