"""Single files of plain training code, and the layouts of frameworks that save such files.

OpenPCDet: `it` counts iterations, the model's own buffer `global_step` too, the one-cycle schedule is a
function of `it` and not saved. timm: everything counts epochs. Others: a step, an epoch and a scheduler's
state under the usual names; whether the step counts updates or batches is not saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckpttools.containers.edit import at
from ckpttools.containers.torch_file import TorchFile
from ckpttools.formats.counters import DATASET, EPOCH, SCHEDULER, STEP, TOTAL
from ckpttools.formats.monolithic import OPTIMIZER
from ckpttools.frameworks import lightning, mmengine, parts
from ckpttools.schedules.evidence import Fact
from ckpttools.training import Key, OptimizerSettings, SavedSchedule, Training

CODE = "your training code"


def read(file: TorchFile) -> Training:
    """Whatever wrote it."""
    if lightning.is_lightning(file):
        return lightning.read(file)
    if mmengine.is_mmengine(file):
        return mmengine.read(file)
    if at(file.value, "model_state") is not None and parts.integer(file, "it") is not None:
        return _openpcdet(file)
    return _plain(file)


def _openpcdet(file: TorchFile) -> Training:
    count, epoch = parts.integer(file, "it"), parts.integer(file, "epoch")
    found = parts.optimizer(file, "the optimizer", "optimizer_state")
    # checkpoint_epoch_N.pth is saved at the end of an epoch, latest_model.pth inside one
    at_end = file.path.name.startswith(f"checkpoint_epoch_{epoch}.")
    whole = bool(at_end and count and epoch and count % epoch == 0)
    return Training(
        framework="openpcdet",
        unit="micro",
        count=count,
        epoch=epoch,
        evidence=(Fact("accumulation", 1, 1, "OpenPCDet, which makes an update of every batch"),),
        batches=count // epoch if whole and count and epoch else None,
        counters=(
            *parts.counter(file, "micro", "it"),
            *parts.counter(file, "micro", "model_state", "global_step"),
        ),
        # the scheduler sets lr and momentum from `it` before each iteration: what is saved is not used
        optimizers=(replace(found, first_update=False),) if found is not None else (),
        batch_names=(("micro", "OPTIMIZATION.BATCH_SIZE_PER_GPU", "OpenPCDet's configuration"),),
        notes=("the one-cycle schedule is a function of `it` and of the config: it follows by itself",),
        **parts.marked(file),
    )


def _plain(file: TorchFile) -> Training:
    counts = [c for key in STEP for c in parts.counter(file, "update", key)]
    epoch = next((n for key in EPOCH if (n := parts.integer(file, key)) is not None), None)
    return Training(
        framework="plain",
        unit="update",
        count=counts[0].value if counts else None,
        epoch=epoch,
        size=next((n for key in DATASET if (n := parts.integer(file, key))), None),
        counters=(
            *counts,
            *(c for key in TOTAL for c in parts.counter(file, "update", key, role="total")),
        ),
        optimizers=tuple(_optimizers(file)),
        schedules=tuple(_schedules(file)),
        batch_names=(
            ("micro", "the data loader's batch_size", CODE),
            ("accumulation", "gradient accumulation", CODE),
        ),
        outside=("whatever else in your training code counts steps",),
        **parts.marked(file),
    )


def _optimizers(file: TorchFile) -> Iterator[OptimizerSettings]:
    for key in OPTIMIZER:
        node = at(file.value, key)
        if isinstance(node, list):
            found = [parts.optimizer(file, f"{key}[{i}]", key, i) for i in range(len(node))]
            known = [each for each in found if each is not None]
        else:
            one = parts.optimizer(file, key, key)
            known = [one] if one is not None else []
        if known:
            yield from known
            return


def _schedules(file: TorchFile) -> Iterator[SavedSchedule]:
    for key in SCHEDULER:
        keys: tuple[Key, ...] = (key,)
        found = list(parts.schedules(file, "torch", None, *keys))
        if found:
            yield from (_own(each) for each in found)
            return


def _own(schedule: SavedSchedule) -> SavedSchedule:
    """timm's schedulers save other fields than torch's."""
    timm = all("t_in_epochs" in state or "param_group_field" in state for state in schedule.states)
    deepspeed = all(set(state) == {"last_batch_iteration"} for state in schedule.states)
    return replace(schedule, framework="timm" if timm else "deepspeed" if deepspeed else schedule.framework)
