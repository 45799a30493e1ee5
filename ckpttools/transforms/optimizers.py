"""Optimizers: the settings and the kind of step count that the class which loads a checkpoint expects.

torch's optimizers count in a 0-d fp32 tensor per parameter, DeepSpeed's in an int, and each reads settings
that others do not save. Source: the defaults in torch/optim of torch 2.13 and deepspeed/ops of 0.19.8.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckpttools.checkpoint import Checkpoint, ParamGroup
from ckpttools.errors import UsageError, escape
from ckpttools.suggest import did_you_mean
from ckpttools.tensors import FLOAT32, Literal, TensorRef
from ckpttools.tree import Value

STEP = "step"
_TORCH: Mapping[str, Value] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
_ADAM: Mapping[str, Value] = {"amsgrad": False, **_TORCH}


@dataclass(frozen=True, slots=True)
class Class:
    """Settings that a class reads and others do not save, with its defaults; whether it counts in tensors."""

    defaults: Mapping[str, Value]
    tensor_step: bool


CLASSES: Mapping[str, Class] = {
    "AdamW": Class({**_ADAM, "decoupled_weight_decay": True}, True),
    "Adam": Class({**_ADAM, "decoupled_weight_decay": False}, True),
    "FusedAdam": Class({"bias_correction": True}, False),
    "DeepSpeedCPUAdam": Class({"bias_correction": True, "amsgrad": False}, False),
    "SGD": Class(
        {
            "momentum": 0,
            "dampening": 0,
            "nesterov": False,
            **{key: value for key, value in _TORCH.items() if key != "capturable"},
        },
        True,
    ),
}
# what AdamW and FusedAdam read: each ignores what only the other does
_ANY_ADAM = Class({**_ADAM, "bias_correction": True}, True)


def for_class(checkpoint: Checkpoint, name: str | None = None) -> Checkpoint:
    """The checkpoint with groups that are complete for the class `name`, and steps as it keeps them.

    Without a name groups of Adam's family get what torch's and DeepSpeed's classes read, others stay, and
    steps become tensors. Raises UsageError for a class that is not known.
    """
    if name is not None and name not in CLASSES:
        raise UsageError(
            "bad-usage",
            f"the settings of the optimizer class '{escape(name)}' are not known",
            hint=did_you_mean(name, [*CLASSES]) or f"choose from {', '.join(CLASSES)}",
        )
    return replace(checkpoint, groups=tuple(_complete(group, name) for group in checkpoint.groups))


def _complete(group: ParamGroup, name: str | None) -> ParamGroup:
    cls = CLASSES[name] if name is not None else _ANY_ADAM if "betas" in group.hyper else Class({}, True)
    hyper = dict(group.hyper)
    if hyper:  # without any, what the run had is not known, and defaults would be a guess
        hyper |= {key: value for key, value in cls.defaults.items() if key not in hyper}
    scalars = dict(group.scalars)
    if STEP in scalars:
        made: dict[int, Value] = {}  # by identity: a ZeRO group's parameters share theirs
        for value in scalars[STEP].values():
            made[id(value)] = _tensor(value) if cls.tensor_step else _int(value)
        scalars[STEP] = {param: made[id(value)] for param, value in scalars[STEP].items()}
    return replace(group, hyper=hyper, scalars=scalars)


def _tensor(value: Value) -> Value:
    """A count as torch keeps it; exact to 2^24, as there."""
    if type(value) not in (int, float):
        return value
    return TensorRef(FLOAT32, (), (Literal(struct.pack("<f", value)),))


def _int(value: Value) -> Value:
    """A count as an int; a tensor's is read from its file."""
    if not isinstance(value, TensorRef) or value.numel != 1:
        return value
    from ckpttools.passes.read import load  # numpy

    return int(load(value).reshape(-1)[0].item())
