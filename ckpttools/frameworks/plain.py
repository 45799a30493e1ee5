"""Single files of plain training code, timm's among them: a step, an epoch, a scheduler's state.

They lie under the usual names. Whether the step counts updates or batches is not saved; timm counts epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from shlex import quote

from msgspec.structs import replace

from ckpttools.containers import fields
from ckpttools.containers.edit import at, place
from ckpttools.containers.pickles import Node, as_mapping
from ckpttools.containers.torch_file import TorchFile
from ckpttools.formats.counters import BATCH_NAMES, DATASET, EPOCH, OPTIMIZER, SCHEDULER, STEP, TOTAL
from ckpttools.frameworks import parts
from ckpttools.frameworks.framework import Framework, Saved
from ckpttools.frameworks.rules import Rule
from ckpttools.schedules.evidence import stated
from ckpttools.schedules.lengths import Unit
from ckpttools.training import BatchField, OptimizerSettings, SavedSchedule, Training
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
    found = _schedules(file, optimizers)
    batch = {k: n for k in BATCH_NAMES if (n := parts.integer(file, k)) is not None and n > 0}
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
        schedules=tuple(_own(s, [] if epoch is None else [epoch], updates) for s in found),
        evidence=tuple(
            fact for k, n in batch.items() for fact in stated(BATCH_NAMES[k], n, f"the file's {k}")
        ),
        batch_fields=tuple(
            BatchField(name=k, which=BATCH_NAMES[k], value=n, places=(place(file, k),))
            for k, n in batch.items()
        ),
        batch_names=(
            ("micro", "the data loader's batch_size", CODE),
            ("accumulation", "gradient accumulation", CODE),
        ),
        outside=("whatever else in your training code counts steps",),
        **parts.marked(file),
    )


def _optimizers(file: TorchFile) -> Iterator[OptimizerSettings]:
    """Those under the usual names first, then what others hold: optimizer_g, optimizer_d ..."""
    for name in _names(file, OPTIMIZER):
        node = at(file.value, name)
        below = [()] if parts.is_optimizer(node) else [(key,) for key in _each(node, parts.is_optimizer)]
        for key in below:
            found = parts.optimizer(file, name + "".join(f"[{k}]" for k in key), name, *key)
            if found is not None:
                yield found


def _schedules(file: TorchFile, optimizers: Sequence[OptimizerSettings]) -> Iterator[SavedSchedule]:
    """Those under the usual names may be of any class; others are known by what torch's hold. A list is
    stepped in its order, a dict has one for each optimizer.
    """
    places: list[tuple[Key, ...]] = []
    for name in _names(file, SCHEDULER):
        node = at(file.value, name)
        each = [] if parts.is_schedule(node) else list(_each(node, parts.is_schedule))
        if each and as_mapping(node) is not None:
            places += [(name, key) for key in each]
        elif each or name in SCHEDULER or parts.is_schedule(node):
            places.append((name,))
    found = [saved for keys in places for saved in parts.schedules(file, "torch", None, *keys)]
    for i, saved in enumerate(found):
        yield from parts.shared_out(saved, optimizers, i if len(found) == len(optimizers) else 0)


def _names(file: TorchFile, usual: tuple[str, ...]) -> list[str]:
    """The names at the top of a file, the usual ones first."""
    root = as_mapping(file.value)
    names = root.names() if root is not None else []
    return [*(n for n in usual if n in names), *(n for n in names if n not in usual)]


def _each(node: Node, is_one: Callable[[Node], bool]) -> Iterator[Key]:
    """The keys of a list or dict that holds nothing but such states."""
    pairs = as_mapping(node)
    inside = list(enumerate(node)) if isinstance(node, list | tuple) else pairs.pairs if pairs else []
    if inside and all(is_one(each) for _, each in inside):
        yield from (key for key, _ in inside if isinstance(key, str | int))


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
