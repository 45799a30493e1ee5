"""An engine around a model: DeepSpeed's, or plain torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ckpttools.trainer import folders, model
from ckpttools.trainer.config import Config
from ckpttools.trainer.engine import Engine, Loss, refused
from ckpttools.trainer.failures import as_error
from ckpttools.trainer.plain import Plain


def make(config: Config, settings: dict[str, Any], weights: Path | None) -> Engine:
    """An engine around a new model, or one with the weights of a checkpoint of any format."""
    net = model.build(config)
    if weights is not None:
        model.fill(net, weights)  # before the engine makes its fp32 masters of them
    groups = model.param_groups(net, config.optimizer.weight_decay)
    if config.zero.stage == 0:
        return Plain(net, groups, config, settings)
    return Zero(net, groups, settings)


class Zero:
    """DeepSpeed, ZeRO stage 1, 2 or 3."""

    def __init__(self, net: torch.nn.Module, groups: Any, settings: dict[str, Any]) -> None:
        engine, *_ = deepspeed.initialize(model=net, model_parameters=groups, config=settings)
        self._engine: Any = engine
        self.device = engine.device

    @property
    def for_evaluation(self) -> Callable[..., Any]:
        engine: Callable[..., Any] = self._engine
        return engine

    def rate(self) -> float:
        return float(self._engine.get_lr()[0])

    def update(self, batches: Sequence[Sequence[int]], loss: Loss) -> tuple[float, float | None]:
        total = 0.0
        for ids in batches:
            value = loss(self._engine, ids)
            self._engine.backward(value)
            self._engine.step()
            total += value.item()
        norm = self._engine.get_global_grad_norm()
        return total, None if norm is None else float(norm)

    def train(self, on: bool) -> None:
        self._engine.train(on)

    def write(self, target: Path, state: dict[str, Any]) -> None:
        self._engine.save_checkpoint(
            str(target.parent), tag=target.name, client_state=state, save_latest=False
        )

    def read(self, checkpoint: Path) -> Mapping[str, Any]:
        tag = folders.inner(checkpoint)
        try:
            path, state = self._engine.load_checkpoint(str(tag.parent.absolute()), tag=tag.name)
        except Exception as problem:
            raise refused(checkpoint, as_error(problem).message) from problem
        if path is None:
            raise refused(checkpoint, "DeepSpeed found nothing to load")
        assert isinstance(state, Mapping)
        # what ckpt convert makes of another format has these counters under DeepSpeed's names alone
        counters = {"global_step": self._engine.global_steps, "samples_seen": self._engine.global_samples}
        return {**counters, **state}

    def at(self, iteration: int) -> None:
        self._engine.global_steps = iteration
