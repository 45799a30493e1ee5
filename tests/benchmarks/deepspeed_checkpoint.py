"""A ZeRO-2 checkpoint of a wanted size, saved by real DeepSpeed after one step on CPU ranks.

    python tests/benchmarks/deepspeed_checkpoint.py FOLDER --parameters 353.7e6 [--ranks 2]

The model is a chain of square Linear layers in bf16: 14 bytes per parameter (2 for the weight, 12 for the
fp32 master and the two Adam moments). Memory: about 20 bytes per parameter and rank.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

BYTES_PER_PARAMETER = 14


def make(folder: Path, parameters: int, ranks: int = 2) -> None:
    """Train and save in one process per rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), "--parameters", str(parameters)]
    processes = []
    for rank in range(ranks):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("DeepSpeed could not make the checkpoint")
    subprocess.run(["sync", "-f", folder], check=True)  # no write-back of it during the measurements


def train(folder: Path, parameters: int) -> None:
    """One rank: build, one step, save."""
    import deepspeed
    import torch
    from torch import nn

    class Chain(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
            self.norm = nn.LayerNorm(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return self.norm(x).float().square().mean()

    width = 2048 if parameters > 1e8 else 512
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Chain(width, max(round(parameters / (width * (width + 1))), 1))
    torch.set_default_dtype(torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    x = torch.randn(1, width, dtype=torch.bfloat16)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(x))
        engine.step()
    engine.save_checkpoint(str(folder))
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), required=True)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    if "RANK" in os.environ:
        train(options.folder, options.parameters)
    else:
        make(options.folder, options.parameters, options.ranks)
