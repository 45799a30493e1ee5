"""The process group, and what an engine is: it is stepped, saved and loaded."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from ckpttools.errors import CkptError
from ckpttools.trainer.failures import as_error, from_fields, to_fields

T = TypeVar("T")
Loss = Callable[[Callable[..., Any], Sequence[int]], torch.Tensor]


class Engine(Protocol):
    """A model with its optimizer and schedule."""

    device: Any

    @property
    def for_evaluation(self) -> Callable[..., Any]:
        """What losses are computed with that are not trained on."""

    def rate(self) -> float:
        """The learning rate of the next update."""

    def update(self, batches: Sequence[Sequence[int]], loss: Loss) -> tuple[float, float | None]:
        """One optimizer step on this rank's micro batches: the sum of their losses; the gradient's norm."""

    def train(self, on: bool) -> None:
        """Training, or evaluation."""

    def write(self, target: Path, state: dict[str, Any]) -> None:
        """Every rank writes its part of a checkpoint, in a place that nobody reads yet."""

    def read(self, checkpoint: Path) -> Mapping[str, Any]:
        """Load weights, optimizer and schedule; returns what `state` was. Raises CkptError."""

    def at(self, iteration: int) -> None:
        """Count on from a number of updates, where nothing was loaded that says so."""


def connect(local_rank: int) -> None:
    """Join the process group of torchrun: gloo on the CPU, NCCL on GPUs."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed means fast fp16; torch computes it on every CPU, fast or not.
        accelerator.is_fp16_supported = lambda: True
        if not _kernels_can_be_built():
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo takes its place
    else:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name())


def _kernels_can_be_built() -> bool:
    """Whether DeepSpeed can compile its all-reduce for ranks of one machine, which it tries without asking.

    It needs a compiler and ninja, and torch (`utils/cpp_extension.py`) writes the paths of its libraries and
    of the build folder into commands and build files without quotes.
    """
    build = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    plain = all(re.fullmatch(r"[\w/.+~-]+", path) for path in (torch.__file__, build))
    return (
        plain
        and cpp_extension.is_ninja_available()
        and shutil.which(cpp_extension.get_cxx_compiler()) is not None
    )


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


def refused(checkpoint: Path, message: str) -> CkptError:
    """What every failure to load becomes."""
    return CkptError(
        "resume-failed",
        message,
        where=checkpoint,
        why="the checkpoint was refused; no update was made",
        hint=f"ckpt verify {checkpoint}\ncompare the model section with the config.yaml of that run",
    )
