"""The training loop: updates, evaluation at the end of an epoch, checkpoints, one log line per update."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckpttools.trainer import engine as ds
from ckpttools.trainer import folders
from ckpttools.trainer.batch import Split
from ckpttools.trainer.config import Config
from ckpttools.trainer.order import Order
from ckpttools.trainer.output import Output
from ckpttools.trainer.state import Progress, client_state
from ckpttools.trainer.text import Samples


@dataclass(slots=True, kw_only=True)
class Training:
    """One rank's part of a run."""

    config: Config
    split: Split
    order: Order
    samples: Samples
    engine: Any
    run: Path
    output: Output
    progress: Progress

    def train(self, max_steps: int | None) -> None:
        """Go on until the planned epochs, or `max_steps` updates counted from step 0, are done.

        A run that `max_steps` stops saves a step checkpoint, unless these are off; the schedule does not
        know about `max_steps`, so that the resumed run is the run that was never stopped.
        """
        every = self.config.save.save_steps
        while self.progress.epoch < self.config.epochs:
            for ids in self.order.batches(self.progress.epoch, self.progress.samples_in_epoch):
                if max_steps is not None and self.progress.iteration >= max_steps:
                    return
                self.update(ids)
                last = self.progress.iteration == max_steps
                if every and (last or self.progress.iteration % every == 0):
                    self.save(folders.step_tag(self.progress.iteration))
            self.end_epoch()

    def update(self, ids: Sequence[int]) -> None:
        """One optimizer step on one global batch, and its line in the log."""
        started = time.perf_counter()
        lr = self.engine.get_lr()[0]  # before the step: the scheduler moves on inside it
        total = 0.0
        for micro in self.split.micro_batches(ids, dist.get_rank()):
            loss = self.loss(micro)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
        # fp64, so that the order of summing does not show in the logged value
        mean = self.summed([total])[0] / (self.split.accumulation * self.split.world)
        norm = self.engine.get_global_grad_norm()
        before = self.progress
        self.progress = dataclasses.replace(
            before,
            iteration=before.iteration + 1,
            samples_seen=before.samples_seen + len(ids),
            samples_in_epoch=before.samples_in_epoch + len(ids),
            train_loss=mean,
            val_loss=None,
        )
        rate = len(ids) / (time.perf_counter() - started)
        record = {"loss": mean, "lr": lr, "grad_norm": None if norm is None else float(norm)}
        self.record(**record, samples_seen=self.progress.samples_seen, samples_per_s=rate)
        self.output.say(
            f"step {self.progress.iteration:6d}  epoch {before.epoch + 1}/{self.config.epochs}"
            f"  loss {mean:.4f}  lr {lr:.3e}  grad norm {'-' if norm is None else f'{float(norm):.3f}'}"
            f"  {rate:.1f} samples/s"
        )

    def end_epoch(self) -> None:
        """Evaluate, then save the epoch checkpoint, which therefore holds its validation loss."""
        epoch = self.progress.epoch + 1
        if self.samples.held_out:
            val_loss = self.evaluate()
            self.progress = dataclasses.replace(self.progress, val_loss=val_loss)
            self.record(val_loss=val_loss)
            self.output.say(f"epoch {epoch}/{self.config.epochs} done  validation loss {val_loss:.4f}")
        self.progress = dataclasses.replace(self.progress, epoch=epoch, samples_in_epoch=0)
        if self.config.save.epochs:
            self.save(folders.epoch_tag(epoch))

    def evaluate(self) -> float:
        """Mean loss over the held-out samples; the same batches whatever the number of ranks."""
        held_out, size = self.samples.held_out, self.split.micro
        batches = [held_out[i : i + size] for i in range(0, len(held_out), size)]
        self.engine.eval()
        with torch.no_grad():
            mine = batches[dist.get_rank() :: self.split.world]
            total = sum(self.loss(batch).item() * len(batch) for batch in mine)
        self.engine.train()
        return self.summed([total])[0] / len(held_out)

    def loss(self, ids: Sequence[int]) -> torch.Tensor:
        """Mean next-byte loss of some samples; the model shifts the labels itself."""
        rows = [torch.tensor(self.samples.sample(i), dtype=torch.long) for i in ids]
        tokens = torch.stack(rows).to(self.engine.device)
        loss: torch.Tensor = self.engine(input_ids=tokens, labels=tokens).loss
        return loss

    def summed(self, values: list[float]) -> list[float]:
        """Sums over all ranks."""
        box = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(box)
        result: list[float] = box.tolist()
        return result

    def save(self, tag: str) -> None:
        """A checkpoint of the present position."""
        ds.save(self.engine, self.run, tag, client_state(self.progress, self.config, self.samples))
        self.output.say(f"saved {self.run / tag}")

    def record(self, **fields: float | None) -> None:
        """One JSON line with full precision; a resumed run appends, and its later line for a step counts."""
        if dist.get_rank() == 0:
            line = {"step": self.progress.iteration, "epoch": self.progress.epoch + 1, **fields}
            with (self.run / "train_log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
