"""A tiny FSDP2 model saved and loaded by accelerate's own functions for FSDP, under torchrun on the CPU.

    torchrun --nproc-per-node 2 dcp_accelerate.py save|load FOLDER LOSSES

Three steps and a save, or a load; then the losses of three more steps. Its Accelerator leaves FSDP out on a
CPU, so that its saving and loading is called with what it would pass.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import fsdp_utils
from dcp_job import leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 4, generator=generator)
        targets = torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    what, folder, out = sys.argv[1:4]
    PartialState(cpu=True)
    torch.manual_seed(0 if what == "save" else 1)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01 if what == "save" else 0.5, foreach=False)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = types.SimpleNamespace(
        process_index=dist.get_rank(),
        num_processes=dist.get_world_size(),
        is_fsdp2=True,
        is_main_process=dist.get_rank() == 0,
        wait_for_everyone=dist.barrier,
        device=torch.device("cpu"),
        parallelism_config=None,
    )
    if what == "save":
        train(net, optimizer, 0, 3)
        fsdp_utils.save_fsdp_model(plugin, accelerator, net, folder, 0)
        fsdp_utils.save_fsdp_optimizer(plugin, accelerator, optimizer, net, folder, 0)
    else:
        fsdp_utils.load_fsdp_model(plugin, accelerator, net, folder, 0)
        fsdp_utils.load_fsdp_optimizer(plugin, accelerator, optimizer, net, folder, 0)
    losses = train(net, optimizer, 3, 6)
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(losses))
    leave()


if __name__ == "__main__":
    main()
