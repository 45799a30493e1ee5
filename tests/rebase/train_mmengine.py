"""MMEngine's Runner (single files) and FlexibleRunner with DeepSpeedStrategy; see jobs.py.

    MMENGINE_PYTHON train_mmengine.py JOBS      in the environment of oracles/mmengine_env.sh, or its torchrun

The counter is MMEngine's `iter`, which counts micro-batches. A schedule's name says the loop: `epoch-` for
EpochBasedTrainLoop, `iter-` for IterBasedTrainLoop, and `zero-` for the latter under DeepSpeedStrategy.
The constants of `-converted` schedules are given in epochs and converted by MMEngine, others in iterations.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jobs import LR, Indexed, Job, Network, Recorder, everywhere, main, order
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATA_SAMPLERS, DATASETS, MODELS
from mmengine.runner import FlexibleRunner, Runner, loops

# between epochs its endless iterator waits two seconds for the loader's worker processes: there are none here
loops.time.sleep = lambda seconds: None

RECORDERS: list[Recorder] = []  # of the running job: MMEngine builds the model itself


def schedulers(kind: str, u: int, e: int) -> list[dict[str, Any]]:
    """As a user writes them: `u` iterations per epoch, `e` epochs."""
    by_epoch = {"by_epoch": True, "convert_to_iter_based": True}
    by_iter = {"by_epoch": False}
    match kind:
        case "cosine-converted":
            return [
                {"type": "LinearLR", "start_factor": 0.01, "begin": 0, "end": 1, **by_epoch},
                {
                    "type": "CosineAnnealingLR",
                    "T_max": e - 1,
                    "begin": 1,
                    "end": e,
                    "eta_min": 1e-4,
                    **by_epoch,
                },
            ]
        case "half-epochs-converted":
            return [
                {"type": "LinearLR", "start_factor": 0.01, "begin": 0, "end": 0.5, **by_epoch},
                {"type": "CosineAnnealingLR", "begin": 0.5, "end": e, "eta_min": 1e-4, **by_epoch},
            ]
        case "multistep-converted":
            return [{"type": "MultiStepLR", "milestones": [1, e - 1], "gamma": 0.1, **by_epoch}]
        case "step-by-epoch":
            return [{"type": "StepLR", "step_size": 1, "gamma": 0.5, "by_epoch": True}]
        case "poly-converted":
            return [{"type": "PolyLR", "power": 2.0, "eta_min": 1e-4, "begin": 0, "end": e, **by_epoch}]
        case "onecycle-converted":
            return [{"type": "OneCycleLR", "eta_max": LR, "total_steps": e, **by_epoch}]
        case "restart-converted":
            return [
                {
                    "type": "CosineRestartLR",
                    "periods": [1] * e,
                    "restart_weights": [1.0] * e,
                    "eta_min": 1e-4,
                    **by_epoch,
                }
            ]
        case "cosine":
            return [
                {"type": "LinearLR", "start_factor": 0.01, "begin": 0, "end": u, **by_iter},
                {"type": "CosineAnnealingLR", "T_max": (e - 1) * u, "begin": u, "end": e * u, **by_iter},
            ]
        case "multistep":
            return [
                {"type": "LinearLR", "start_factor": 0.1, "begin": 0, "end": u, **by_iter},
                {"type": "MultiStepLR", "milestones": [2 * u, 3 * u], "gamma": 0.1, **by_iter},
            ]
        case "poly":
            return [{"type": "PolyLR", "power": 1.0, "eta_min": 1e-4, "begin": 0, "end": e * u, **by_iter}]
    raise KeyError(kind)


@DATASETS.register_module()
class Numbered(Indexed):
    pass


@DATA_SAMPLERS.register_module()
class Ordered:
    """The epoch's order of jobs.py, shared out among the ranks."""

    def __init__(self, dataset: Any, seed: int | None = None) -> None:
        self.size, self.epoch = len(dataset), 0
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        ids = order(self.size, self.epoch)
        ids += ids[: -self.size % self.ranks]
        return iter(ids[self.rank :: self.ranks])

    def __len__(self) -> int:
        return -(-self.size // self.ranks)


@MODELS.register_module()
class Small(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def forward(self, inputs: torch.Tensor, index: torch.Tensor, mode: str = "tensor") -> Any:
        RECORDERS[0].sees(everywhere(index.tolist()))
        return {"loss": self.net(inputs.to(self.net[0].weight.dtype)).float().square().mean()}


class Follow(Hook):
    """Records each iteration after its step and before the schedulers move on."""

    def __init__(self) -> None:
        self.used: list[dict[str, float]] = []

    def before_train(self, runner: Any) -> None:
        optimizer = runner.optim_wrapper.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.register_step_pre_hook(lambda o, *_: self.used.append({"lr": o.param_groups[0]["lr"]}))

    def after_train_iter(self, runner: Any, batch_idx: int, *_: Any, **__: Any) -> None:
        groups = runner.optim_wrapper.optimizer.param_groups
        RECORDERS[0].steps(runner.iter, groups)
        if self.used:  # an update was made: the same value at the very step
            assert self.used.pop()["lr"] == groups[0]["lr"]


def saving(job: Job) -> list[dict[str, Any]]:
    """MMEngine's own hooks: iter_N.pth after every iteration, epoch_N.pth after every epoch."""
    if not job.saves:
        return []
    hooks = [{"type": "CheckpointHook", "by_epoch": False, "interval": 1}]
    if job.schedule.startswith("epoch"):
        hooks.append({"type": "CheckpointHook", "by_epoch": True, "interval": 1})
    return hooks


def configuration(job: Job) -> Config:
    loop, _, kind = job.schedule.partition("-")
    optimizer = {"type": "SGD", "lr": LR, "momentum": 0.9}
    fields: dict[str, Any] = {
        "model": {"type": "Small"},
        "work_dir": job.folder,
        "experiment_name": Path(job.out).stem,
        "train_dataloader": {
            "batch_size": job.micro,
            "num_workers": 0,
            "dataset": {"type": "Numbered", "size": job.size},
            "sampler": {"type": "Ordered"},
            "collate_fn": {"type": "default_collate"},
        },
        "train_cfg": {"by_epoch": True, "max_epochs": job.epochs}
        if loop == "epoch"
        else {"by_epoch": False, "max_iters": job.epochs * job.batches},
        "param_scheduler": schedulers(kind, job.batches, job.epochs),
        "optim_wrapper": {
            "type": "OptimWrapper",
            "optimizer": optimizer,
            "accumulative_counts": job.accumulation,
        },
        "default_hooks": {"checkpoint": None, "logger": None, "timer": None},
        "custom_hooks": saving(job),
        "load_from": job.resume,
        "resume": job.resume is not None,
        "log_level": "ERROR",
    }
    if loop == "zero":
        fields["optim_wrapper"] = {
            "type": "DeepSpeedOptimWrapper",
            "optimizer": {**optimizer, "type": "AdamW"},
        }
        del fields["optim_wrapper"]["optimizer"]["momentum"]
        fields["strategy"] = {
            "type": "DeepSpeedStrategy",
            "bf16": {"enabled": True},
            "inputs_to_half": ["inputs"],
            "train_micro_batch_size_per_gpu": job.micro,
            "gradient_accumulation_steps": job.accumulation,
            "zero_optimization": {
                "stage": 2,
                "reduce_bucket_size": 1_000_000,
                "allgather_bucket_size": 1_000_000,
            },
        }
        fields["env_cfg"] = {"dist_cfg": {"backend": "gloo"}}
        fields["launcher"] = "pytorch"
    return Config(fields)


def run(job: Job, recorder: Recorder) -> None:
    RECORDERS[:] = [recorder]
    config = configuration(job)
    runner = (FlexibleRunner if job.schedule.startswith("zero") else Runner).from_cfg(config)
    runner.register_hook(Follow(), priority="VERY_HIGH")
    runner.train()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    if "WORLD_SIZE" in os.environ:  # before MMEngine, which asks for a GPU
        import deepspeed
        from mmengine._strategy import deepspeed as strategy

        # a second strategy in one process would register DeepSpeed's optimizers again, and fail
        strategy.register_deepspeed_optimizers = functools.cache(strategy.register_deepspeed_optimizers)
        deepspeed.init_distributed(dist_backend="gloo")
    main(run)
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)
