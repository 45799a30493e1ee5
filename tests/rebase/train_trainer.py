"""transformers' Trainer, with and without DeepSpeed; the counter is `global_step` (see jobs.py).

    python train_trainer.py JOBS        or under torchrun

Where a schedule's name ends in `-zero` the model is trained by ZeRO-2 and the Trainer's own scheduler; where
it starts with `Warmup` DeepSpeed has the scheduler. `job.settings` replaces the training arguments
(warmup_steps, lr_scheduler_kwargs ...).
"""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
import torch.distributed as dist
from jobs import LR, Indexed, Job, Network, Recorder, everywhere, main
from transformers import Trainer, TrainerCallback, TrainingArguments

ARGUMENTS: dict[str, Any] = {
    "linear": lambda u, e: {"lr_scheduler_type": "linear", "warmup_steps": u},
    "cosine": lambda u, e: {"lr_scheduler_type": "cosine", "warmup_steps": u},
    "polynomial": lambda u, e: {
        "lr_scheduler_type": "polynomial",
        "warmup_steps": u,
        "lr_scheduler_kwargs": {"power": 2.0, "lr_end": LR / 100},
    },
    "constant_with_warmup": lambda u, e: {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": u},
    "warmup_stable_decay": lambda u, e: {
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": u,
        "lr_scheduler_kwargs": {"num_decay_steps": u},
    },
    "inverse_sqrt": lambda u, e: {
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": u,
        "lr_scheduler_kwargs": {"timescale": u},
    },
}


class Model(torch.nn.Module):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.net, self.recorder = Network(), recorder

    def forward(self, inputs: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        self.recorder.sees(everywhere(index.tolist()))
        out = self.net(inputs.to(self.net[0].weight.dtype))
        return {"loss": out.float().square().mean()}


class Follow(TrainerCallback):
    """Records each step of the innermost optimizer, and saves where it is asked to."""

    def __init__(self, job: Job, recorder: Recorder) -> None:
        self.job, self.recorder = job, recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        optimizer.register_step_pre_hook(lambda o, *_: self.recorder.steps(state.global_step, o.param_groups))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step in self.job.saves


def deepspeed_of(job: Job) -> dict[str, Any] | None:
    kind = job.schedule.removesuffix("-zero")
    if kind == job.schedule:
        return None
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1_000_000,
            "allgather_bucket_size": 1_000_000,
        },
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": LR}},
    }
    if kind.startswith("Warmup"):
        names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
        config["scheduler"] = {
            "type": kind,
            "params": {**dict.fromkeys(names, "auto"), "warmup_type": "linear"},
        }
    return config


def run(job: Job, recorder: Recorder) -> None:
    config = deepspeed_of(job)
    kind = job.schedule.removesuffix("-zero")
    schedule = ARGUMENTS.get(kind, ARGUMENTS["linear"])(job.updates, job.epochs)
    arguments = TrainingArguments(
        output_dir=job.folder,
        num_train_epochs=job.epochs,
        per_device_train_batch_size=job.micro,
        gradient_accumulation_steps=job.accumulation,
        learning_rate=LR,
        save_strategy="steps",
        save_steps=1_000_000,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        seed=7,
        bf16=config is not None,
        deepspeed=config,
        ddp_backend="gloo" if job.ranks > 1 else None,
        **{**schedule, **job.settings},
    )
    trainer = Trainer(model=Model(recorder), args=arguments, train_dataset=Indexed(job.size))
    trainer.add_callback(Follow(job, recorder))
    trainer.train(resume_from_checkpoint=job.resume)
    if config is not None:
        trainer.model_wrapped.destroy()
    trainer.accelerator.free_memory()
    gc.collect()


if __name__ == "__main__":
    main(run)
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # process groups of several libraries do not always shut down cleanly
