"""The model of a DeepSpeed sample, trained on by torch alone from a checkpoint that ckpt converted.

    torchrun --nproc-per-node 4 owners_job.py VARIANT HOW CHECKPOINT LOSSES

VARIANT is one of deepspeed_samples.VARIANTS in fp32. HOW says what loads it: `pt` (torch.load), or `nested`,
`flat`, `titan`, `app` (torch.distributed.checkpoint), and how the model is spread, joined by `-`: plain, ddp,
fsdp2, hsdp (2 x N/2), tp (N/2 x 2). The losses of the steps that follow the sample's are written as JSON.
Each rank takes the whole batch, so that losses do not depend on the number of ranks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_job import leave
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from deepspeed_samples import LR, STEPS_AFTER, VARIANTS, Net, batch, make_optimizer, param_groups
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

FIRST = 3  # the samples are saved after this many steps


def spread(net: nn.Module, how: list[str]) -> nn.Module:
    world = dist.get_world_size() if dist.is_initialized() else 1
    if "ddp" in how:
        return nn.parallel.DistributedDataParallel(net)
    if "fsdp2" in how:
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    elif "hsdp" in how:
        fully_shard(net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s")))
    elif "tp" in how:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(net, mesh["tp"], plan)
        fully_shard(net, mesh=mesh["dp"])
    return net


def load(net: nn.Module, optimizer: torch.optim.Optimizer, how: list[str], path: Path) -> None:
    if "pt" in how:
        saved = torch.load(path, weights_only=True)
        inner = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
        inner.load_state_dict(saved["model_state_dict"])
        optimizer.load_state_dict(saved["optimizer_state_dict"])
        return
    options = StateDictOptions(flatten_optimizer_state_dict="flat" in how or "titan" in how)
    model, optim = get_state_dict(net, optimizer, options=options)
    if "titan" in how:
        state: dict[str, Any] = {**model, "optimizer": optim}
        dcp.load(state, checkpoint_id=path)
        optim = state.pop("optimizer")
        model = state
    else:
        dcp.load({"model": model, "optimizer": optim}, checkpoint_id=path)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=optim, options=options)


def main() -> None:
    variant, how, path, out = sys.argv[1:]
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    v = VARIANTS[variant]
    assert v.dtype == "fp32"
    torch.manual_seed(99)  # nothing of the run's start may be left
    net = spread(Net(**v.model), how.split("-"))
    groups = param_groups(net.module if "ddp" in how else net, v.groups)
    for group in groups:
        group.pop("name", None)
    optimizer = make_optimizer(v.optimizer, groups)
    assert optimizer is not None
    optimizer.defaults["foreach"] = False  # it cannot mix tensors on two meshes
    for group in optimizer.param_groups:
        group["lr"] *= 7  # the file's own must come back
        group["foreach"] = False
    load(net, optimizer, how.split("-"), Path(path))
    for group in optimizer.param_groups:
        group["foreach"] = False
    schedule = None
    if v.scheduler == "WarmupDecayLR":
        rates = [group["lr"] for group in optimizer.param_groups]
        schedule = WarmupDecayLR(
            optimizer, total_num_steps=20, warmup_num_steps=2, warmup_min_lr=LR / 10, warmup_max_lr=LR
        )
        schedule.load_state_dict({"last_batch_iteration": FIRST - 1})
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    losses = []
    for step in range(FIRST, FIRST + STEPS_AFTER):
        optimizer.zero_grad()
        loss = net(*batch(step))
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(out).write_text(json.dumps(losses))
    leave()


if __name__ == "__main__":
    main()
