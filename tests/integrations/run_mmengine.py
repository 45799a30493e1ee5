"""MMEngine's Runner with the hook: run_mmengine.py WORK_DIR EPOCHS, resuming by itself."""

from __future__ import annotations

import sys
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner

import ckpttools.integrations.mmengine  # noqa: F401  # registers the hook


class Numbers(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((4,), float(at))}


class Net(BaseModel):  # type: ignore[misc]  # untyped base
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2000)

    def forward(self, x: torch.Tensor, mode: str = "loss") -> Any:
        # the loader's collate_fn leaves lists
        return {"loss": self.linear(torch.stack(list(x))).square().mean()}


runner = Runner(
    model=Net(),
    work_dir=sys.argv[1],
    train_dataloader={
        "dataset": Numbers(),
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "batch_size": 2,
    },
    train_cfg={"by_epoch": True, "max_epochs": int(sys.argv[2])},
    optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}},
    custom_hooks=[{"type": "VerifySavesHook", "keep_last": 2, "per_kind": True}],
    resume=True,
)
runner.train()
