"""A ZeRO folder: DeepSpeed's counters, its own or a client's scheduler, the settings in every shard.

DeepSpeed counts optimizer updates over the ends of epochs. `last_batch_iteration` is one less than the
scheduler's successful steps. On load every rank takes param_groups from its own shard, and they govern the
first update (DeepSpeed's stage_1_and_2.py, lr_schedules.py).

A resume takes the tag in `latest`; without that file nothing is loaded, with a warning (runtime/engine.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from ckpttools.containers.edit import place
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import escape
from ckpttools.formats.counters import BATCH
from ckpttools.formats.tags import LATEST, is_tag
from ckpttools.frameworks import client, parts
from ckpttools.frameworks.framework import Framework, Saved, damage, shown
from ckpttools.frameworks.huggingface import NUMBERED
from ckpttools.frameworks.mmengine import POINTER
from ckpttools.frameworks.rules import AutoResume, Rule
from ckpttools.location import Location
from ckpttools.numbered import by_number
from ckpttools.schedules.evidence import What, of_deepspeed
from ckpttools.stores.files import entries, is_folder, small_text
from ckpttools.training import BatchField, Counter, OptimizerSettings, SavedSchedule, Training, merge

WHICH: dict[str, What] = {"global": "total", "micro": "micro", "accumulation": "accumulation"}
OWN = {"last_batch_iteration"}  # the whole state of each of DeepSpeed's schedulers


def engine(model: TorchFile, shards: Sequence[TorchFile], ranks: int | None = None) -> Training:
    """What every ZeRO folder holds, whoever wrote it: the model file, and the ranks' optimizer files, or the
    file that stands for those of `ranks` ranks.
    """
    files = [model, *(shard for shard in shards if shard is not model)]
    stated = {name: parts.integer(model, "ds_config", key) for name, key in BATCH.items()}
    batch = {name: value for name, value in stated.items() if value is not None}
    steps = parts.integer(model, "global_steps")
    return Training(
        framework="deepspeed",
        unit="update",
        count=steps,
        evidence=of_deepspeed(batch, ranks or len(shards)),
        remainder="running",
        counters=(
            *parts.counter(model, "update", "global_steps"),
            *_samples(model),
            *parts.counter(model, "update", "skipped_steps", role="skipped"),
        ),
        optimizers=tuple(_optimizers(shards)),
        schedules=tuple(_schedules(model, files)),
        batch_fields=tuple(_batch_fields(files)),
        batch_names=tuple(
            (what, BATCH[key], "ds_config")
            for key, what in WHICH.items()
            if key in batch or (key != "global" and not batch)
        ),
        **parts.marked(model),
    )


def _samples(model: TorchFile) -> Iterator[Counter]:
    """`global_samples` grows by train_batch_size with each update: nominal, not the data's own count."""
    yield from parts.counter(model, "update", "global_samples", role="samples")


def _optimizers(shards: Sequence[TorchFile]) -> Iterator[OptimizerSettings]:
    found: list[OptimizerSettings] = []
    # the second up to 0.2, and in stage 3; then the model file of stage 0; the last in universal checkpoints
    inside = (
        ("optimizer_state_dict", "base_optimizer_state"),
        ("optimizer_state_dict",) * 2,
        ("optimizer", "optimizer_state_dict"),
        ("optimizer",),
        (),
    )
    for shard in shards:
        for keys in inside:
            settings = parts.optimizer(shard, "the optimizer", *keys)
            if settings is not None:
                found.append(settings)
                break
    if found:
        yield parts.same_groups(found)


def _schedules(model: TorchFile, files: list[TorchFile]) -> Iterator[SavedSchedule]:
    for found in parts.schedules(model, "torch", "update", "lr_scheduler"):
        if not set(found.states[0]) <= OWN:
            yield found
            continue
        config, optimizer = _sections(model)
        yield replace(
            found,
            framework="deepspeed",
            # some schedulers start from the optimizer's learning rate
            about={**(config or {}), **({"optimizer": optimizer} if optimizer is not None else {})},
            config_places=tuple(
                place(file, "ds_config") for file in files if _sections(file) == (config, optimizer)
            )
            if config is not None
            else (),
        )


def _sections(file: TorchFile) -> tuple[dict[str, object] | None, dict[str, object] | None]:
    """What ds_config says of the scheduler and of the optimizer."""
    scheduler, optimizer = (parts.mapping(file, "ds_config", key) for key in ("scheduler", "optimizer"))
    return scheduler, optimizer


def _batch_fields(files: list[TorchFile]) -> Iterator[BatchField]:
    for name, key in BATCH.items():
        found = [(file, parts.integer(file, "ds_config", key)) for file in files]
        stated = [(file, number) for file, number in found if number is not None]
        if stated:
            yield BatchField(
                name=f"ds_config.{key}",
                which=WHICH[name],
                value=stated[0][1],
                places=tuple(place(file, "ds_config", key) for file, _ in stated),
            )


def read(saved: Saved) -> Training:
    """DeepSpeed's own state, and what its client keeps beside it."""
    assert saved.engine is not None and saved.file is not None
    found = (client.of_model_file(saved.engine, saved.file), client.of_bundle(saved.engine, saved.place))
    return merge(saved.engine, *(each for each in found if each is not None))


def takes(folder: Location) -> Iterator[AutoResume]:
    names = {e.name for e in entries(folder)}
    tags = [e.name for e in entries(folder) if is_folder(e) and is_tag(folder / e.name)]
    if LATEST in names:
        tag = small_text(folder / LATEST, 4096).strip()
        path = folder / tag
        there = any(e.name == tag and is_folder(e) for e in entries(folder))
        problem = "" if there else "it is not there: loading fails"
        yield AutoResume(
            framework="DeepSpeed",
            path=path,
            why=f"latest names {escape(tag)}",
            problem=problem or damage(path),
            found=shown(tags),
        )
    elif tags and POINTER not in names and not any(NUMBERED.fullmatch(n) for n in names):
        yield AutoResume(
            framework="DeepSpeed",
            path=None,
            why="there is no file latest: load_checkpoint without a tag loads nothing, and only warns",
            problem=f"name the tag, or write it into latest: {escape(max(tags, key=by_number))} is the "
            f"last by number",
            found=shown(tags),
        )


def launch(dst: Location, ranks: object, is_tag: bool) -> str:
    at = f"{str(dst.parent)!r}, tag={dst.name!r}" if is_tag else repr(str(dst))
    return f"deepspeed --num_gpus {ranks} ...: engine.load_checkpoint({at})"


PLAIN = Rule(
    batch="the saved schedule and counters go on in old steps",
    constants="the checkpoint, where the code loads it",
    prefix=False,
)
FRAMEWORK = Framework(
    name="deepspeed",
    title="DeepSpeed",
    recognise=lambda saved: saved.zero,
    read=read,
    rule=PLAIN,
    launch=launch,
    takes=takes,
    pointers=(LATEST,),
    stated=(client.INFO,),
)
