"""What a run tells while it goes: one line on the console now and then, JSON lines, TensorBoard's scalars."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch

from ckpttools.trainer.output import Output
from ckpttools.trainer.state import Progress


class Monitor:
    """Of rank 0; on other ranks it does nothing. `total` is the number of updates of the whole run."""

    def __init__(
        self, run: Path, output: Output, *, rank: int, total: int, every: int, scalars: bool
    ) -> None:
        self._run, self._output, self._rank = run, output, rank
        self._total, self._every = total, every
        self._started, self._first = time.monotonic(), -1
        self._scalars = _writer(run / "tensorboard") if scalars and rank == 0 else None

    def update(
        self, progress: Progress, epochs: int, *, lr: float, norm: float | None, rate: float, crc: int
    ) -> None:
        """An update is done; `rate` is in samples a second, `crc` of the samples' numbers as int64."""
        if self._rank:
            return
        step, loss = progress.iteration, progress.train_loss
        if self._first < 0:
            self._first, self._started = step, time.monotonic()
        self.record(
            progress,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            samples_seen=progress.samples_seen,
            samples_per_s=rate,
            samples_crc32=crc,
        )
        line = (
            f"step {step:6d}  epoch {progress.epoch + 1}/{epochs}  loss {loss:.4f}  lr {lr:.3e}"
            f"  grad norm {'-' if norm is None else f'{norm:.3f}'}  {rate:.1f} samples/s"
            f"  {_memory() / 1e9:.1f} GB  {self._left(step)}"
        )
        if step % self._every == 0 or step == self._total:
            self._output.say(line)
        else:
            print(line, flush=True)

    def evaluated(self, progress: Progress, text: str, values: dict[str, float], *, of: str = "") -> None:
        """A validation loss, and what else was measured. `of` goes on the names in the logs where it is not
        of the model as it stands on all held-out samples: such values are no points of that curve.
        """
        if self._rank == 0:
            self.record(progress, **{f"{name}{of and '_'}{of}": value for name, value in values.items()})
            shown = "  ".join(
                f"{name.replace('val_', 'validation ')} {value:.4f}" for name, value in values.items()
            )
            self._output.say(f"{text}  {shown}")

    def record(self, progress: Progress, **fields: float | None) -> None:
        """One JSON line with full precision; a resumed run appends, and its later line for a step counts."""
        line = {"step": progress.iteration, "epoch": progress.in_epoch, **fields}
        with (self._run / "train_log.jsonl").open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # of a launch that was killed, or whose disk was full
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
        if self._scalars is not None:
            for name, value in fields.items():
                if value is not None:
                    self._scalars.add_scalar(name, value, progress.iteration)
            self._scalars.flush()

    def _left(self, step: int) -> str:
        """The time until the end of the run, by the mean of the updates of this launch."""
        done = step - self._first
        if not done:
            return "left ?"
        seconds = int((time.monotonic() - self._started) / done * (self._total - step))
        return f"left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _memory() -> float:
    """Bytes at the peak: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("no TensorBoard scalars: tensorboard is not installed")
        return None
    return SummaryWriter(str(folder))
