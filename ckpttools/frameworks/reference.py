"""The keys that `ckpt train` adds to DeepSpeed's, or to those of a single file.

They are its position in epochs and samples, and its configuration.

`samples_in_epoch` is the data's own position and stays as it is: a resumed run goes on at the very next
sample whatever its batch size. Epochs drop their last, incomplete global batch. Source: trainer/state.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote

from msgspec.structs import replace

from ckpttools.containers.edit import place
from ckpttools.containers.torch_file import TorchFile
from ckpttools.frameworks import client, parts, plain
from ckpttools.frameworks.framework import Framework, Saved
from ckpttools.frameworks.rules import CAREFUL, SAFE, About, Rule, Setting
from ckpttools.schedules.evidence import What, stated
from ckpttools.training import BatchField, Counter, Role, Training, merge

CONFIG = "the configuration of ckpt train"
BATCH = ("config", "batch")


def is_ours(saved: Saved) -> bool:
    file = saved.file
    if file is None:
        return False
    return parts.integer(file, "format_version") == 1 and parts.integer(file, "samples_in_epoch") is not None


def read(saved: Saved) -> Training:
    """Its keys in the model file, over DeepSpeed's, and a bundle's training_info.json. Of a single file (it
    is of stage 0) they stand beside what any code saves."""
    assert saved.file is not None
    if not saved.zero:
        single, own = plain.read(saved), _read(saved.file)
        batch = (f for field in own.batch_fields for f in stated(field.which, field.value, field.name))
        return replace(
            own,
            evidence=tuple(batch),
            optimizers=single.optimizers,
            schedules=single.schedules,
            marker=single.marker,
            marked=single.marked,
        )
    found = saved.over(_read(saved.file))
    bundled = client.of_bundle(found, saved.place)
    return found if bundled is None else merge(found, bundled)


def _read(file: TorchFile) -> Training:
    size, total = parts.integer(file, "dataset_size"), parts.integer(file, *BATCH, "global_batch_size")
    epochs = parts.integer(file, "config", "epochs")
    planned = parts.integer(file, "config", "schedule", "total_steps")
    updates = size // total if size and total else None
    inside = parts.integer(file, "samples_in_epoch")
    return Training(
        framework="ckpt train",
        unit="update",
        count=parts.integer(file, "iter"),
        epochs_done=parts.integer(file, "epoch"),
        size=size,
        updates=updates,
        epochs=epochs,
        total_count=planned or (epochs * updates if epochs and updates else None),
        remainder="drop",
        drop_last=True,
        counters=(
            *parts.counter(file, "update", "iter"),
            *parts.counter(file, "update", "global_step"),
            *(_setting(file, "total_steps", "total")),
            *(_setting(file, "warmup_steps", "warmup")),
        ),
        batch_fields=tuple(_fields(file)),
        inside=inside,
        configuration=parts.mapping(file, "config") or {},
        batch_names=tuple(
            (field.which, field.name.removeprefix("config."), CONFIG) for field in _fields(file)
        ),
    )


def _setting(file: TorchFile, key: str, role: Role) -> Iterator[Counter]:
    """A length of the schedule, as the configuration gave it."""
    for found in parts.counter(file, "update", "config", "schedule", key, role=role):
        yield replace(found, name=f"schedule.{key}", config=CONFIG)


def _fields(file: TorchFile) -> Iterator[BatchField]:
    names: dict[str, What] = {
        "global_batch_size": "total",
        "micro_batch_size": "micro",
        "gradient_accumulation_steps": "accumulation",
    }
    for key, which in names.items():
        found = parts.integer(file, *BATCH, key)
        if found is not None:
            yield BatchField(
                name=f"config.batch.{key}",
                which=which,
                value=found,
                places=(place(file, *BATCH, key),),
            )


# what another value does to a single file that is gone on from
SETTINGS = (
    Setting(
        pattern=r"batch\.global_batch_size", about=About.BATCH, cls=CAREFUL,
        why="an update is of another number of samples, and the schedule counts updates",
    ),
    Setting(pattern=r"data\..*", about=About.DATA, cls=CAREFUL, why="the samples that come next are others"),
    Setting(
        pattern=r"epochs", about=About.LENGTH, cls=CAREFUL,
        why="the schedule is made for the new length: the learning rate goes on along another curve",
    ),
    Setting(
        pattern=r"optimizer\..*", about=About.OPTIMIZER, cls=CAREFUL,
        why="betas, eps, weight decay and the rate of the first update are loaded as saved; clipping is"
        " new, and the learning rate after that update",
    ),
    Setting(
        pattern=r"schedule\..*", about=About.SCHEDULE, cls=CAREFUL,
        why="it is made anew: the learning rate goes on at the old step along another curve",
    ),
    Setting(pattern=r".*", cls=SAFE, why=""),  # how an update is made of parts, what is saved and logged
)  # fmt: skip
FRAMEWORK = Framework(
    name="ckpt train",
    title="ckpt train",
    recognise=is_ours,
    read=read,
    rule=Rule(
        batch="the saved schedule and counters go on in old steps",
        constants="the checkpoint, where the code loads it",
        prefix=False,
    ),
    settings=SETTINGS,
    launch=lambda dst, n, tag: f"ckpt train CONFIG --nproc {n} --resume --resume-from {quote(str(dst))}",
)
