"""A folder as verl's FSDP checkpoint manager writes it, with the whole weights beside it.

    torchrun --standalone --nproc_per_node=2 verl_samples.py OUT

OUT/actor_ws2 and OUT/truth.pt: FSDP2, torch.save of each rank's sharded state dicts. On four ranks
OUT/actor_ws4: a mesh of two replicas of two shards, whose truth is kept as truth_ws4.pt.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
out = Path(sys.argv[1])
folder = out / f"actor_ws{ranks}"
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
shape, dims = ((2, 2), ("ddp", "fsdp")) if ranks == 4 else ((ranks,), ("fsdp",))
fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=dims))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(2):
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
extra = {"lr_scheduler": {"last_epoch": 2}, "rng": {"cpu": torch.get_rng_state()}}
states = {"model": model.state_dict(), "optim": optimizer.state_dict(), "extra_state": extra}
for kind, state in states.items():
    torch.save(state, folder / f"{kind}_world_size_{ranks}_rank_{rank}.pt")
whole = {name: part.full_tensor() for name, part in model.state_dict().items()}
if rank == 0:
    torch.save(whole, out / "truth.pt")
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": ranks}))
dist.barrier()
os._exit(0)
