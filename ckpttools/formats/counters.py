"""Counters, losses and batch settings, from the many names under which frameworks save them."""

from __future__ import annotations

from ckpttools.checkpoint import TrainState
from ckpttools.containers import fields
from ckpttools.containers.pickles import Node, plain
from ckpttools.schedules.evidence import What

STEP = ("global_step", "step", "global_steps", "total_steps", "iteration", "iter", "it")
ITERATION = ("iteration", "iter", "it")
EPOCH = ("epoch", "current_epoch")
TOTAL = ("max_steps", "total_iters", "max_iters")
DATASET = ("dataset_size", "num_train_samples", "train_samples")
SCHEDULER = (
    "scheduler_state_dict",
    "lr_scheduler_state_dict",
    "lr_scheduler",
    "scheduler",
    "lr_schedulers",
    "param_schedulers",
    "sched",
)
TRAIN_LOSS = ("train_loss", "loss")
VAL_LOSS = ("val_loss", "valid_loss", "eval_loss")
SAMPLES = ("global_samples", "samples_seen", "consumed_samples")
# how training code names the parts of a batch
BATCH_NAMES: dict[str, What] = {
    "train_micro_batch_size_per_gpu": "micro",
    "per_device_train_batch_size": "micro",
    "micro_batch_size": "micro",
    "batch_size_per_gpu": "micro",
    "train_batch_size": "total",
    "global_batch_size": "total",
    "effective_batch_size": "total",
    "gradient_accumulation_steps": "accumulation",
    "accumulation_steps": "accumulation",
    "world_size": "ranks",
}
# ds_config's names for the three parts of a batch
BATCH = {
    "global": "train_batch_size",
    "micro": "train_micro_batch_size_per_gpu",
    "accumulation": "gradient_accumulation_steps",
}


def train_state(root: fields.Mapping, step_keys: tuple[str, ...] = STEP) -> TrainState:
    """What a checkpoint's top level says about where training stood. Absent values are None."""
    meta = fields.as_mapping(root.get("meta"))  # MMEngine
    epoch = _first(root, EPOCH)
    iteration = _first(root, ITERATION)
    if meta is not None:
        epoch = fields.number(meta.get("epoch")) if epoch is None else epoch
        iteration = fields.number(meta.get("iter")) if iteration is None else iteration
    step = _first(root, step_keys)
    return TrainState(
        step=_int(step),
        iteration=_int(iteration),
        epoch=epoch,
        samples=_int(_first(root, SAMPLES)),
        skipped_steps=_int(_first(root, ("skipped_steps",))),
        train_loss=_first(root, TRAIN_LOSS),
        val_loss=_first(root, VAL_LOSS),
        scheduler=_scheduler(root),
        batch=batch_settings(root.get("ds_config")),
    )


def batch_settings(config: Node) -> dict[str, int]:
    """The batch triple of a ds_config, as far as it is stated ("auto" is not)."""
    pairs = fields.as_mapping(config)
    if pairs is None:
        return {}
    found = {name: fields.integer(pairs.get(key)) for name, key in BATCH.items()}
    return {name: value for name, value in found.items() if value is not None}


def _first(root: fields.Mapping, keys: tuple[str, ...]) -> float | int | None:
    for key in keys:
        value = fields.number(root.get(key))
        if value is not None:
            return value
    return None


def _int(value: float | int | None) -> int | None:
    return value if isinstance(value, int) else None


def _scheduler(root: fields.Mapping) -> dict[str, object]:
    for key in SCHEDULER:
        node = root.get(key)
        if isinstance(node, list):
            return {"schedulers": plain(node)} if node else {}
        if fields.as_mapping(node) is not None:
            shown = plain(node)
            return dict(shown) if isinstance(shown, dict) else {}
    return {}
