"""Short runs of real trainers, each in its own environment: python libraries.py NAME FOLDER

Trains a model of a few weights with the library's own saving and logging, and prints as JSON which checkpoint
the library itself would go on from, {"latest": PATH}. After a line of input a new trainer of the library goes
on from there, with its automatic resume, and the count that it began with is printed. (Two runs in one
process, since most of the time is the library's import.)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

WIDTH = 4


class Data(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"inputs": torch.sin(torch.arange(WIDTH) * (i + 1.0))}


def trainer(folder: Path, resume: bool) -> dict[str, object]:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(WIDTH, 1)

        def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(inputs).square().mean(), "logits": self.net(inputs)}

    began: list[int] = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            began.append(state.global_step)

    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=3, per_device_train_batch_size=2, learning_rate=0.1,
        save_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=2, report_to=[], disable_tqdm=True,
        use_cpu=True, remove_unused_columns=False, max_steps=16 if resume else 12, label_names=[],
        prediction_loss_only=True,
    )  # fmt: skip
    run = Trainer(Model(), arguments, train_dataset=Data(), eval_dataset=Data(), callbacks=[Begin()])
    run.train(resume_from_checkpoint=resume or None)
    return {"latest": get_last_checkpoint(str(folder)), "began": began[0]}


def lightning(folder: Path, resume: bool) -> dict[str, object]:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.trainer.states import TrainerFn

    began: list[int] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(WIDTH, 1)

        def on_train_start(self) -> None:
            began.append(self.global_step)

        def training_step(self, batch: Any, at: int) -> torch.Tensor:
            loss = self.net(batch["inputs"]).square().mean()
            self.log("train_loss", loss, on_step=True, on_epoch=False)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    where = folder / "lightning_logs" / "version_0" / "checkpoints"
    save = ModelCheckpoint(dirpath=where, save_top_k=-1, every_n_train_steps=3, save_last=True)
    run = pl.Trainer(
        accelerator="cpu", max_steps=14 if resume else 12, default_root_dir=folder, callbacks=[save],
        logger=CSVLogger(folder, version=0), enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Data(), batch_size=2)
    run.fit(Module(), loader, ckpt_path="last" if resume else None, weights_only=False)
    found = run._checkpoint_connector._select_ckpt_path(
        TrainerFn.FITTING, "last", model_provided=True, model_connected=True
    )
    return {"latest": str(found), "began": began[0]}


def mmengine(folder: Path, resume: bool) -> dict[str, object]:
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner, find_latest_checkpoint

    began: list[int] = []

    class Small(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(WIDTH, 1)

        def forward(self, inputs: torch.Tensor, mode: str = "tensor") -> Any:
            return {"loss": self.net(inputs).square().mean()}

    class Begin(Hook):  # type: ignore[misc]
        def before_train(self, runner: Any) -> None:
            began.append(runner.iter)

    run = Runner(
        model=Small(),
        work_dir=str(folder),
        train_dataloader={
            "dataset": Data(),
            "batch_size": 2,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": False, "max_iters": 16 if resume else 12},
        optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "Adam", "lr": 0.1}},
        param_scheduler={"type": "ExponentialLR", "gamma": 0.9, "by_epoch": False},
        default_hooks={
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 3},
            "logger": {"type": "LoggerHook", "interval": 1},
        },
        visualizer={"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
        custom_hooks=[Begin()],
        resume=resume,
        log_level="ERROR",
        experiment_name=f"small-{resume}",
    )
    run.train()
    return {"latest": find_latest_checkpoint(str(folder)), "began": began[0]}


def openpcdet(folder: Path, resume: bool) -> dict[str, object]:
    """tools/train.py and train_utils.py of OpenPCDet, as far as they save and find checkpoints."""
    place = folder / "ckpt"
    place.mkdir(parents=True, exist_ok=True)
    net = torch.nn.Linear(WIDTH, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    epoch = it = 0
    found = sorted(place.glob("*.pth"), key=os.path.getmtime)
    if resume:
        saved = torch.load(found[-1], weights_only=False)
        net.load_state_dict(saved["model_state"])
        optimizer.load_state_dict(saved["optimizer_state"])
        epoch, it = saved["epoch"], saved["it"]
    began = it
    for current in range(epoch, 6 if resume else 4):
        for _ in range(4):
            net(torch.ones(2, WIDTH)).square().mean().backward()
            optimizer.step()
            it += 1
        state = {"epoch": current + 1, "it": it, "model_state": net.state_dict()}
        state |= {"optimizer_state": optimizer.state_dict(), "version": "pcdet+0.6.0"}
        torch.save(state, place / f"checkpoint_epoch_{current + 1}.pth")
    return {"latest": str(max(place.glob("*.pth"), key=os.path.getmtime)), "began": began}


if __name__ == "__main__":
    _, name, place = sys.argv
    print("\n" + json.dumps(globals()[name](Path(place), False)), flush=True)
    if sys.stdin.readline():
        print("\n" + json.dumps(globals()[name](Path(place), True)), flush=True)
    os._exit(0)
