"""Plain torch, zero.stage 0: one process, or DistributedDataParallel; a checkpoint is a single file.

    {"epoch", "global_step", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
     "train_loss", "val_loss", and the rest of state.client_state}

The names of the weights are the model's own, without DDP's `module.`. The schedule is DeepSpeed's, so that a
run goes on under ZeRO, after `ckpt convert`, at the same learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import lr_schedules

from ckpttools.trainer.config import Config
from ckpttools.trainer.engine import Loss, refused
from ckpttools.trainer.failures import as_error

PARTS = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict")


class Plain:
    """An engine.Engine. Weights are fp32; with bf16 the matrix products are (autocast)."""

    def __init__(self, net: torch.nn.Module, groups: Any, config: Config, settings: dict[str, Any]) -> None:
        self.device = torch.device(get_accelerator().current_device_name())
        self._net = net.to(self.device)
        self._wrapped: Any = self._net
        if dist.get_world_size() > 1:
            self._wrapped = torch.nn.parallel.DistributedDataParallel(self._net)
        self._accumulation = int(settings["gradient_accumulation_steps"])
        self._clipping = settings.get("gradient_clipping") or float("inf")
        asked = {**settings["optimizer"]["params"]}
        asked.pop("torch_adam", None)
        self._optimizer = torch.optim.AdamW(groups, **asked)
        schedule = settings["scheduler"]
        self._schedule: Any = getattr(lr_schedules, schedule["type"])(self._optimizer, **schedule["params"])
        self._bf16 = config.precision == "bf16"

    def _forward(self, **inputs: Any) -> Any:
        return self._call(self._wrapped, inputs)

    @property
    def for_evaluation(self) -> Callable[..., Any]:
        # not DDP's: it would wait in every call for ranks that have fewer batches
        return lambda **inputs: self._call(self._net, inputs)

    def _call(self, net: Any, inputs: dict[str, Any]) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16) if self._bf16 else nullcontext():
            return net(**inputs)

    def rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def update(self, batches: Sequence[Sequence[int]], loss: Loss) -> tuple[float, float | None]:
        total = 0.0
        for i, ids in enumerate(batches, 1):
            alone = i < len(batches) and self._wrapped is not self._net
            with self._wrapped.no_sync() if alone else nullcontext():
                value = loss(self._forward, ids)
                (value / self._accumulation).backward()
            total += value.item()
        trained = [p for p in self._net.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, self._clipping)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return total, float(norm)

    def train(self, on: bool) -> None:
        self._wrapped.train(on)

    def write(self, target: Path, state: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            values = (self._net.state_dict(), self._optimizer.state_dict(), self._schedule.state_dict())
            torch.save({**state, **dict(zip(PARTS, values, strict=True))}, target)

    def read(self, checkpoint: Path) -> Mapping[str, Any]:
        try:
            found = torch.load(checkpoint, map_location="cpu", weights_only=True)
            model, optimizer, schedule = (found.pop(key) for key in PARTS)
            self._net.load_state_dict(model)
            self._optimizer.load_state_dict(optimizer)
            self._schedule.load_state_dict(schedule)
        except Exception as problem:
            raise refused(checkpoint, as_error(problem).message) from problem
        state: Mapping[str, Any] = found
        return state

    def at(self, iteration: int) -> None:
        """Nothing here counts updates beside the schedule."""
