"""What a checkpoint says about progress: DeepSpeed's `client_state`, written and read side by side.

Only None, bool, int, float, str, list and dict: any reader understands it without our classes.
DeepSpeed merges these keys into the top level of `mp_rank_00_model_states.pt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpttools.errors import CkptError, UsageError
from ckpttools.trainer.config import Config
from ckpttools.trainer.text import Samples

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A position in training; `epoch` counts completed epochs, so it is also the running one's index."""

    epoch: int = 0
    iteration: int = 0
    samples_seen: int = 0
    samples_in_epoch: int = 0
    train_loss: float | None = None  # of the last update
    val_loss: float | None = None  # None unless evaluated at exactly this position


def client_state(progress: Progress, config: Config, samples: Samples) -> dict[str, Any]:
    """The keys that the trainer adds to a checkpoint."""
    return {
        "format_version": FORMAT_VERSION,
        "epoch": progress.epoch,
        "iter": progress.iteration,
        "global_step": progress.iteration,
        "samples_seen": progress.samples_seen,
        "samples_in_epoch": progress.samples_in_epoch,
        "dataset_size": len(samples.train),
        "dataset_sha256": samples.sha256,
        "train_loss": progress.train_loss,
        "val_loss": progress.val_loss,
        "seed": config.seed,
        "config": config.plain(),
    }


def progress_from(state: Mapping[str, Any], config: Config, samples: Samples, where: Path) -> Progress:
    """The position in a loaded `client_state`. Raises where continuing could not be sample-exact."""
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise UsageError(
            "no-position",
            f"no position of this trainer in the checkpoint (format_version is {version!r})",
            where=where,
            why="without it nobody knows which samples were already seen",
            hint=f"start from the weights alone: --resume-from {where} without --resume",
        )
    if state["samples_in_epoch"] and (
        state["dataset_sha256"] != samples.sha256 or state["seed"] != config.seed
    ):
        what = "seed" if state["seed"] != config.seed else "training text"
        raise CkptError(
            "data-changed",
            f"the {what} is not the one that this checkpoint stopped in the middle of",
            where=where,
            why="some samples of the running epoch would be seen twice and others never",
            hint="use the data section and seed of the config.yaml beside the checkpoint,"
            " or resume from an epoch checkpoint",
        )
    return Progress(
        epoch=state["epoch"],
        iteration=state["iter"],
        samples_seen=state["samples_seen"],
        samples_in_epoch=state["samples_in_epoch"],
        train_loss=state["train_loss"],
        val_loss=state["val_loss"],
    )
