"""MMEngine and xtuner: everything counts micro-batches, accumulated or not.

`meta.iter` is the number of iterations done, `message_hub.runtime_info.iter` the index of the last one.
`meta.epoch` stays 0 in an IterBasedTrainLoop (mmengine/runner/loops.py).
`param_schedulers` are saved without class names; the config's text in `meta.cfg` may tell. With several
parameter groups `base_param_settings` is handled as one group more (mmengine/optim/optimizer/
optimizer_wrapper.py). The same keys lie at the top of a single file and of a DeepSpeed folder's model file.

A resume takes the path in `last_checkpoint`, word for word; nothing is searched, nothing checked
(mmengine/runner/checkpoint.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from ckpttools.containers import fields
from ckpttools.containers.edit import at, place
from ckpttools.containers.pickles import Object, as_mapping
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import escape
from ckpttools.frameworks import parts
from ckpttools.frameworks.framework import Framework, Saved, damage, shown
from ckpttools.frameworks.rules import CAREFUL, IMPOSSIBLE, SAFE, About, AutoResume, Rule, Setting
from ckpttools.location import Location
from ckpttools.schedules.evidence import Fact, What, stated
from ckpttools.stores.files import entries, exists, is_folder, small_text
from ckpttools.stores.links import resolved
from ckpttools.training import Counter, OptimizerSettings, SavedSchedule, Training

CONFIG = "the MMEngine config"
KIND = "MMEngine config"
OUTSIDE = "val_interval, and the intervals of hooks that count iterations"
STAYS = (
    "meta.cfg (the old run's configuration, as text) and the histories in message_hub.log_scalars stay as "
    "they were: on a resume MMEngine goes by the new run's configuration"
)
APART = (
    "iterations and epochs do not go together: the run was resumed within an epoch, which MMEngine then "
    "begins anew, or with another batch; it ends with its epochs, after how many iterations is not known"
)
RUNTIME = ("message_hub", "runtime_info")
POINTER = "last_checkpoint"


def is_mmengine(saved: Saved) -> bool:
    file = saved.file
    if file is None:
        return False
    meta = parts.mapping(file, "meta")
    return meta is not None and "iter" in meta and at(file.value, "message_hub") is not None


def read(saved: Saved) -> Training:
    """A single file, or the model file of a DeepSpeed folder."""
    assert saved.file is not None
    return saved.over(_read(saved.file, in_folder=saved.zero))


def _read(file: TorchFile, *, in_folder: bool) -> Training:
    """`in_folder`: the model file of a DeepSpeed folder, whose shards hold the optimizer's settings."""
    from ckpttools.schedules.mmengine.config import settings  # of use to these checkpoints alone

    config = settings(at(file.value, "meta", "cfg"))
    loader = config.get("train_dataloader")
    loop = config.get("train_cfg")
    epochs, iterations = _entry(loop, "max_epochs"), _entry(loop, "max_iters")
    by_epoch = iterations is None
    epochs = parts.integer(file, *RUNTIME, "max_epochs") or epochs
    total = parts.integer(file, *RUNTIME, "max_iters") or iterations
    count = parts.integer(file, "meta", "iter")
    batches = None
    if by_epoch and epochs and total and total % epochs == 0 and epochs > 1:
        batches = total // epochs
    epoch = parts.integer(file, "meta", "epoch") if batches is not None else None
    apart = _is_apart(count, epoch, batches)
    if apart:
        batches = total = None
    return Training(
        framework="mmengine",
        unit="micro",
        count=count,
        epochs_done=epoch,
        evidence=tuple(_batch(config)),
        # without its configuration a loop of one epoch may be either
        endless=not by_epoch or (loop is None and epochs in (None, 1)),
        batches=batches,
        epochs=epochs if epoch is not None or batches is not None else None,
        total_count=total,
        remainder="running",
        drop_last=_entry(loader, "drop_last") == 1,
        counters=(*(c for c in _counters(file) if c.role != "total" or not apart), *_planned(iterations)),
        optimizers=() if in_folder else tuple(_optimizers(file)),
        schedules=tuple(_schedules(file, batches)),
        losses=tuple(_losses(file)),
        configuration=config,
        scheduled=bool(config.get("param_scheduler")),
        batch_names=tuple(_names(config)),
        outside=() if by_epoch else (OUTSIDE,),
        stays=(STAYS,) if config else (),
        notes=(APART,) if apart else (),
        **parts.marked(file),
    )


def _is_apart(count: int | None, epoch: int | None, batches: int | None) -> bool:
    """Whether so many iterations cannot be in that epoch (an index, or the number of those done), by the
    length that epochs have now.
    """
    if count is None or epoch is None or batches is None:
        return False
    return not (epoch - 1) * batches - 1 <= count <= (epoch + 1) * batches + 1


def _batch(config: Mapping[str, object]) -> Iterator[Fact]:
    """The loader's batch is what an iteration counts. DeepSpeed's strategy accumulates by its own setting,
    every other wrapper by `accumulative_counts`, 1 by default (mmengine/optim/optimizer).
    """
    loader, wrapper, strategy = (config.get(key) for key in ("train_dataloader", "optim_wrapper", "strategy"))
    yield from stated("micro", _entry(loader, "batch_size"), "train_dataloader.batch_size")
    micro = _entry(strategy, "train_micro_batch_size_per_gpu")
    yield from stated("micro", micro, "strategy.train_micro_batch_size_per_gpu")
    steps = _entry(strategy, "gradient_accumulation_steps")
    yield from stated("accumulation", steps, "strategy.gradient_accumulation_steps")
    kind = wrapper.get("type") if isinstance(wrapper, Mapping) else None
    if kind in ("OptimWrapper", "AmpOptimWrapper", "ApexOptimWrapper"):
        given = _entry(wrapper, "accumulative_counts")
        default = "" if given else ", which is 1 where it is not given"
        yield from stated("accumulation", given or 1, f"optim_wrapper.accumulative_counts{default}")


def _losses(file: TorchFile) -> Iterator[tuple[str, float]]:
    """The last value of each loss in the message hub: HistoryBuffer keeps them as an array of float64."""
    logs = as_mapping(at(file.value, "message_hub", "log_scalars"))
    for name, buffer in logs.named() if logs is not None else ():
        pairs = as_mapping(buffer.state) if isinstance(buffer, Object) else None
        array = pairs.get("_log_history") if pairs is not None else None
        state = array.state if isinstance(array, Object) else None
        raw = state[-1] if isinstance(state, tuple) and state else None
        text = raw.args[0] if isinstance(raw, Object) and raw.args else None
        last = text[-8:] if isinstance(text, str) else ""
        if "loss" in name and len(last) == 8 and max(last) < "\u0100":
            yield name, struct.unpack("<d", last.encode("latin1"))[0]


def _names(config: Mapping[str, object]) -> Iterator[tuple[What, str, str]]:
    """The settings of the new run's configuration."""
    yield "micro", "train_dataloader.batch_size", CONFIG
    strategy = config.get("strategy")
    if isinstance(strategy, Mapping):
        if "train_micro_batch_size_per_gpu" in strategy:
            yield "micro", "strategy.train_micro_batch_size_per_gpu", CONFIG
        yield "accumulation", "strategy.gradient_accumulation_steps", CONFIG
    else:
        yield "accumulation", "optim_wrapper.accumulative_counts", CONFIG


def _counters(file: TorchFile) -> Iterator[Counter]:
    yield from parts.counter(file, "micro", "meta", "iter")
    yield from parts.counter(file, "micro", *RUNTIME, "iter", offset=1)
    yield from parts.counter(file, "micro", *RUNTIME, "max_iters", role="total")
    yield from parts.counter(file, "micro", "ema_state_dict", "steps")


def _planned(iterations: int | None) -> Iterator[Counter]:
    """The length of an iteration-based run, which the new run reads from its configuration."""
    if iterations is not None and iterations > 0:
        yield Counter(
            name="train_cfg.max_iters",
            value=iterations,
            unit="micro",
            places=(),
            role="total",
            config=CONFIG,
        )


def _optimizers(file: TorchFile) -> Iterator[OptimizerSettings]:
    found = parts.optimizer(file, "the optimizer", "optimizer")
    if found is not None:
        yield _with_base(file, found, "optimizer", "base_param_settings")
        return
    names = parts.mapping(file, "optimizer") or {}
    for name in names:  # an OptimWrapperDict: one optimizer per name
        found = parts.optimizer(file, name, "optimizer", name)
        if found is not None:
            yield _with_base(file, found, "optimizer", name, "base_param_settings")


def _with_base(file: TorchFile, found: OptimizerSettings, *keys: str) -> OptimizerSettings:
    base = parts.mapping(file, *keys)
    if base is None:
        return found
    plain = {key: value for key, value in base.items() if key != "params"}
    return replace(found, base=place(file, *keys), base_group=plain)


def _schedules(file: TorchFile, batches: int | None) -> Iterator[SavedSchedule]:
    cfg = at(file.value, "meta", "cfg")
    about: dict[str, object] = {"units_per_epoch": batches}
    if isinstance(cfg, str):
        about["cfg"] = cfg
    names = parts.mapping(file, "param_schedulers")
    if names is None:
        for found in parts.schedules(file, "mmengine", "micro", "param_schedulers"):
            yield replace(found, about=about)
        return
    kept = as_mapping(at(file.value, "optimizer"))
    order = kept.names() if kept is not None else []
    for i, name in enumerate(names):
        own = order.index(name) if name in order else i
        for found in parts.schedules(file, "mmengine", "micro", "param_schedulers", name, optimizer=own):
            yield replace(found, about=about)


def _entry(section: object, key: str) -> int | None:
    value = section.get(key) if isinstance(section, dict) else None
    return int(value) if isinstance(value, int) else None


def keys(root: fields.Mapping) -> Iterator[str]:
    """Runner.save_checkpoint writes meta.epoch, meta.iter and message_hub beside an optimizer."""
    meta = fields.as_mapping(root.get("meta"))
    if meta is not None and "mmengine_version" in meta and "optimizer" in root:
        yield from (f"meta.{key}" for key in ("epoch", "iter") if key not in meta)
        yield from (key for key in ("message_hub",) if key not in root)


def takes(folder: Location) -> Iterator[AutoResume]:
    names = [e.name for e in entries(folder)]
    if POINTER not in names:
        return
    text = small_text(folder / POINTER, 4096).strip()
    named = Path(text)
    if not named.is_absolute() and len(named.parts) == 1 and is_folder(folder / named):
        return  # ckpt train's pointer: a name beside it
    problem = ""
    if not exists(named):
        beside = exists(folder / named.name)
        problem = "it is not there: loading fails" + (
            f"; {escape(named.name)} lies beside the pointer, which was written elsewhere" if beside else ""
        )
    elif resolved(named).parent != resolved(folder):
        problem = "it is in another folder: the run was copied or moved, and would go on from the original"
    yield AutoResume(
        framework="MMEngine",
        path=named if exists(named) else None,
        why=f"{POINTER} names {escape(text)}, which is taken word for word",
        problem=problem or damage(named),
        found=shown([n for n in names if n.endswith(".pth")]),
    )


# of an MMEngine configuration; the first pattern that matches the whole path counts
SETTINGS = (
    Setting(
        pattern=r"train_dataloader\.batch_size|optim_wrapper\.accumulative_counts|optim_wrapper\.optimizer\.lr|"
        r"strategy\..*|train_cfg\.max_.*|optim_wrapper\.optimizer\.params.*",
        cls=SAFE,
        why="",  # looked at by rules of their own
    ),
    Setting(
        pattern=r"param_scheduler.*", about=About.SCHEDULE, cls=SAFE,
        why="no effect: the saved ones are loaded",
    ),
    Setting(
        pattern=r"optim_wrapper\.optimizer\.type", about=About.OPTIMIZER, cls=IMPOSSIBLE,
        why="the optimizer's state is saved for its class",
    ),
    Setting(
        pattern=r"optim_wrapper\.optimizer\..*", cls=SAFE, why="no effect: the saved param_groups are loaded"
    ),
    Setting(
        pattern=r"model\..*", about=About.MODEL, cls=CAREFUL,
        why="whether every tensor still fits, a configuration does not tell: name the model with --model",
    ),
    Setting(
        pattern=r"(default|custom)_hooks.*|env_cfg.*|vis.*|log_.*|work_dir|(val|test)_.*|resume|load_from|"
        r"experiment_name|launcher|auto_scale_lr.*|.*(num_workers|persistent_workers|pin_memory|"
        r"prefetch_factor|interval|pipeline.*|transforms?)",
        cls=SAFE,
        why="it has no part in what is saved",
    ),
    Setting(
        pattern=r"train_dataloader\..*|randomness.*", about=About.DATA, cls=CAREFUL,
        why="it decides which samples come next",
    ),
    Setting(pattern=r".*", cls=CAREFUL, why="what it does to a resumed run is not judged here"),
)  # fmt: skip
FRAMEWORK = Framework(
    name="mmengine",
    title="MMEngine",
    recognise=is_mmengine,
    read=read,
    rule=Rule(
        batch="the saved begin, end and T_max win over the new configuration: the run goes on along the old "
        "curve, in old iterations, and skips or repeats data",
        constants="the checkpoint",
        strict=False,
        anew=True,
        equal=("meta.iter", ".".join((*RUNTIME, "iter"))),
    ),
    launch=lambda dst, n, tag: (
        f"load_from = {str(dst)!r} and resume = True in the configuration, on {n} ranks"
    ),
    config=KIND,
    settings=SETTINGS,
    keys=keys,
    takes=takes,
    pointers=(POINTER,),
)
