"""OpenPCDet: `it` counts iterations, and the model's own buffer `global_step` too.

The one-cycle schedule is a function of `it` and not saved. Source: tools/train_utils/train_utils.py.
"""

from __future__ import annotations

from dataclasses import replace

from ckpttools.containers.edit import at
from ckpttools.containers.torch_file import TorchFile
from ckpttools.frameworks import parts
from ckpttools.frameworks.framework import Framework, Saved
from ckpttools.schedules.evidence import Fact
from ckpttools.training import Training


def is_openpcdet(saved: Saved) -> bool:
    file = saved.file
    if file is None or saved.zero:
        return False
    return at(file.value, "model_state") is not None and parts.integer(file, "it") is not None


def read(saved: Saved) -> Training:
    """checkpoint_epoch_N.pth or latest_model.pth."""
    assert saved.file is not None
    return _read(saved.file)


def _read(file: TorchFile) -> Training:
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


FRAMEWORK = Framework(name="openpcdet", recognise=is_openpcdet, read=read)
