"""What happens to the learning-rate schedule when DeepSpeed resumes.

The scheduler's saved state is loaded before the optimizer's; the first update is made with the saved
param_groups' lr, whatever the configuration says; then the scheduler steps. DeepSpeed's own schedulers save a
counter alone, their constants are the new configuration's. A scheduler passed by code loads what its class
expects. Source: deepspeed/runtime/engine.py, lr_schedules.py; torch/optim/lr_scheduler.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpttools.resume import report
from ckpttools.resume.engine import Saved
from ckpttools.resume.report import CAREFUL, IMPOSSIBLE, SAFE, Difference, Refusal
from ckpttools.resume.run import NewRun, section, whole

OWN = "last_batch_iteration"
# constructor arguments, the required ones first; a scheduler's state is the counter alone
_WARMUP = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", OWN)
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "WarmupLR": ((), _WARMUP),
    "WarmupDecayLR": (("total_num_steps",), _WARMUP),
    "WarmupCosineLR": (
        ("total_num_steps",),
        ("warmup_min_ratio", "warmup_num_steps", "cos_min_ratio", "warmup_type", OWN),
    ),
    "OneCycle": (
        ("cycle_min_lr", "cycle_max_lr"),
        (
            "decay_lr_rate", "cycle_first_step_size", "cycle_second_step_size", "cycle_first_stair_count",
            "cycle_second_stair_count", "decay_step_size", "cycle_momentum", "cycle_min_mom", "cycle_max_mom",
            "decay_mom_rate", OWN,
        ),
    ),
    "LRRangeTest": (
        (),
        (
            "lr_range_test_min_lr", "lr_range_test_step_size", "lr_range_test_step_rate",
            "lr_range_test_staircase", OWN,
        ),
    ),
}  # fmt: skip
# torch's schedulers whose load_state_dict takes a key out of the state before anything else
_TAKES = {
    "LambdaLR": "lr_lambdas",
    "MultiplicativeLR": "lr_lambdas",
    "SequentialLR": "_schedulers",
    "ChainedScheduler": "_schedulers",
}


def type_of(config: Mapping[str, object]) -> str | None:
    found = section(config, "scheduler").get("type")
    return found if isinstance(found, str) else None


def in_effect(saved: Saved, run: NewRun, config: Mapping[str, object]) -> str | None:
    """The new run's scheduler: its class, "client" for one of the user's that nobody named, or None."""
    if run.scheduler == "none":
        return None
    if run.scheduler is not None:
        return run.scheduler
    own = type_of(config)
    if own is not None:
        return own
    return "client" if saved.scheduler is not None and OWN not in saved.scheduler else None


def is_own(name: str | None) -> bool:
    return name in ARGUMENTS


def schedule(saved: Saved, run: NewRun, config: Mapping[str, object]) -> Iterator[Difference]:
    """The scheduler's constructor, its state, and what becomes of the learning rate."""
    name = in_effect(saved, run, config)
    if run.scheduler is None:
        yield from _buildable(config)
    old = type_of(saved.config) if saved.scheduler is not None and OWN in saved.scheduler else None
    shown = old or ("client" if saved.scheduler is not None else None)
    if name == shown or name == "client":
        return
    refusal = _refusal(saved.scheduler, name)
    if refusal is not None:
        yield Difference(
            setting="scheduler.type",
            old=shown,
            new=name,
            cls=IMPOSSIBLE,
            why="the checkpoint holds no scheduler's state"
            if saved.scheduler is None
            else f"{name} does not find its own state in the checkpoint",
            hint="use the scheduler of the run that saved it, or pass load_lr_scheduler_states=False",
            refusal=refusal,
        )
    elif name is None:
        yield Difference(
            setting="scheduler.type",
            old=shown,
            new=None,
            cls=CAREFUL,
            why="the learning rate stays at the saved one for ever",
            hint="keep the scheduler",
        )
    elif not (old is None and same_class(saved.scheduler, name)):
        what = (
            "only the counter is taken over"
            if is_own(name)
            else "the saved fields are taken over as they are"
        )
        yield Difference(
            setting="scheduler.type",
            old=shown,
            new=name,
            cls=CAREFUL,
            why=f"it loads: {what}, and the curve is {name}'s from the second update on",
        )


def same_class(state: Mapping[str, object] | None, name: str) -> bool:
    """Whether a torch scheduler's state is one of the class named, by the fields that only it has."""
    signs = {
        "LambdaLR": {"lr_lambdas"},
        "StepLR": {"step_size", "gamma"},
        "MultiStepLR": {"milestones", "gamma"},
        "ConstantLR": {"factor", "total_iters"},
        "LinearLR": {"start_factor", "end_factor"},
        "PolynomialLR": {"total_iters", "power"},
        "CosineAnnealingLR": {"T_max", "eta_min"},
        "CosineAnnealingWarmRestarts": {"T_0", "T_mult"},
        "OneCycleLR": {"_schedule_phases"},
        "CyclicLR": {"step_ratio"},
        "ReduceLROnPlateau": {"num_bad_epochs"},
        "SequentialLR": {"_schedulers", "_milestones"},
    }
    if state is None:
        return False
    if name == "ExponentialLR":
        return "gamma" in state and not {"step_size", "milestones", "step_ratio"} & state.keys()
    return name in signs and signs[name] <= state.keys()


def _refusal(state: Mapping[str, object] | None, name: str | None) -> Refusal | None:
    """What loading a saved state (None: there is none) into the scheduler `name` raises."""
    if name is None:
        return None
    error, text = "", ""
    if is_own(name):
        if state is None:
            error, text = "TypeError", "'NoneType' object is not subscriptable"
        elif OWN not in state:
            error, text = "KeyError", f"'{OWN}'"
    elif state is None:
        if name in _TAKES:
            error, text = "AttributeError", "'NoneType' object has no attribute 'pop'"
        else:
            error, text = "TypeError", "'NoneType' object is not iterable"
    elif name in _TAKES and _TAKES[name] not in state:
        error, text = "KeyError", f"'{_TAKES[name]}'"
    return Refusal(moment=report.SCHEDULE_STATE, error=error, text=text) if error else None


def _buildable(config: Mapping[str, object]) -> Iterator[Difference]:
    """What the constructor refuses."""
    name = type_of(config)
    if name is None:
        return
    common: dict[str, Any] = {"setting": "scheduler", "old": None, "new": name, "cls": IMPOSSIBLE}
    if name not in ARGUMENTS:
        error, text = "AssertionError", f"DeepSpeed does not recognize LR scheduler {name}"
        if name in _TORCH:
            error, text = "TypeError", "DeepSpeedZeroOptimizer is not an Optimizer"
        yield Difference(
            **common,
            why="DeepSpeed builds its own five schedulers; one of torch's has to be passed by the code",
            hint=f"use one of {', '.join(ARGUMENTS)}",
            refusal=Refusal(moment=report.SCHEDULER, error=error, text=text),
        )
        return
    required, optional = ARGUMENTS[name]
    given = section(config, "scheduler", "params")
    unknown = [key for key in given if key not in (*required, *optional)]
    missing = [key for key in required if key not in given]
    error, text = "TypeError", ""
    if unknown:
        text = f"{name}.__init__() got an unexpected keyword argument '{unknown[0]}'"
    elif missing:
        text = f"{name}.__init__() missing {len(missing)} required positional argument"
    elif "warmup_num_steps" in given and given["warmup_num_steps"] != "auto":
        steps = given["warmup_num_steps"]
        if whole(steps) is None or whole(steps) == 0 or (whole(steps) or 0) < 0:
            error, text = "ValueError", f"warmup_num_steps must be a positive integer, got {steps}"
    if text:
        yield Difference(
            **common,
            why="the scheduler cannot be built with these settings",
            hint="correct scheduler.params",
            refusal=Refusal(moment=report.SCHEDULER, error=error, text=text),
        )


_TORCH = (
    "LambdaLR", "MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR",
    "SequentialLR", "PolynomialLR", "CosineAnnealingLR", "ChainedScheduler", "ReduceLROnPlateau", "CyclicLR",
    "OneCycleLR", "CosineAnnealingWarmRestarts",
)  # fmt: skip


def constants(
    saved: Saved,
    config: Mapping[str, object],
    old_next: tuple[float, ...] | None,
    new_next: tuple[float, ...] | None,
) -> Iterator[Difference]:
    """Constants of the same scheduler that are other ones now: they take effect after the first update."""
    if type_of(saved.config) != type_of(config) or type_of(config) is None:
        return
    old, new = section(saved.config, "scheduler", "params"), section(config, "scheduler", "params")
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if was == now or now == "auto":
            continue
        same = old_next is not None and old_next == new_next
        yield Difference(
            setting=f"scheduler.params.{key}",
            old=was,
            new=now,
            cls=SAFE if same else CAREFUL,
            why="the next learning rate is the same; the curve is another one further on"
            if same
            else "DeepSpeed takes the constants from the configuration: the learning rate jumps "
            "after the first "
            f"resumed update{_jump(old_next, new_next)}",
        )


def _jump(old: tuple[float, ...] | None, new: tuple[float, ...] | None) -> str:
    if not old or not new:
        return ""
    return f", to {new[0]:.6g} where the old curve has {old[0]:.6g}"
