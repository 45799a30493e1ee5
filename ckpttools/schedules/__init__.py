"""Learning-rate schedules as mathematics: recognised from saved states, moved to another clock, replayed.

    program = recognise("torch", [scheduler_state], param_groups)
    program.rebased(steps).states()        # `steps`: the old and the new clock (`schedules.lengths`)

`framework` says how states are to be read:

    torch         state dicts of torch.optim.lr_scheduler, stepped in list order
    deepspeed     {"last_batch_iteration": k}; about = ds_config["scheduler"], and "lr" or "optimizer"
    mmengine      MMEngine's param_schedulers; about may hold {"cfg": text, "units_per_epoch": n}
    transformers  the LambdaLR of the Trainer; about = lr_scheduler_type, warmup_steps, max_steps, ...
    timm          timm's scheduler dicts; about may hold {"count": updates made}

Nothing here reads a file or imports a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from ckpttools.errors import UsageError
from ckpttools.schedules.lengths import Batch, Clock, Data, Steps
from ckpttools.schedules.program import Program, Setting, damaged

__all__ = ["WHOLE", "Batch", "Clock", "Data", "Program", "Setting", "Steps", "recognise"]

WHOLE = ("torch", "transformers", "mmengine")  # whose files hold all: what cannot be read was damaged


def recognise(
    framework: str,
    states: Sequence[Mapping[str, object]],
    groups: Sequence[Mapping[str, object]],
    about: Mapping[str, object] = {},
) -> Program:
    """The schedule that `states` are of. `groups` are the param_groups that it acts on.

    Raises UsageError "schedule-unknown" for a framework that is none of these, and "schedule-damaged"
    where a value that is needed is missing or cannot be.
    """
    reader = _reader(framework)
    if not states or not groups:
        raise damaged("there is no scheduler state" if not states else "there are no param_groups")
    if not all(isinstance(x, dict) for x in (*states, *groups)):
        raise damaged("a state or a param_group is not a dict")
    return reader(cast(Any, states), cast(Any, groups), cast(Any, about))


def _reader(framework: str) -> Callable[[Any, Any, Any], Program]:
    """Only that of one library is imported: `ckpt inspect` is to start at once."""
    match framework:
        case "torch":
            from ckpttools.schedules.torch.program import recognise_torch

            return recognise_torch
        case "deepspeed":
            from ckpttools.schedules.deepspeed.program import recognise_deepspeed

            return recognise_deepspeed
        case "mmengine":
            from ckpttools.schedules.mmengine.program import recognise_mmengine

            return recognise_mmengine
        case "timm":
            from ckpttools.schedules.timm import recognise_timm

            return recognise_timm
        case "transformers":
            from ckpttools.schedules.transformers.program import recognise_trainer

            return recognise_trainer
    raise UsageError(
        "schedule-unknown",
        f"schedules of {framework!r} are not known",
        why="each library counts and steps its schedules in its own way",
    )
