"""Optimizers: the settings and the kind of step count that the class which loads a checkpoint expects.

torch's optimizers count in a 0-d fp32 tensor per parameter, DeepSpeed's in an int, and each reads settings
that others do not save. Source: the defaults in torch/optim of torch 2.13 and deepspeed/ops of 0.19.8.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from math import isfinite

from msgspec import Struct, field
from msgspec.structs import replace

from ckpttools.checkpoint import FP32, STEP, Checkpoint, ParamGroup
from ckpttools.errors import CkptError, Unsupported, UsageError, escape, some
from ckpttools.suggest import did_you_mean
from ckpttools.tensors import FLOAT32, Literal, TensorRef
from ckpttools.tree import Value

BEFORE_THE_FIRST: Mapping[str, Value] = {"last_batch_iteration": -1}  # deepspeed/runtime/lr_schedules.py
_TORCH: Mapping[str, Value] = {"maximize": False, "foreach": None, "differentiable": False}
_FUSED: Mapping[str, Value] = {**_TORCH, "fused": None}
_ADAM: Mapping[str, Value] = {"amsgrad": False, "capturable": False, **_FUSED}
# what schedule-free and Prodigy optimizers count in their groups
COUNTED = frozenset(("k", "weight_sum", "lr_max", "scheduled_lr", "d", "d_max", "d_numerator", "d_denom"))
_EXACT = 2**24  # a 32-bit float holds every whole number up to it
_MOMENTS = frozenset(("exp_avg", "exp_avg_sq"))
# settings of classes that count in tensors, or are loaded by such; torch's SparseAdam has none of them, nor
# have transformers' Adafactor and most of training code's own, which compute with ints
_OF_TENSORS = frozenset(("amsgrad", "foreach", "capturable", "bias_correction"))


class Class(Struct, frozen=True, kw_only=True):
    """An optimizer class: settings that it reads and others do not save, with its defaults; whether it counts
    in tensors; the kinds of state that it needs, and that it keeps at times; kinds that another class of the
    same arithmetic calls otherwise.
    """

    defaults: Mapping[str, Value]
    tensor_step: bool = True
    needs: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)


def _adam(decoupled: bool) -> Class:
    defaults = {**_ADAM, "decoupled_weight_decay": decoupled}
    return Class(defaults=defaults, needs=_MOMENTS, may=frozenset(("max_exp_avg_sq",)))


def _lion(needs: frozenset[str]) -> Class:
    # DeepSpeed's CPU version allocates exp_avg_sq too, and never looks at it
    return Class(defaults={}, tensor_step=False, needs=needs, may=frozenset(("exp_avg_sq",)))


CLASSES: Mapping[str, Class] = {
    "AdamW": _adam(True),
    "Adam": _adam(False),
    "FusedAdam": Class(defaults={"bias_correction": True}, tensor_step=False, needs=_MOMENTS),
    "DeepSpeedCPUAdam": Class(
        defaults={"bias_correction": True, "amsgrad": False}, tensor_step=False, needs=_MOMENTS
    ),
    "SGD": Class(
        defaults={"momentum": 0, "dampening": 0, "nesterov": False, **_FUSED},
        may=frozenset(("momentum_buffer",)),
    ),
    "Adagrad": Class(
        defaults={"lr_decay": 0, "initial_accumulator_value": 0, **_FUSED},
        needs=frozenset(("sum",)),
        renamed={"exp_avg_sq": "sum"},
    ),
    "DeepSpeedCPUAdagrad": Class(
        defaults={"amsgrad": False},
        tensor_step=False,
        needs=frozenset(("exp_avg_sq",)),
        renamed={"sum": "exp_avg_sq"},
    ),
    "FusedLion": _lion(frozenset(("exp_avg",))),
    "DeepSpeedCPULion": _lion(frozenset(("exp_avg",))),
    "Adafactor": Class(
        defaults={"beta2_decay": -0.8, "d": 1.0, "foreach": None, "maximize": False},
        may=frozenset(("row_var", "col_var", "variance")),
    ),
    "Muon": Class(
        defaults={
            "nesterov": True,
            "ns_coefficients": (3.4445, -4.775, 2.0315),
            "eps": 1e-7,
            "ns_steps": 5,
            "adjust_lr_fn": None,
        },
        needs=frozenset(("momentum_buffer",)),
    ),
}
_COUPLED = "weight decay was part of the gradients: make {} with adam_w_mode=False, or it is decoupled"
# what AdamW and FusedAdam read: each ignores what only the other does
_ANY_ADAM = Class(defaults={**_ADAM, "bias_correction": True})


def for_class(checkpoint: Checkpoint, name: str | None = None) -> Checkpoint:
    """The checkpoint with groups that are complete for the class `name`, and steps as it keeps them.

    Without a name groups of Adam's family get what torch's and DeepSpeed's classes read, others stay, and
    steps become tensors; a class of the training code's own that counts in ints goes on with ints. Raises
    UsageError for a class that is not known, Unsupported for one that keeps other state.
    """
    if name is not None and name not in CLASSES:
        raise UsageError(
            "bad-usage",
            f"the settings of the optimizer class '{escape(name)}' are not known",
            where="--optimizer-class",
            why="the groups would lack what that class asks for when it loads them",
            hint=did_you_mean(name, [*CLASSES]) or f"choose from {', '.join(CLASSES)}",
        )
    groups = checkpoint.groups
    if name is not None:
        groups = tuple(_kept_by(checkpoint, name, group) for group in groups)
        optimizer = None if checkpoint.optimizer is None else name
        notes = (*checkpoint.notes, *[_COUPLED.format(name)] * any(_coupled(each, name) for each in groups))
        checkpoint = replace(checkpoint, optimizer=optimizer, notes=notes)
    made = tuple(group if name is None and _is_own(group) else _complete(group, name) for group in groups)
    if any(map(_rounded, groups, made)):
        note = "steps beyond 2^24 are rounded: torch counts in 32-bit floats, which do not hold all of them"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    return replace(checkpoint, groups=made)


def _kept_by(checkpoint: Checkpoint, name: str, group: ParamGroup) -> ParamGroup:
    """The group with its state as the class calls it."""
    cls = CLASSES[name]
    if group.hyper.get("maximize") and "maximize" not in cls.defaults:
        raise Unsupported(
            "optimizer-differs",
            f"a group has maximize, which {name} does not read",
            where=checkpoint.path,
            why="its updates would go the other way: what was maximised would be minimised from there on",
            hint="name the class that the state is of, or leave the option out",
        )

    def called(kind: str) -> str:
        return cls.renamed.get(kind, kind) if cls.renamed.get(kind) not in group.state else kind

    state = {called(kind): refs for kind, refs in group.state.items()}
    held = (state.keys() | group.scalars.keys()) - {FP32, STEP}
    if held and not (cls.needs <= held <= cls.needs | cls.may):
        raise Unsupported(
            "optimizer-differs",
            f"{name} keeps {_shown(cls.needs | cls.may)}, the state here is {_shown(held)}",
            where=checkpoint.path,
            why="one optimizer's state means nothing to another: a resume would fail, or go astray",
            hint="name the class that the state is of, or begin anew: --reset-optimizer",
        )
    return replace(group, state=state)


def _coupled(group: ParamGroup, name: str) -> bool:
    """Whether a group's weight decay is part of its gradients, and the class goes by how it is made: its
    adam_w_mode is True by default, and no setting of groups (deepspeed/ops/adam, fused_adam and cpu_adam).
    """
    decays = group.hyper.get("decoupled_weight_decay") is False and bool(group.hyper.get("weight_decay"))
    return decays and name in ("FusedAdam", "DeepSpeedCPUAdam")


def _shown(kinds: Collection[str]) -> str:
    return ", ".join(map(escape, sorted(kinds))) or "none"


def _is_own(group: ParamGroup) -> bool:
    """Whether the state is of a class that neither torch's nor DeepSpeed's Adam reads, and counts in ints."""
    ints = any(type(step) is int for step in group.scalars.get(STEP, {}).values())
    return ints and bool(group.hyper) and not group.hyper.keys() & _OF_TENSORS


def _complete(group: ParamGroup, name: str | None) -> ParamGroup:
    cls = _ANY_ADAM if {"betas", "eps"} <= group.hyper.keys() else Class(defaults={})
    cls = CLASSES[name] if name is not None else cls
    hyper = dict(group.hyper)
    if hyper:  # without any, what the run had is not known, and defaults would be a guess
        hyper |= {key: value for key, value in cls.defaults.items() if key not in hyper}
    scalars = dict(group.scalars)
    if STEP in scalars:
        scalars[STEP] = counted(scalars[STEP], tensor=cls.tensor_step)
    return replace(group, hyper=hyper, scalars=scalars)


def _rounded(before: ParamGroup, after: ParamGroup) -> bool:
    """Whether a step has become a tensor that does not hold it."""
    steps, now = before.scalars.get(STEP, {}), after.scalars.get(STEP, {})
    large = (
        (name, step) for name, step in steps.items() if type(step) in (int, float) and abs(step) > _EXACT
    )
    return any(
        isinstance(now[name], TensorRef) and step != struct.unpack("<f", _fp32(step))[0]
        for name, step in large
    )


def counted(steps: Mapping[str, Value], *, tensor: bool) -> dict[str, Value]:
    """Steps by parameter, as tensors or as ints."""
    made: dict[int, Value] = {}  # by identity: a ZeRO group's parameters share theirs
    for value in steps.values():
        made[id(value)] = _tensor(value) if tensor else _int(value)
    return {param: made[id(value)] for param, value in steps.items()}


def anew(checkpoint: Checkpoint) -> Checkpoint:
    """Weights and settings, with optimizer and schedule as before the first step: a learning rate or momentum
    that was scheduled is the first one again, and the counters of updates are 0. Optimizers and schedules
    among the client's values go too, and a note names them; so it does what a group counts for itself.
    """

    def fresh(group: ParamGroup) -> ParamGroup:
        masters = {kind: refs for kind, refs in group.state.items() if kind == FP32}
        return replace(group, state=masters, scalars={}, paths={}, hyper=_first(group.hyper))

    state = checkpoint.training
    # DeepSpeed's own schedulers, which ds_config names: it fails to load them without a state
    own = isinstance(state.scheduler, Mapping) and state.scheduler.keys() == BEFORE_THE_FIRST.keys()
    step, skipped = (0 if count is not None else None for count in (state.step, state.skipped_steps))
    samples = 0 if state.samples is not None else None
    # where the file has one key for both, it counts updates
    one = "step" in state.keys and state.keys.get("iteration") == state.keys["step"]
    dropped = {*checkpoint.unnamed, *checkpoint.schedules}
    note = f"not carried from the client's values: {_shown(dropped)} (optimizers and schedules)"
    own_counts = {key for group in checkpoint.groups for key in group.hyper if key in COUNTED}
    kept = f"the groups keep what their optimizer counted there: {_shown(own_counts)}"
    return replace(
        checkpoint,
        client={key: value for key, value in checkpoint.client.items() if key not in dropped},
        notes=(*checkpoint.notes, *[note] * bool(dropped), *[kept] * bool(own_counts)),
        groups=tuple(fresh(group) for group in checkpoint.groups),
        training=replace(
            state,
            scheduler=BEFORE_THE_FIRST if own else {},
            step=step,
            iteration=step if one else state.iteration,
            skipped_steps=skipped,
            samples=samples,
        ),
    )


def _first(hyper: Mapping[str, Value]) -> dict[str, Value]:
    """Settings as before the first step. Cycled momentum begins at its largest (torch's OneCycleLR and
    CyclicLR, torch/optim/lr_scheduler.py); older Adams of apex and DeepSpeed count in the group.
    """
    first = {key: value for key, value in hyper.items() if key != STEP}
    if "initial_lr" in hyper:
        first["lr"] = hyper["initial_lr"]
    if (most := hyper.get("max_momentum")) is not None:
        betas = hyper.get("betas")
        if isinstance(betas, list | tuple) and betas:
            first["betas"] = type(betas)((most, *betas[1:]))
        elif "momentum" in hyper:
            first["momentum"] = most
    return first


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise Unsupported for state in blocks with scales of their own, which are not cut by elements."""
    for group in checkpoint.groups:
        for kind, refs in group.state.items():
            short = next((ref.dtype.short for ref in refs.values() if ref.dtype.itemsize == 1), None)
            if short is not None:
                raise Unsupported(
                    "state-quantised",
                    f"optimizer state '{escape(kind)}' is quantised ({short}), in blocks with scales",
                    where=checkpoint.path,
                    why="they are not cut by elements, and no other optimizer reads them",
                    hint="--to pt or dcp without ranks keeps it whole; --reset-optimizer leaves it out",
                )


def _tensor(value: Value) -> Value:
    """A count as torch keeps it; exact to 2^24, as there."""
    if type(value) not in (int, float):
        return value
    return TensorRef(FLOAT32, (), (Literal(_fp32(value)),))


def _fp32(step: float) -> bytes:
    try:
        return struct.pack("<f", step)
    except (OverflowError, struct.error):
        raise _no_count(step) from None


def _no_count(step: float) -> CkptError:
    return CkptError(
        "nonfinite",
        f"a parameter's step is {some([step])}, and no optimizer counts so far",
        why="no count of updates is known to put in its place",
        hint="ckpt verify names the file; an older checkpoint, or --reset-optimizer",
    )


def _int(value: Value) -> Value:
    """A count as an int; a tensor's is read from its file."""
    if not isinstance(value, TensorRef) or value.numel != 1:
        return value
    from ckpttools.passes.read import load  # numpy

    step = load(value).reshape(-1)[0].item()
    if not isinstance(step, int | float) or not isfinite(step):
        raise _no_count(step)
    return int(step)
