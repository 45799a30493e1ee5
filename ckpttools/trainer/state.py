"""What a checkpoint says about progress: DeepSpeed's `client_state`, written and read side by side.

Only None, bool, int, float, str, list and dict: any reader understands it without our classes.
DeepSpeed merges these keys into the top level of `mp_rank_00_model_states.pt`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from ckpttools.errors import CkptError, UsageError
from ckpttools.formats import locate, read
from ckpttools.trainer.config import Config
from ckpttools.trainer.digits import Digits
from ckpttools.trainer.text import Samples

FORMAT_VERSION = 1
Data = Samples | Digits


class Progress(Struct, frozen=True, kw_only=True):
    """A position in training; `epoch` counts completed epochs, so it is also the running one's index."""

    epoch: int = 0
    iteration: int = 0
    samples_seen: int = 0
    samples_in_epoch: int = 0
    train_loss: float | None = None  # of the last update
    val_loss: float | None = None  # None unless evaluated at exactly this position
    metrics: Mapping[str, float] = field(default_factory=dict)  # what else the evaluation measured
    best_val_loss: float | None = None  # the lowest so far
    learning_rate: float | None = None  # of the last update

    @property
    def in_epoch(self) -> int:
        """The number, from 1, of the epoch that the last sample was of; 0 before the first."""
        return self.epoch + (self.samples_in_epoch > 0)

    def improves(self, loss: float) -> bool:
        """Whether a validation loss is the lowest so far. NaN never is: nothing would be less than it."""
        best = self.best_val_loss
        return not math.isnan(loss) and (best is None or math.isnan(best) or loss < best)


def client_state(progress: Progress, config: Config, samples: Data) -> dict[str, Any]:
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
        "metrics": dict(progress.metrics),
        "best_val_loss": progress.best_val_loss,
        "learning_rate": progress.learning_rate,
        "seed": config.seed,
        "config": config.plain(),
    }


def kept_state(checkpoint: Path) -> Mapping[str, Any]:
    """The same keys, read by ckpttools: whatever number of ranks saved it. Raises CkptError."""
    found = read(locate(checkpoint))
    state = found.training
    ours = {"epoch": state.epoch, "train_loss": state.train_loss, "val_loss": state.val_loss}
    return {**ours, **found.client}


def progress_from(state: Mapping[str, Any], config: Config, samples: Data, where: Path) -> Progress:
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
        iteration=state["iter" if "iter" in state else "global_step"],  # ckpt convert writes one of them
        samples_seen=state["samples_seen"],
        samples_in_epoch=state["samples_in_epoch"],
        train_loss=state["train_loss"],
        val_loss=state["val_loss"],
        metrics=state.get("metrics", {}),
        best_val_loss=state.get("best_val_loss"),
        learning_rate=state.get("learning_rate"),
    )
