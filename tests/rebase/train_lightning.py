"""Lightning's Trainer, resumed with ckpt_path; the counter is `global_step`, of updates (see jobs.py)."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import torch
from jobs import LR, Indexed, Job, Network, Recorder, main, order
from train_plain import SCHEDULES


class Order(torch.utils.data.Sampler[int]):
    """The epoch's order of jobs.py; Lightning calls set_epoch."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(order(self.size, self.epoch))

    def __len__(self) -> int:
        return self.size


class Module(lightning.LightningModule):
    def __init__(self, job: Job, recorder: Recorder) -> None:
        super().__init__()
        self.net, self.job, self.recorder = Network(), job, recorder

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.recorder.sees(batch["index"])
        return self.net(batch["inputs"]).square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.recorder.steps(self.global_step, optimizer.param_groups)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)
        scheduler = SCHEDULES[self.job.schedule](optimizer, self.job.updates, self.job.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Save(lightning.Callback):
    """Saves where ModelCheckpoint does: after a batch's updates, and at the end of an epoch."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step % self.job.updates:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.save(trainer)

    def save(self, trainer: Any) -> None:
        if trainer.global_step in self.job.saves:
            trainer.save_checkpoint(self.job.saves[trainer.global_step])


def run(job: Job, recorder: Recorder) -> None:
    loader = torch.utils.data.DataLoader(
        Indexed(job.size), batch_size=job.micro, sampler=Order(job.size), num_workers=0
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=job.epochs,
        accumulate_grad_batches=job.accumulation,
        callbacks=[Save(job)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        use_distributed_sampler=False,
        default_root_dir=job.folder,
    )
    # torch.load's weights_only is off: OneCycleLR's state and Lightning's own objects are our own files
    trainer.fit(Module(job, recorder), loader, ckpt_path=job.resume, weights_only=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(run)
