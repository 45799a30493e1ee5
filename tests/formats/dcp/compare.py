"""What a distributed checkpoint is read as, held against what the ranks had when they saved it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support import as_torch, identical, tensor_differences

from ckpttools.checkpoint import Checkpoint
from ckpttools.tensors import TensorRef
from ckpttools.tree import same


def unlike(checkpoint: Checkpoint, truth: dict[str, Any], *, groups: bool = True) -> list[str]:
    """Where weights, moments, steps, groups and settings differ; `groups`: whether the files have any."""
    out = tensor_differences(checkpoint.tensors, truth["model"], "weight")
    names = [name for group in checkpoint.groups for name in group.params]
    theirs = truth["optimizer"]["param_groups"]
    if groups and [list(group.params) for group in checkpoint.groups] != [g["params"] for g in theirs]:
        out.append(f"groups {[list(group.params) for group in checkpoint.groups]}")
    if sorted(names) != sorted(name for g in theirs for name in g["params"]):
        out.append(f"parameters {names}")
    for group in checkpoint.groups:
        for name, shape in group.params.items():
            if shape != tuple(truth["model"][name].shape):
                out.append(f"shape of {name}")
            mine = {
                k: v[name] for kinds in (group.state, group.scalars) for k, v in kinds.items() if name in v
            }
            out += _state(name, mine, truth["optimizer"]["state"].get(name, {}))
            (wanted,) = [g for g in theirs if name in g["params"]]
            settings = {key: value for key, value in wanted.items() if key != "params"}
            if not same(dict(sorted(group.hyper.items())), dict(sorted(settings.items()))):
                out.append(f"settings of {name}: {group.hyper}")
    return out


def _state(name: str, mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    if set(mine) != set(theirs):
        yield f"state of {name}: {sorted(mine)}, not {sorted(theirs)}"
        return
    for kind, value in theirs.items():
        if isinstance(value, torch.Tensor):
            if not isinstance(mine[kind], TensorRef) or not identical(as_torch(mine[kind]), value):
                yield f"{kind} of {name}"
        elif not same(mine[kind], value):
            yield f"{kind} of {name}: {mine[kind]}"


@contextmanager
def edited(folder: Path) -> Iterator[Any]:
    """torch's own Metadata of a folder, written back afterwards."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301  of this test's own making
    yield metadata
    path.write_bytes(pickle.dumps(metadata, protocol=4))
