"""A raw DeepSpeed loop under torchrun; the counter is the engine's global_steps (see jobs.py).

    torchrun --nproc-per-node=N train_deepspeed.py JOBS

Accumulation boundaries run on over the end of an epoch, as DeepSpeed counts micro-batches. A resumed run goes
on at micro-batch global_steps x accumulation. `job.settings` are the parameters of the schedule in ds_config;
without them they are derived from epochs. A schedule "zero3-NAME" is NAME under stage 3, else the stage is 2.
"""

from __future__ import annotations

import gc
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from jobs import LR, Job, Network, Recorder, everywhere, main, rows, shares
from torch.optim import lr_scheduler as lrs

ZERO3 = "zero3-"


def nearest(updates: Fraction) -> int:
    """Whole updates; halves go up."""
    return int(updates + Fraction(1, 2))


def constants(kind: str, epoch: Fraction, epochs: int) -> dict[str, Any]:
    """The parameters of DeepSpeed's schedulers; `epoch` is an epoch's updates, which need not be whole."""
    warmup = {"warmup_min_lr": LR / 100, "warmup_max_lr": LR, "warmup_num_steps": nearest(epoch)}
    match kind:
        case "WarmupLR-linear":
            return {**warmup, "warmup_type": "linear"}
        case "WarmupLR-log":
            return {**warmup, "warmup_type": "log"}
        case "WarmupDecayLR":
            return {**warmup, "warmup_type": "linear", "total_num_steps": nearest(epoch * epochs)}
        case "WarmupDecayLR-log":
            return {**warmup, "total_num_steps": nearest(epoch * epochs)}
        case "WarmupCosineLR":
            return {
                "warmup_num_steps": nearest(epoch),
                "total_num_steps": nearest(epoch * epochs),
                "warmup_min_ratio": 0.01,
                "cos_min_ratio": 0.05,
                "warmup_type": "linear",
            }
        case "OneCycle":
            return {
                "cycle_min_lr": LR / 10,
                "cycle_max_lr": LR,
                "decay_lr_rate": 0.1,
                "cycle_first_step_size": nearest(epoch),
                "cycle_second_step_size": nearest(epoch),
                "decay_step_size": nearest(epoch),
                "cycle_momentum": True,
                "cycle_min_mom": 0.8,
                "cycle_max_mom": 0.9,
                "decay_mom_rate": 0.0,
            }
        case "LRRangeTest" | "LRRangeTest-staircase":
            return {
                "lr_range_test_min_lr": LR / 100,
                "lr_range_test_step_size": nearest(epoch),
                "lr_range_test_step_rate": 2.0,
                "lr_range_test_staircase": kind.endswith("staircase"),
            }
    raise KeyError(kind)


# the warmup is one epoch of `w` updates, the whole `t` updates
CLIENT: dict[str, Any] = {
    "client-LambdaLR": lambda o, w, t: lrs.LambdaLR(o, lambda step: 1 / (1 + 4 * step / t)),
    "client-CosineAnnealingLR": lambda o, w, t: lrs.CosineAnnealingLR(o, T_max=t, eta_min=LR / 100),
    "client-SequentialLR": lambda o, w, t: lrs.SequentialLR(
        o,
        [lrs.LinearLR(o, start_factor=0.01, total_iters=w), lrs.CosineAnnealingLR(o, T_max=t - w)],
        milestones=[w],
    ),
}


def engine_of(job: Job) -> Any:
    schedule = job.schedule.removeprefix(ZERO3)
    config: dict[str, Any] = {
        "train_batch_size": job.micro * job.accumulation * job.ranks,
        "train_micro_batch_size_per_gpu": job.micro,
        "gradient_accumulation_steps": job.accumulation,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3 if job.schedule.startswith(ZERO3) else 2,
            "reduce_bucket_size": 1_000_000,
            "allgather_bucket_size": 1_000_000,
        },
        "steps_per_print": 1_000_000_000,
    }
    net = Network()
    epoch = Fraction(job.batches, job.accumulation)
    if schedule in CLIENT:
        make = CLIENT[schedule]
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
        warmup, total = nearest(epoch), nearest(epoch * job.epochs)
        engine, *_ = deepspeed.initialize(
            model=net, optimizer=optimizer, lr_scheduler=lambda o: make(o, warmup, total), config=config
        )
        return engine
    params = job.settings or constants(schedule, epoch, job.epochs)
    config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True, "lr": LR}}
    config["scheduler"] = {"type": schedule.partition("-")[0], "params": params}
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
    return engine


def run(job: Job, recorder: Recorder) -> None:
    assert dist.get_world_size() == job.ranks
    engine = engine_of(job)
    if job.resume:
        tag = Path(job.resume)
        path, _ = engine.load_checkpoint(str(tag.parent), tag=tag.name)
        assert path is not None
    # ZeRO steps the inner optimizer, whose groups are what an update really uses
    engine.optimizer.optimizer.register_step_pre_hook(
        lambda o, *_: recorder.steps(engine.global_steps, o.param_groups)
    )
    first = engine.global_steps * job.accumulation
    for micro in range(first, job.epochs * job.batches):
        epoch, inside = divmod(micro, job.batches)
        ids = shares(job, epoch, dist.get_rank())[inside]
        recorder.sees(everywhere(ids))
        loss = engine(rows(ids).bfloat16()).float().square().mean()
        engine.backward(loss)
        engine.step()
        if (micro + 1) % job.accumulation == 0 and engine.global_steps in job.saves:
            tag = Path(job.saves[engine.global_steps])
            engine.save_checkpoint(str(tag.parent), tag=tag.name)
    engine.destroy()
    gc.collect()


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    main(run)
    dist.barrier()
    os._exit(0)  # several engines in one process do not always shut down cleanly
