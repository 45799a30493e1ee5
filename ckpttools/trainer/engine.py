"""The DeepSpeed engine: made, loaded from a checkpoint, saved to one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ckpttools.errors import CkptError
from ckpttools.trainer import folders, model
from ckpttools.trainer.config import Config
from ckpttools.trainer.failures import as_error, from_fields, to_fields

T = TypeVar("T")


def connect(local_rank: int) -> None:
    """Join the process group of torchrun: gloo on the CPU, NCCL on GPUs."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed means fast fp16; torch computes it on every CPU, fast or not.
        accelerator.is_fp16_supported = lambda: True
    else:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name())


def together() -> None:
    """Wait for every rank."""
    dist.barrier()


def disconnect() -> None:
    """Leave the process group when every rank is done."""
    together()
    dist.destroy_process_group()


def from_rank0(function: Callable[[], T]) -> T:
    """Rank 0 decides for all: its result, or its error raised on every rank."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except Exception as problem:
            box[1] = to_fields(as_error(problem))
    dist.broadcast_object_list(box, src=0, device=torch.device(get_accelerator().current_device_name()))
    result, fields = box
    if fields is not None:
        raise from_fields(fields)
    return result  # type: ignore[no-any-return]  # it crossed the network as an object


def make(config: Config, settings: dict[str, Any]) -> Any:
    """A `DeepSpeedEngine` around a new model."""
    net = model.build(config)
    groups = model.param_groups(net, config.optimizer.weight_decay)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=groups, config=settings)
    return engine


def load(engine: Any, checkpoint: Path, weights_only: bool) -> Mapping[str, Any]:
    """Load a tag folder; returns its client state. Every failure of DeepSpeed becomes a CkptError."""
    try:
        # DeepSpeed rebuilds the fp32 masters from the 16-bit weights when only these are loaded.
        path, state = engine.load_checkpoint(
            str(checkpoint.parent.absolute()),
            tag=checkpoint.name,
            load_module_only=weights_only,
            load_optimizer_states=not weights_only,
            load_lr_scheduler_states=not weights_only,
        )
    except Exception as problem:
        raise _refused(checkpoint, as_error(problem).message) from problem
    if path is None:
        raise _refused(checkpoint, "DeepSpeed found nothing to load")
    assert isinstance(state, Mapping)
    return state


def _refused(checkpoint: Path, message: str) -> CkptError:
    return CkptError(
        "resume-failed",
        message,
        where=checkpoint,
        why="DeepSpeed refused the checkpoint; no update was made",
        hint=f"ckpt verify {checkpoint}\ncompare the model section with the config.yaml of that run",
    )


def save(engine: Any, run: Path, tag: str, state: dict[str, Any]) -> None:
    """Save under a tag through DeepSpeed; `last_checkpoint` follows when every rank has finished."""
    if dist.get_rank() == 0 and (run / tag).is_dir():
        # A run resumed from further back saves this tag again; files of another rank count must not stay.
        shutil.rmtree(run / tag)
    engine.save_checkpoint(str(run), tag=tag, client_state=state)
    dist.barrier()
    if dist.get_rank() == 0:
        folders.write_text(run / folders.POINTER, tag)
