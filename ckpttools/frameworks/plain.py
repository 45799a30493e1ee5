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
from ckpttools.schedules.lengths import Unit
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
    optimizers = tuple(_optimizers(file))
    updates = [c.value for c in counts] + [o.steps for o in optimizers[:1] if o.steps is not None]
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
        optimizers=optimizers,
        schedules=tuple(_schedules(file, [epoch] if epoch is not None else [], updates)),
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


def _schedules(file: TorchFile, epochs: list[int], updates: list[int]) -> Iterator[SavedSchedule]:
    for key in SCHEDULER:
        keys: tuple[Key, ...] = (key,)
        found = list(parts.schedules(file, "torch", None, *keys))
        if found:
            yield from (_own(each, epochs, updates) for each in found)
            return


def _own(schedule: SavedSchedule, epochs: list[int], updates: list[int]) -> SavedSchedule:
    """timm's schedulers save other fields than torch's, and what they are at in the counters alone."""
    if all("t_in_epochs" in state or "param_group_field" in state for state in schedule.states):
        by_epoch = all(state.get("t_in_epochs") is True for state in schedule.states)
        # what is saved is the number of the last one, or how many there were; the step comes before or after
        counts = [n + off for n in (epochs if by_epoch else updates) for off in (0, 1, -1)]
        unit: Unit | None = None if by_epoch else "update"
        return replace(schedule, framework="timm", unit=unit, about={"counts": counts})
    deepspeed = all(set(state) == {"last_batch_iteration"} for state in schedule.states)
    return replace(schedule, framework="deepspeed" if deepspeed else schedule.framework)


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
