"""What a single-file training checkpoint holds for a resume: counters, losses, optimizer, scheduler.

A file without optimizer state is weights, and nothing is asked of it. Which keys a file must have is up to
the code that saved it; where the file says which framework that was, its own writer is the measure, or the
name: epoch_E_step_S.pt has epoch, global_step and optimizer_state_dict beside model_state_dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ckpttools import frameworks
from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import fields
from ckpttools.containers.pickles import Node
from ckpttools.containers.torch_file import TorchFile
from ckpttools.findings import INFO, WARNING, Finding
from ckpttools.formats.counters import OPTIMIZER, SCHEDULER
from ckpttools.training import Training

NAMED = re.compile(r"epoch_\d+_step_\d+\.pt")
# besides counters.SCHEDULER, whose states are shown: OpenPCDet's forks
SCHEDULERS = (*SCHEDULER, "scheduler_state", "lr_scheduler_state_dict")


def check_keys(found: Checkpoint) -> Iterator[Finding]:
    """Say what a training checkpoint holds, and warn of what its own framework always saves and is gone."""
    file = found.template
    root = fields.as_mapping(file.value) if isinstance(file, TorchFile) else None
    if root is None:
        return
    path = str(found.path)
    missing = list(_missing(root, found.path.name))
    for framework, key in missing:
        yield Finding(
            id="key-missing",
            severity=WARNING,
            file=path,
            where=key,
            message=f"a training checkpoint of {framework} always has it, and it is not there",
            why="a resume would fail, or start from a default",
            hint="use another checkpoint to resume from; the weights may still be good",
        )
    if missing or has_any(root, OPTIMIZER):
        have, lack = _inventory(root, found.training)
        yield Finding(
            id="training-keys",
            severity=INFO,
            file=path,
            message=f"for a resume it holds {', '.join(have) or 'nothing'}"
            + (f"; not {', '.join(lack)}" if lack else ""),
        )


def _inventory(root: fields.Mapping, state: Training) -> tuple[list[str], list[str]]:
    """What is there, with its value where it is a number, and what is not."""
    step = state.step if state.step is not None else state.iteration
    values = {"epoch": state.epoch, "step": step, "train_loss": state.train_loss, "val_loss": state.val_loss}
    parts = [(name, value is not None, f" {value}") for name, value in values.items()]
    parts += [("optimizer", has_any(root, OPTIMIZER), ""), ("scheduler", has_any(root, SCHEDULERS), "")]
    have = [name + shown for name, there, shown in parts if there]
    return have, [name for name, there, _ in parts if not there]


def has_any(root: fields.Mapping, keys: tuple[str, ...]) -> bool:
    """Whether one of the keys holds more than an empty dict or list."""
    return any(_is_filled(root.get(key)) for key in keys)


def _is_filled(node: Node) -> bool:
    if isinstance(node, list | tuple):
        return bool(node)
    pairs = fields.as_mapping(node)
    return pairs is not None and bool(pairs.names())


def _missing(root: fields.Mapping, name: str) -> Iterator[tuple[str, str]]:
    """Each framework that the file says it is of, with a key that this framework always saves."""
    yield from frameworks.missing_keys(root)
    names = set(root.names())
    if NAMED.fullmatch(name) and "model_state_dict" in names and len(names) > 1:
        needed = {"epoch", "global_step", "optimizer_state_dict"}
        yield from ((f"the name {name}", key) for key in sorted(needed - names))
