"""A tiny model trained by real torch and saved as distributed checkpoints, under torchrun or alone.

    torchrun --nproc-per-node 2 dcp_job.py save   KIND FOLDER [--truth FILE] [--steps 3]
    torchrun --nproc-per-node 2 dcp_job.py resume KIND FOLDER --losses FILE [--first 3] [--steps 3]
    python dcp_job.py ...                                        the same without a process group

KIND is parts joined by `-`: how the model is sharded (plain, ddp, fsdp2, hsdp, tp), how it is saved (nested,
flat, titan, app, accelerate, threads, many), `sgd` for another optimizer, `bf16` for mixed precision, `bare`
for a model without tied weights. `save` also writes what the ranks held to --truth: gathered weights, moments
and groups, and the losses.
`resume` loads the folder, trains on and writes the loss of each step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Net(nn.Module):
    """Tied embedding, uneven rows, one frozen weight, a parameter of one element, three kinds of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.arange(8.0), requires_grad=False)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("mean", torch.full((4,), 0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.down(torch.relu(self.up(self.emb(tokens)))) * self.gain + self.frozen
        out: torch.Tensor = self.head(hidden)
        return out


def build(kind: list[str]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net: nn.Module = Net()
    if "bare" in kind:  # FSDP2 cannot tie across units and tensor parallelism not at all: keep it simple
        net.head = nn.Linear(8, 7, bias=False)  # type: ignore[assignment]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if "bf16" in kind else MixedPrecisionPolicy()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if "fsdp2" in kind:
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
    elif "hsdp" in kind:
        fully_shard(
            net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s")), mp_policy=policy
        )
    elif "tp" in kind:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(net, mesh=mesh["dp"], mp_policy=policy)
    elif "ddp" in kind:
        net = nn.parallel.DistributedDataParallel(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # foreach cannot mix tensors on two meshes
    if "sgd" in kind:
        return net, torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=False)
    return net, torch.optim.AdamW(groups, lr=0.01, foreach=False)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Every rank takes the whole batch, so that losses do not depend on the number of ranks."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(0, 7, (16,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(tokens).float(), (tokens + 1) % 7)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def options(kind: list[str]) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict="flat" in kind or "titan" in kind)


def state(kind: list[str], net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    model, optim = get_state_dict(net, optimizer, options=options(kind))
    if "titan" in kind:
        return {
            **model,
            "optimizer": optim,
            "lr_scheduler": {"last_epoch": step, "base_lrs": [0.01, 0.01]},
            "train_state": {"step": torch.tensor(step, dtype=torch.int32)},
            "dataloader": {f"dp_rank_{dist.get_rank() if dist.is_initialized() else 0}": b"position"},
        }
    if "app" in kind:
        return {"app": {"model": model, "optim": optim}}
    if "bare-model" in kind:
        return model
    return {
        "model": model,
        "optimizer": optim,
        "step": step,
        "epoch": 1,
        "val_loss": 0.25,
        "meta": {"rng": torch.arange(5, dtype=torch.uint8), "name": "run", "sizes": (1, 2), "list": [1, "a"]},
    }


def writer(kind: list[str], folder: Path) -> FileSystemWriter:
    if "threads" in kind:
        return FileSystemWriter(folder, thread_count=2)
    if "many" in kind:
        return FileSystemWriter(folder, single_file_per_rank=False)
    return FileSystemWriter(folder)


def save(kind: list[str], folder: Path, steps: int, truth: Path | None) -> None:
    net, optimizer = build(kind)
    losses = train(net, optimizer, 0, steps)
    made = state(kind, net, optimizer, steps)
    if "accelerate" in kind:
        for name, inner in (("pytorch_model_fsdp_0", "model"), ("optimizer_0", "optimizer")):
            dcp.save({inner: made[inner]}, storage_writer=writer(kind, folder / name))
    else:
        dcp.save(made, storage_writer=writer(kind, folder))
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = {
        "model": get_model_state_dict(net, options=gathered),
        "optimizer": get_optimizer_state_dict(net, optimizer, options=gathered),
        "losses": losses,
    }
    if truth and (not dist.is_initialized() or dist.get_rank() == 0):
        truth.parent.mkdir(parents=True, exist_ok=True)
        whole["model"] = {name: tensor.clone() for name, tensor in whole["model"].items()}
        torch.save(whole, truth)


def load(kind: list[str], net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    made = state(kind, net, optimizer, 0)
    if "accelerate" in kind:
        for name, inner in (("pytorch_model_fsdp_0", "model"), ("optimizer_0", "optimizer")):
            dcp.load({inner: made[inner]}, checkpoint_id=folder / name)
        model, optim = made["model"], made["optimizer"]
    elif "titan" in kind:
        for key in ("lr_scheduler", "train_state", "dataloader"):
            made.pop(key)
        dcp.load(made, checkpoint_id=folder)
        optim = made.pop("optimizer")
        model = made
    elif "app" in kind:
        dcp.load(made, checkpoint_id=folder)
        model, optim = made["app"]["model"], made["app"]["optim"]
    else:
        made = {key: made[key] for key in ("model", "optimizer")}
        dcp.load(made, checkpoint_id=folder)
        model, optim = made["model"], made["optimizer"]
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=optim, options=options(kind))


def resume(kind: list[str], folder: Path, first: int, steps: int, losses: Path) -> None:
    net, optimizer = build(kind)
    for group in optimizer.param_groups:
        group["lr"] *= 3  # the file's own must come back
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.125)
    load(kind, net, optimizer, folder)
    made = train(net, optimizer, first, first + steps)
    if not dist.is_initialized() or dist.get_rank() == 0:
        losses.write_text(json.dumps(made))


def leave() -> None:
    """End this rank without destructors: DDP's waits for threads that wait for the interpreter."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["save", "resume"])
    parser.add_argument("kind")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--losses", type=Path)
    parser.add_argument("--truth", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    kind = args.kind.split("-")
    if args.what == "save":
        save(kind, args.folder, args.steps, args.truth)
    else:
        resume(kind, args.folder, args.first, args.steps, args.losses)
    leave()


if __name__ == "__main__":
    main()
