"""What keeps an optimizer from becoming another format's: refusals before anything is written."""

from __future__ import annotations

from ckpttools.checkpoint import FP32, Checkpoint
from ckpttools.errors import Unsupported, escape
from ckpttools.formats import torch_optimizer
from ckpttools.formats.counters import OPTIMIZER


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


def needs_state(checkpoint: Checkpoint) -> None:
    """Refuse groups of an optimizer that keeps moments, without any after steps were made, and moments
    without settings: DeepSpeed takes the groups from the file as they are.
    """
    if any(group.state.keys() - {FP32} and not group.hyper for group in checkpoint.groups):
        raise Unsupported(
            "state-incomplete",
            "the optimizer has state and no settings (lr, betas ...)",
            where=checkpoint.path,
            why="DeepSpeed loads the groups as the file has them, and would stop at its first step",
            hint="--like CHECKPOINT takes them from a checkpoint of the run that goes on; --reset-optimizer "
            "begins optimizer and schedule anew",
        )
    done = (checkpoint.training.step or 0) - (checkpoint.training.skipped_steps or 0)
    groups = [group for group in checkpoint.groups if group.params]
    if done <= 0 or not groups or not all("betas" in group.hyper for group in groups):
        return
    if not any(group.scalars or group.state.keys() - {FP32} for group in groups):
        raise Unsupported(
            "state-incomplete",
            f"the optimizer has settings and no state after {done} steps",
            where=checkpoint.path,
            why="DeepSpeed would begin its moments anew in the middle of a schedule, without a word",
            hint="use a checkpoint that holds it; --reset-optimizer begins optimizer and schedule anew",
        )


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
