"""The training loop: updates, evaluations, and when to save."""

from __future__ import annotations

import time
import zlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from msgspec import Struct, field
from msgspec.structs import replace

from ckpttools.trainer import folders
from ckpttools.trainer.config import Config
from ckpttools.trainer.engine import Engine, from_rank0
from ckpttools.trainer.evaluation import judge, summed
from ckpttools.trainer.monitor import Monitor
from ckpttools.trainer.order import Order
from ckpttools.trainer.policy import PART, Policy
from ckpttools.trainer.saving import Saving
from ckpttools.trainer.signals import Asked
from ckpttools.trainer.split import Split
from ckpttools.trainer.state import Progress, client_state
from ckpttools.trainer.task import Task


class Training(Struct, kw_only=True):
    """One rank's part of a run."""

    config: Config
    policy: Policy
    split: Split
    order: Order
    task: Task
    engine: Engine
    saving: Saving
    monitor: Monitor
    asked: Asked
    progress: Progress
    saved: Path | None = None  # the last checkpoint
    saved_step: int = -1  # of this launch; -1: none was
    _saved_at: float = field(default_factory=time.monotonic)

    def train(self, max_steps: int | None) -> str | None:
        """Go on until the planned epochs, or `max_steps` updates counted from step 0, are done.

        A run that `max_steps` stops saves a step checkpoint, unless these are off; the schedule does not
        know about `max_steps`, so that the resumed run is the run that was never stopped. Returns the name
        of the signal that ended it, None where none did.
        """
        every = 0 if self.policy.only_best else self.config.save.save_steps
        while self.progress.epoch < self.config.epochs:
            for ids in self.order.batches(self.progress.epoch, self.progress.samples_in_epoch):
                if max_steps is not None and self.progress.iteration >= max_steps:
                    return None
                asked = self.update(ids)
                last = self.progress.iteration == max_steps
                if asked or (every and (last or self.progress.iteration % every == 0)) or self._is_time():
                    self.save_step()
                if asked:
                    return self.asked.by or "SIGTERM"  # another rank's, where it is not known here
            self.end_epoch()
        self.end()
        return None

    def update(self, ids: Sequence[int]) -> bool:
        """One optimizer step on one global batch, and its line in the log. Whether some rank is to stop."""
        started = time.perf_counter()
        lr = self.engine.rate()  # before the step: the scheduler moves on inside it
        ids = [self.task.data.train[i] for i in ids]  # the order is of positions among these
        total, norm = self.engine.update(self.split.micro_batches(ids, dist.get_rank()), self.task.loss)
        # fp64, so that the order of summing does not show in the logged value
        total, asked = summed([total, float(self.asked.by is not None)], self.engine.device)
        before = self.progress
        self.progress = replace(
            before,
            iteration=before.iteration + 1,
            samples_seen=before.samples_seen + len(ids),
            samples_in_epoch=before.samples_in_epoch + len(ids),
            train_loss=total / (self.split.accumulation * self.split.world),
            val_loss=None,
            metrics={},
            learning_rate=lr,
        )
        rate = len(ids) / (time.perf_counter() - started)
        crc = zlib.crc32(array("q", ids).tobytes())
        self.monitor.update(self.progress, self.config.epochs, lr=lr, norm=norm, rate=rate, crc=crc)
        return asked > 0

    def _is_time(self) -> bool:
        """Whether `save_minutes` have gone by since the last save, by the clock of rank 0."""
        minutes = self.config.training.save_minutes
        if minutes is None:
            return False
        return from_rank0(lambda: time.monotonic() - self._saved_at >= minutes * 60)

    def save_step(self) -> None:
        """A step checkpoint of the present position."""
        if self.policy.partial:
            part = self.evaluate(self.task.data.held_out[::PART])
            self.monitor.evaluated(
                self.progress, f"step {self.progress.iteration} on a part", part, of="partial"
            )
        self.save(self._name(folders.step_name, self.progress.epoch + 1))

    def end_epoch(self) -> None:
        """Evaluate, then save the epoch checkpoint, which therefore holds its validation loss."""
        epoch = self.progress.epoch + 1
        improved = False
        if self.policy.evaluates:
            improved = self._validate(f"epoch {epoch}/{self.config.epochs} done")
        self.progress = replace(self.progress, epoch=epoch, samples_in_epoch=0)
        name = self._name(folders.epoch_name, epoch)
        saves = self.config.save.epochs and (improved or not self.policy.only_best)
        if saves:
            self.save(name)
        if improved and self.policy.best:
            self._save_best(name, self.saved if saves else None)

    def _validate(self, text: str) -> bool:
        """Evaluate on all held-out samples; whether it is better than ever."""
        measured = self.evaluate(self.task.data.held_out)
        loss, best = measured["val_loss"], self.progress.best_val_loss
        improved = self.progress.improves(loss)
        self.monitor.evaluated(self.progress, text, measured)
        self.progress = replace(
            self.progress,
            val_loss=loss,
            metrics={name: value for name, value in measured.items() if name != "val_loss"},
            best_val_loss=loss if improved else best,
        )
        return improved

    def _save_best(self, name: str, checkpoint: Path | None) -> None:
        staged = checkpoint or self.saving.stage(self.engine, name, self._state())
        from_rank0(lambda: self.saving.best(staged))
        if checkpoint is None:
            from_rank0(lambda: self.saving.drop(staged))
        self.saving.say(f"best so far: {self.saving.place / folders.BEST}")

    def end(self) -> None:
        """The final checkpoint, where the last save was earlier; and the evaluation of the last model."""
        epochs = self.config.save.epochs
        saves = epochs or self.config.save.save_steps or self.config.training.save_minutes is not None
        if saves and not self.policy.only_best and self.saved_step != self.progress.iteration:
            names = folders.epoch_name if epochs else folders.step_name
            self.save(self._name(names, self.progress.epoch))
        if self.policy.at_end and not self.policy.best_at_end and self.progress.val_loss is None:
            self._validate("at the end")

    def evaluate(self, ids: Sequence[int]) -> dict[str, float]:
        """Mean loss and accuracy over samples."""
        self.engine.train(False)
        measured = judge(self.task, self.engine.for_evaluation, ids, self.split)
        self.engine.train(True)
        return measured

    def save(self, name: str) -> None:
        """A checkpoint of the present position; then what it makes superfluous goes."""
        self.saved = self.saving.save(self.engine, name, self._state())
        self.saved_step, self._saved_at = self.progress.iteration, time.monotonic()
        self.saving.say(f"saved {self.saved}")
        from_rank0(self.saving.retain)

    def _state(self) -> dict[str, object]:
        return client_state(self.progress, self.config, self.task.data)

    def _name(self, names: Callable[..., str], epoch: int) -> str:
        return names(self.config.save.layout, epoch=epoch, iteration=self.progress.iteration)
