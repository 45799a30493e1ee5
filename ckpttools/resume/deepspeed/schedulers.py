"""What happens to the learning-rate schedule when DeepSpeed resumes.

The scheduler's saved state is loaded before the optimizer's; the first update is made with the saved
param_groups' lr, whatever the configuration says; then the scheduler steps. DeepSpeed's own schedulers save a
counter alone, their constants are the new configuration's. A scheduler passed by code loads what its class
expects. Source: deepspeed/runtime/engine.py, lr_schedules.py; torch/optim/lr_scheduler.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpttools.frameworks.rules import CAREFUL, SAFE, About
from ckpttools.resume.deepspeed.saved import Saved
from ckpttools.resume.forecast import Difference
from ckpttools.resume.new_run import NewRun, section, whole

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
TAKES = {
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


def unknown(config: Mapping[str, object], name: str) -> tuple[str, str] | None:
    """The first argument that the constructor does not take."""
    required, optional = ARGUMENTS[name]
    given = section(config, "scheduler", "params")
    return next(((name, key) for key in given if key not in (*required, *optional)), None)


def missing(config: Mapping[str, object], name: str) -> tuple[str, int] | None:
    """How many required arguments are not given."""
    absent = [key for key in ARGUMENTS[name][0] if key not in section(config, "scheduler", "params")]
    return (name, len(absent)) if absent else None


def bad_warmup(config: Mapping[str, object]) -> tuple[object] | None:
    """A warmup_num_steps that WarmupLR refuses."""
    params = section(config, "scheduler", "params")
    steps = params.get("warmup_num_steps", "auto")
    return (steps,) if steps != "auto" and (whole(steps) or 0) < 1 else None


def absent_key(state: Mapping[str, object] | None, name: str) -> str | None:
    """What load_state_dict of a scheduler looks for in a state and does not find."""
    key = OWN if name in ARGUMENTS else TAKES.get(name)
    return key if key is not None and state is not None and key not in state else None


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


TORCH = (
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
            about=About.SCHEDULE,
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
