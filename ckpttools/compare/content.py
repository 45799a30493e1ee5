"""What a checkpoint holds, by kind and name, unread: the same for every layout of the same training state.

Kinds are "weight" (the model's weights and buffers as saved), "master" (the fp32 copies that the optimizer
works on) and the optimizer's own: "exp_avg", "momentum_buffer", "step" ... Tied names each have their weight
and master; the optimizer's state is under the one name that the optimizer knows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import xxhash
from msgspec import Struct

from ckpttools.checkpoint import FP32, PARAM_NAMES, Checkpoint
from ckpttools.containers.pickles import Persistent, Reject, dumps, walk
from ckpttools.tensors import TensorRef
from ckpttools.tree import Key, Opaque, Value

WEIGHT, MASTER = "weight", "master"
# of param_groups: how an implementation computes, or what a container needs, not what is computed
NEUTRAL = frozenset({"params", PARAM_NAMES, "foreach", "fused", "capturable", "differentiable"})
# what holds where nothing is said. torch's Adams all correct the bias, and DeepSpeed's know neither of the
# next two (torch/optim/adam.py, deepspeed/ops/adam/fused_adam.py); only it counts updates that were left out
UNSAID: Mapping[str, object] = {
    "bias_correction": True,
    "amsgrad": False,
    "maximize": False,
    "skipped_steps": 0,
}
# in how many parts a batch is worked on: follows from the number of ranks
DIVISION = frozenset({"micro", "accumulation"})

_INDEX = re.compile(r"\[(\d+)\]")

Held = Mapping[str, Mapping[str, TensorRef | Value]]  # kind -> name -> a tensor, or a plain value
Read = Callable[[TensorRef], object]  # a tensor inside a value, as a number or a text
Keys = Callable[[Key], str]


class Content(Struct, frozen=True, kw_only=True):
    """`held` has a TensorRef for what is a tensor; `tied` maps an alias to its owner.

    In `counts` are the kinds that are kept beside the tensors of the parameters' shapes: there, a tensor of
    one element is a number. A parameter of one element has moments of one element, which are tensors.
    """

    held: Held
    tied: Mapping[str, str]
    counts: frozenset[str]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind, found in self.held.items() if found)


def content(checkpoint: Checkpoint) -> Content:
    """Everything that training goes on from, but for settings and counters."""
    held: dict[str, dict[str, TensorRef | Value]] = {WEIGHT: {**checkpoint.tensors}, MASTER: {}}
    for group in checkpoint.groups:
        for kind, found in (*group.state.items(), *group.scalars.items()):
            held.setdefault(_kind(kind), {}).update(found)
    for alias, owner in checkpoint.shared.items():
        for kind in (WEIGHT, MASTER):
            if owner in held[kind]:
                held[kind].setdefault(alias, held[kind][owner])
    counts = frozenset(_kind(kind) for group in checkpoint.groups for kind in group.scalars)
    return Content(held=held, tied=checkpoint.shared, counts=counts | {"step"})


def _kind(key: str) -> str:
    """As every layout names it: distributed checkpoints join the keys of lists by dots, too."""
    if key == FP32:
        return MASTER
    key = _INDEX.sub(r".\1", key)
    return f"optimizer.{key}" if key in (WEIGHT, MASTER) else key


def is_number(value: TensorRef | Value) -> bool:
    """Whether a value is one number, as a tensor of one element is: a step may be either."""
    if isinstance(value, TensorRef):
        return value.numel == 1 and len(value.shape) <= 1
    return isinstance(value, int | float)


def number(value: float) -> object:
    """The number itself: an int where it is whole, so that 3 and 3.0 agree; -0.0 and NaN stay as they are."""
    if isinstance(value, bool) or not isinstance(value, float) or not math.isfinite(value):
        return value
    whole = value.is_integer() and not (value == 0 and math.copysign(1, value) < 0)
    return int(value) if whole else value


def plain(value: Value, read: Read, keys: Keys = str, depth: int = 64) -> object:
    """A value as JSON-ready data in which equal means the same in any container: a tuple is a list, and
    `keys` gives a key's text.
    """
    match value:
        case bool() | int() | float():
            return number(value)
        case TensorRef():
            return read(value)
        case Mapping() if depth > 0:
            return {keys(key): plain(inner, read, keys, depth - 1) for key, inner in value.items()}
        case list() | tuple() if depth > 0:
            return [plain(inner, read, keys, depth - 1) for inner in value]
        case bytes() | bytearray():
            return value.hex()
        case None | str():
            return value
        case Opaque():
            return f"<{value.shown}{' ' * bool(said := inside(value))}{said}>"
    return f"<{value}>"


def inside(value: Opaque) -> str:
    """A digest of what an object holds; "" where it holds tensors or has no pickled form: two of one class
    may differ then, and nobody has looked.
    """
    node: Any = value.node
    try:
        if holds_tensors(value):
            return ""
        return str(xxhash.xxh3_64_hexdigest(dumps(node)))
    except (Reject, TypeError):
        return ""


def holds_tensors(value: Opaque) -> bool:
    """Whether there are tensors in an object of a torch file."""
    node: Any = value.node
    return any(isinstance(held, Persistent) for held in walk(node))


def hyper(
    checkpoint: Checkpoint, read: Read, keys: Keys = str
) -> Iterator[tuple[frozenset[str], dict[str, object]]]:
    """For each parameter group its names and its hyper-parameters, without how they are computed with."""
    for group in checkpoint.groups:
        kept = {key: value for key, value in group.hyper.items() if key not in NEUTRAL and value is not None}
        yield frozenset(group.params), {key: plain(value, read, keys) for key, value in kept.items()}


def told(values: Mapping[str, object]) -> dict[str, object]:
    """Settings or counters without those that say what holds where nothing is said."""
    return {
        key: value
        for key, value in values.items()
        if key not in UNSAID or (type(value), value) != (type(UNSAID[key]), UNSAID[key])
    }


def progress(checkpoint: Checkpoint, read: Read, keys: Keys = str) -> dict[str, dict[str, object]]:
    """Counters, losses, schedule, batch and loss scale by part and name; what is not known is left out."""
    state = checkpoint.training
    counters: dict[str, object] = {
        "step": state.step,
        "iteration": state.iteration,
        "epoch": state.epoch,
        "samples": state.samples,
        "skipped_steps": state.skipped_steps,
    }
    losses: dict[str, object] = {"train_loss": state.train_loss, "val_loss": state.val_loss}
    parts: dict[str, Mapping[str, object]] = {
        "counters": counters,
        "losses": losses,
        "schedule": _named(state.scheduler),
        "batch": {key: value for key, value in state.saved_batch.items() if key not in DIVISION},
        "loss scale": {} if _is_one(checkpoint.loss_scaler) else _named(checkpoint.loss_scaler),
        "optimizer": {"class": checkpoint.optimizer},
    }
    return {
        part: {key: plain(value, read, keys) for key, value in found.items() if value is not None}
        for part, found in parts.items()
    }


def _is_one(scaler: Mapping[str, Value]) -> bool:
    """Whether a loss scaler does nothing: DeepSpeed writes one in bf16 and fp32, too."""
    return scaler.get("cur_scale") == 1 and scaler.get("dynamic") is False


def _named(value: Value) -> Mapping[str, object]:
    """State as saved, of one scheduler or of several in a list."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return {str(i): inner for i, inner in enumerate(value)}
    return {"state": value}
