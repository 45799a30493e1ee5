"""Loss and accuracy over held-out samples: of a model in training, of any checkpoint, of all of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ckpttools.formats import locate, read
from ckpttools.trainer import model
from ckpttools.trainer.config import Config
from ckpttools.trainer.output import Output
from ckpttools.trainer.split import Split
from ckpttools.trainer.startup import Start
from ckpttools.trainer.task import Data, Task

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def judge(task: Task, call: Callable[..., Any], ids: Sequence[int], split: Split) -> dict[str, float]:
    """Mean loss and accuracy, on every rank; the same batches whatever the number of ranks."""
    batches = [ids[i : i + split.micro] for i in range(0, len(ids), split.micro)]
    totals = [0.0, 0.0]
    with torch.no_grad():
        # as many calls on every rank: ZeRO-3 gathers weights in each
        for first in range(0, len(batches), split.world):
            at = first + dist.get_rank()
            batch = batches[at] if at < len(batches) else batches[0]
            judged = task.judge(call, batch)
            if at < len(batches):
                totals = [t + value * len(batch) for t, value in zip(totals, judged, strict=True)]
    loss, accuracy = (total / len(ids) for total in summed(totals, task.device))
    return {"val_loss": loss, "val_accuracy": accuracy}


def summed(values: list[float], device: Any) -> list[float]:
    """Sums over all ranks, in fp64."""
    box = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(box)
    result: list[float] = box.tolist()
    return result


def of_checkpoint(config: Config, split: Split, data: Data, checkpoint: Path) -> dict[str, float]:
    """Of a checkpoint of any format, in the precision that the run trains in."""
    device = torch.device(get_accelerator().current_device_name())
    net = model.build(config)
    model.fill(net, checkpoint)
    plain = config.zero.stage == 0
    net = net.to(device, torch.float32 if plain else DTYPES[config.precision]).eval()

    def call(**inputs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=plain and config.precision == "bf16"):
            return net(**inputs)

    return judge(Task(data=data, device=device), call, data.held_out, split)


def evaluate(config: Config, split: Split, data: Data, start: Start, output: Output) -> None:
    """`--evaluate`: the checkpoints that `start` names, in one table."""
    assert start.checkpoint is not None
    for note in start.notes:
        output.say(note)
    names = [_name(path, start) for path in (start.checkpoint, *start.others)]
    width = max(map(len, [*names, "checkpoint"]))
    heads = f"{'step':>8}  {'epoch':>6}  {'val loss':>10}  {'accuracy':>8}  {'saved with it':>13}"
    output.say(f"{len(data.held_out)} held-out samples of {config.data.source}")
    output.say(f"{'checkpoint':{width}}  {heads}")
    for name, path in zip(names, (start.checkpoint, *start.others), strict=True):
        measured = of_checkpoint(config, split, data, path)
        state = read(locate(path)).training
        saved = "?" if state.val_loss is None else f"{state.val_loss:.6f}"
        output.say(
            f"{name:{width}}  {_known(state.step):>8}  {_known(state.epoch):>6}"
            f"  {measured['val_loss']:10.6f}  {measured['val_accuracy']:8.4f}  {saved:>13}"
        )


def _name(path: Path, start: Start) -> str:
    name = str(path.relative_to(start.run)) if path.is_relative_to(start.run) else str(path)
    return path.name if name == "." else name


def _known(count: float | None) -> str:
    return "?" if count is None else str(count)
