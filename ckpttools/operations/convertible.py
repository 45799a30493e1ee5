"""What keeps an optimizer from becoming another format's: refusals before anything is written."""

from __future__ import annotations

from ckpttools.checkpoint import FP32, STEP, Checkpoint
from ckpttools.errors import CkptError, Unsupported, escape, some
from ckpttools.formats import torch_optimizer
from ckpttools.formats.counters import OPTIMIZER
from ckpttools.transforms.select import without_weights


def needs_names(checkpoint: Checkpoint) -> None:
    """Refuse an optimizer without names where state is saved by name, before it is lost with a note."""
    if checkpoint.groups or not any(checkpoint.client.get(key) for key in OPTIMIZER):
        return
    saved = torch_optimizer.of(checkpoint)
    problem = saved.problem if saved is not None else None
    order = "--like CHECKPOINT takes their order from a checkpoint of a run with the same groups; "
    raise Unsupported(
        "no-groups",
        f"which parameters the optimizer has is not known{f': {problem}' if problem else ''}",
        where=checkpoint.path,
        why="it numbers them, and master weights and state are saved by name",
        hint=f"{order if saved is not None else ''}--reset-optimizer leaves the state out",
    )


def needs_weights(checkpoint: Checkpoint) -> None:
    """Refuse optimizer state of weights that are not there: accelerate's and others' folders of it alone."""
    best = checkpoint.best_copies()
    lacking = [name for group in checkpoint.groups for name in group.params if name not in best]
    if not best:
        raise without_weights(checkpoint)
    if lacking:
        raise CkptError(
            "tensor-missing",
            f"the optimizer trains {some(lacking)}, and there is no weight of that name",
            where=checkpoint.path,
            why="weights and state would be of different models",
            hint="copy all files of the checkpoint again, from one save; or --reset-optimizer",
        )


def lacks(checkpoint: Checkpoint) -> str | None:
    """What the state of the optimizer lacks for any optimizer to go on from it, None where it has all."""
    lacking = ["settings (lr, betas ...)"] * _unset(checkpoint) + ["a count of steps"] * _uncounted(
        checkpoint
    )
    if lacking:
        return f"the optimizer has state without {' and '.join(lacking)}"
    if (done := _forgotten(checkpoint)) is not None:
        return f"the optimizer has settings and no state after {done} steps"
    return None


def needs_state(checkpoint: Checkpoint) -> None:
    """Refuse groups of an optimizer that keeps moments, without any after steps were made, and moments
    without settings: DeepSpeed takes the groups from the file as they are.
    """
    if _unset(checkpoint):
        raise Unsupported(
            "state-incomplete",
            "the optimizer has state and no settings (lr, betas ...)",
            where=checkpoint.path,
            why="DeepSpeed loads the groups as the file has them, and would stop at its first step",
            hint="--like CHECKPOINT takes them from a checkpoint of the run that goes on; --reset-optimizer "
            "begins optimizer and schedule anew",
        )
    if (done := _forgotten(checkpoint)) is not None:
        raise Unsupported(
            "state-incomplete",
            f"the optimizer has settings and no state after {done} steps",
            where=checkpoint.path,
            why="DeepSpeed would begin its moments anew in the middle of a schedule, without a word",
            hint="use a checkpoint that holds it; --reset-optimizer begins optimizer and schedule anew",
        )


def _unset(checkpoint: Checkpoint) -> bool:
    """Whether there are moments without settings."""
    return any(group.state.keys() - {FP32} and not group.hyper for group in checkpoint.groups)


def _uncounted(checkpoint: Checkpoint) -> bool:
    """Whether there are Adam's moments, and neither a parameter nor its group has the step."""
    return any(
        {"exp_avg", "exp_avg_sq"} <= group.state.keys() - group.idle
        and STEP not in group.scalars
        and STEP not in group.hyper
        for group in checkpoint.groups
    )


def _forgotten(checkpoint: Checkpoint) -> int | None:
    """The steps after which an optimizer that keeps moments has none; None where it has, or made no step."""
    done = (checkpoint.training.step or 0) - (checkpoint.training.skipped_steps or 0)
    groups = [group for group in checkpoint.groups if group.params]
    if done <= 0 or not groups or not all("betas" in group.hyper for group in groups):
        return None
    return None if any(group.scalars or group.state.keys() - {FP32} for group in groups) else done


def refuse_unnamed(checkpoint: Checkpoint) -> None:
    """Other tensors than the file's, and an optimizer that means them by their places: raises Unsupported."""
    if checkpoint.unnamed:
        raise Unsupported(
            "no-groups",
            f"which parameters the optimizer under '{escape(checkpoint.unnamed[0])}' has is not known",
            where=checkpoint.path,
            why="it numbers them: with other tensors or names its state would be another parameter's",
            hint="--like CHECKPOINT takes their order from a run with the same groups, "
            "--reset-optimizer leaves the state out",
        )
