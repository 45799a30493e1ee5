"""OpenPCDet: `it` counts iterations, and the model's own buffer `global_step` too.

The one-cycle schedule is a function of `it` and not saved. Source: tools/train_utils/train_utils.py.
A resume takes the newest *.pth by modification time; one that cannot be loaded is silently passed over
(tools/train.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from shlex import quote

from msgspec.structs import replace

from ckpttools.containers import fields
from ckpttools.containers.edit import at
from ckpttools.containers.torch_file import TorchFile
from ckpttools.frameworks import parts
from ckpttools.frameworks.framework import Framework, Saved, damage, inner, shown
from ckpttools.frameworks.rules import AutoResume, Rule
from ckpttools.location import Location
from ckpttools.schedules.evidence import Fact
from ckpttools.stores.files import entries, is_file, stat
from ckpttools.training import Training

NAMES = re.compile(r"checkpoint_epoch_\d+\.pth|latest_model\.pth")


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
        epochs_done=epoch,
        evidence=(Fact("accumulation", 1, 1, "OpenPCDet, which makes an update of every batch"),),
        batches=count // epoch if whole and count and epoch else None,
        counters=(
            *parts.counter(file, "micro", "it"),
            *parts.counter(file, "micro", "model_state", "global_step"),
        ),
        # the scheduler sets lr and momentum from `it` before each iteration: what is saved is not used
        optimizers=(replace(found, first_update=False),) if found is not None else (),
        follows=True,
        batch_names=(("micro", "OPTIMIZATION.BATCH_SIZE_PER_GPU", "OpenPCDet's configuration"),),
        notes=("the one-cycle schedule is a function of `it` and of the config: it follows by itself",),
        **parts.marked(file),
    )


def keys(root: fields.Mapping) -> Iterator[str]:
    """What checkpoint_state of train_utils.py writes."""
    version = root.get("version")
    if isinstance(version, str) and version.startswith("pcdet+"):
        yield from sorted({"epoch", "it", "model_state", "optimizer_state"} - set(root.names()))


def takes(folder: Location) -> Iterator[AutoResume]:
    place = inner(folder, "ckpt")
    files = [e for e in entries(place) if is_file(e) and e.name.endswith(".pth")]
    if not any(NAMES.fullmatch(e.name) for e in files):
        return
    files.sort(key=lambda e: stat(place / e.name).mtime_ns)
    newest = place / files[-1].name
    problem = damage(newest)
    yield AutoResume(
        framework="OpenPCDet",
        path=newest,
        why=f"the newest of {len(files)} *.pth by modification time, whatever their numbers",
        problem=f"{problem}; it is silently passed over, and an older one is taken" if problem else "",
        found=shown([e.name for e in files]),
    )


FRAMEWORK = Framework(
    name="openpcdet",
    title="OpenPCDet",
    recognise=is_openpcdet,
    read=read,
    rule=Rule(
        batch="`it` is taken as it is and the learning rate is computed from it: it jumps, and the epoch is "
        "cut short",
        constants="the new configuration",
        saved=False,
        strict=False,
    ),
    launch=lambda dst, n, tag: f"python train.py --ckpt {quote(str(dst))}",
    keys=keys,
    takes=takes,
)
