"""Single files of plain training code, timm's among them: a step, an epoch, a scheduler's state.

They lie under the usual names. Whether the step counts updates or batches is not saved; timm counts epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from shlex import quote

from ckpttools.containers import fields
from ckpttools.containers.edit import at
from ckpttools.containers.torch_file import TorchFile
from ckpttools.formats.counters import DATASET, EPOCH, OPTIMIZER, SCHEDULER, STEP, TOTAL
from ckpttools.frameworks import parts
from ckpttools.frameworks.framework import Framework, Saved
from ckpttools.frameworks.rules import Rule
from ckpttools.training import OptimizerSettings, SavedSchedule, Training
from ckpttools.tree import Key

CODE = "your training code"


def is_timm(saved: Saved) -> bool:
    """An architecture's name beside epoch and state: timm/utils/checkpoint_saver.py."""
    if saved.file is None or saved.zero:
        return False
    keys = (at(saved.file.value, key) for key in ("arch", "state_dict"))
    return all(key is not None for key in keys) and parts.integer(saved.file, "epoch") is not None


def read(saved: Saved) -> Training:
    """Whatever wrote it."""
    assert saved.file is not None
    return _plain(saved.file)


def _plain(file: TorchFile) -> Training:
    counts = [c for key in STEP for c in parts.counter(file, "update", key)]
    epoch = next((n for key in EPOCH if (n := parts.integer(file, key)) is not None), None)
    return Training(
        framework="plain",
        unit="update",
        count=counts[0].value if counts else None,
        epochs_done=epoch,
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


def _timm_keys(root: fields.Mapping) -> Iterator[str]:
    """CheckpointSaver._save of timm."""
    if root.get("version") == 2 and {"arch", "optimizer"} <= set(root.names()):
        yield from (key for key in ("epoch", "state_dict") if key not in root)


TIMM = Framework(
    name="timm",
    title="timm",
    recognise=is_timm,
    read=lambda saved: replace(read(saved), framework="timm"),
    rule=Rule(
        batch="counters are epochs, which do not change", constants="the new configuration", saved=False
    ),
    launch=lambda dst, n, tag: f"python train.py --resume {quote(str(dst))}",
    keys=_timm_keys,
)
FRAMEWORK = Framework(
    name="plain",
    title="plain training code",
    recognise=lambda saved: saved.file is not None and not saved.zero,
    read=read,
    rule=Rule(
        batch="the saved schedule and counters go on in old steps",
        constants="the checkpoint, where the code loads it",
        prefix=False,
    ),
    launch=lambda dst, n, tag: f"resume your training code from {str(dst)!r}",
)
