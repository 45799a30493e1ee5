"""Faults of what a single training file holds for a resume, and of files whose data never came."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch.serialization import skip_data

from .core import PT, ZERO, Copy, Expectation, edited, fault, load, names_file, pick

LEVEL = "keys"


def _needed(root: Any, name: str) -> list[tuple[str, ...]]:
    """What the framework that saved a file puts into every training checkpoint, as far as it is there."""
    keys: list[tuple[str, ...]] = []
    if "pytorch-lightning_version" in root:
        keys = [("epoch",), ("global_step",), ("optimizer_states",), ("lr_schedulers",)]
    elif str(root.get("version")).startswith("pcdet+"):
        keys = [("epoch",), ("it",), ("optimizer_state",)]
    elif name.startswith("epoch_") and "_step_" in name:
        keys = [("epoch",), ("global_step",), ("optimizer_state_dict",)]
    return [key for key in keys if key[0] in root]


@fault(LEVEL, PT)
def training_key_lost(copy: Copy, rng: Random) -> Expectation | None:
    root = load(copy.path)
    key = pick(rng, _needed(root, copy.path.name) if isinstance(root, dict) else [])
    if key is None:
        return None
    edited(copy.path, lambda root: root.pop(key[0]))
    return names_file(copy.path, parts=key, warning=True)


@fault(LEVEL, PT, ZERO)
def data_never_filled_in(copy: Copy, rng: Random) -> Expectation | None:
    """Saved under skip_data by a program that died before it wrote the tensors."""
    path = pick(rng, copy.checked)
    if path is None:
        return None
    value = load(path)
    with skip_data():
        torch.save(value, path)
    return names_file(path, parts=["skip_data"], warning=True)
