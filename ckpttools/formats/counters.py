"""Counters, losses and batch settings, from the many names under which frameworks save them."""

from __future__ import annotations

from typing import Any

from ckpttools.containers import fields
from ckpttools.containers.edit import value as plain
from ckpttools.containers.nodes import decode
from ckpttools.containers.pickles import Node, Object
from ckpttools.containers.torch_file import TorchFile
from ckpttools.schedules.evidence import What
from ckpttools.training import Training
from ckpttools.tree import Path

STEP = ("global_step", "step", "global_steps", "total_steps", "iteration", "iter", "iter_num", "it")
ITERATION = ("iteration", "iter", "iter_num", "it")
EPOCH = ("epoch", "current_epoch")
TOTAL = ("max_steps", "total_iters", "max_iters")
DATASET = ("dataset_size", "num_train_samples", "train_samples")
SCHEDULER = (
    "scheduler_state_dict",
    "lr_scheduler_state_dict",
    "lr_scheduler",
    "scheduler",
    "schedulers",
    "lr_schedulers",
    "param_schedulers",
    "sched",
)
COMMON = "common"  # the values of Megatron's common.pt
# where training code keeps them within its values; train_state: torchtitan
PLACES: tuple[Path, ...] = ((), ("train_state",), ("trainer_state",), ("meta",), (COMMON,))
OPTIMIZER = (
    "optimizer_state_dict",
    "optimizer",
    "optim",
    "optimizer_state",
    "optimizer_states",
    "optimizers",
)
TRAIN_LOSS = ("train_loss", "loss")
VAL_LOSS = ("val_loss", "valid_loss", "eval_loss")
SAMPLES = ("global_samples", "samples_seen", "consumed_samples")
# the fields of Training that are numbers, and what training code calls them
NAMES: dict[str, tuple[str, ...]] = {
    "step": STEP,
    "iteration": ITERATION,
    "epoch": EPOCH,
    "samples": SAMPLES,
    "skipped_steps": ("skipped_steps",),
    "train_loss": TRAIN_LOSS,
    "val_loss": VAL_LOSS,
}
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


def training(file: TorchFile | None, root: fields.Mapping, step_keys: tuple[str, ...] = STEP) -> Training:
    """What a checkpoint's top level says about where training stood. Absent values are None.

    `file` holds `root`, which may be empty where there is none.
    """
    wanted: dict[str, list[tuple[str, ...]]] = {
        name: [(key,) for key in keys] for name, keys in {**NAMES, "step": step_keys}.items()
    }
    wanted["iteration"].append(("meta", "iter"))  # MMEngine
    wanted["epoch"].append(("meta", "epoch"))
    found: dict[str, Any] = {}
    keys: dict[str, tuple[str, ...]] = {}
    for name, paths in wanted.items():
        whole = name in ("step", "iteration", "samples", "skipped_steps")
        for path in paths:
            node = _at(root, path)
            number = plain(file, node) if file is not None and isinstance(node, Object) else node
            value = fields.number(number) if isinstance(number, int | float) else None
            if value is not None:
                if isinstance(value, int) or not whole:
                    found[name], keys[name] = value, path
                break
    scheduler = next((key for key in SCHEDULER if _at(root, (key,))), None)
    if scheduler is not None and file is not None:
        value = decode(file, root.get(scheduler))
        if isinstance(value, dict | list):
            found["scheduler"], keys["scheduler"] = value, (scheduler,)
    return Training(**found, saved_batch=batch_settings(root.get("ds_config")), keys=keys)


def _at(root: fields.Mapping, path: tuple[str, ...]) -> Node:
    node: Node = root
    for key in path:
        pairs = fields.as_mapping(node)
        node = pairs.get(key) if pairs is not None else None
    return node


def batch_settings(config: Node) -> dict[str, int]:
    """The batch triple of a ds_config, as far as it is stated ("auto" is not)."""
    pairs = fields.as_mapping(config)
    if pairs is None:
        return {}
    found = {name: fields.integer(pairs.get(key)) for name, key in BATCH.items()}
    return {name: value for name, value in found.items() if value is not None}
