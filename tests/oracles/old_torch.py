"""Saves a small training state as this version of torch does: the fixtures of fixtures/torch-writers/.

    python tests/oracles/old_torch.py fixtures/torch-writers

in an environment of each torch version (no other package is needed). Between 1.13 and
2.13 the archive gained `byteorder` (2.1), `.data/serialization_id` (2.1), and by 2.8 `.format_version`
and `.storage_alignment`. The fixtures were made on a CPU with the published wheels, whose CUDA
libraries were replaced by empty ones of the same names.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import torch


def state() -> dict[str, object]:
    """Two layers, an int64 buffer and an empty one, two steps of AdamW and a schedule."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(3, 4), ln=torch.nn.LayerNorm(4)))
    model.register_buffer("steps", torch.tensor(2, dtype=torch.int64))
    model.register_buffer("nothing", torch.empty(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(2):
        optimizer.zero_grad()
        model.ln(model.a(torch.ones(2, 3))).square().mean().backward()
        optimizer.step()
        schedule.step()
    return {
        "epoch": 1,
        "global_step": 2,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": schedule.state_dict(),
        "train_loss": 0.5,
        "val_loss": 0.75,
    }


def main() -> None:
    folder = Path(sys.argv[1]) / torch.__version__.partition("+")[0]
    folder.mkdir(parents=True)
    saved = state()
    torch.save(saved, folder / "epoch_1_step_2.pt")
    weights = saved["model_state_dict"]
    assert isinstance(weights, dict)
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in weights.items()}
    torch.save(half, folder / "weights.pt")
    if torch.__version__.startswith("1."):
        torch.save(saved, folder / "older.pt", _use_new_zipfile_serialization=False)


main()
