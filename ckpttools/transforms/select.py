"""Weights only: which tensors leave a checkpoint, under which names, from which copy, in which dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from ckpttools.checkpoint import Checkpoint, Weights
from ckpttools.errors import UsageError, escape
from ckpttools.tensors import BFLOAT16, DTYPES, FLOAT16, FLOAT32, DType, TensorRef

DTYPE_NAMES = {d.short: d for d in DTYPES.values() if d.is_float} | {
    d.name: d for d in DTYPES.values() if d.is_float
}


def weights(
    checkpoint: Checkpoint,
    *,
    source: str | None = None,
    dtype: DType | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    exclude_frozen: bool = False,
    strip_prefix: str = "",
) -> Weights:
    """The model's weights and buffers.

    `source` is "master" for the fp32 master weights (the default where there are any) or "model" for the
    weights as trained with. Master weights come out as fp32 unless `dtype` says otherwise, and so do frozen
    parameters and buffers of 16 bits, which have no master. `dtype` casts every floating point tensor.
    `include` and `exclude` are shell patterns on names as they are in the checkpoint.

    Raises UsageError where nothing is left, master weights are asked for and there are none, or two names
    become one.
    """
    master = checkpoint.master
    if source == "master" and not master:
        raise UsageError(
            "no-master",
            "the checkpoint has no fp32 master weights",
            where=checkpoint.path,
            hint="leave out --source, or use --source model",
        )
    use_master = bool(master) and source != "model"
    chosen = _chosen(checkpoint, use_master)
    frozen = checkpoint.frozen if exclude_frozen else frozenset()
    names = [n for n in chosen if _wanted(n, tuple(include), tuple(exclude)) and n not in frozen]
    if not names:
        raise UsageError(
            "nothing-selected",
            f"none of the {len(chosen)} tensors is selected",
            where=checkpoint.path,
            hint="ckpt inspect --tensors lists the names; quote the patterns: --include '*.weight'",
        )
    renamed = {name: name.removeprefix(strip_prefix) for name in names}
    if len(set(renamed.values())) != len(names) or "" in renamed.values():
        raise UsageError("names-collide", f"without '{escape(strip_prefix)}' two names become one or none")
    tensors = {renamed[name]: chosen[name] for name in names}
    targets = {name: _target(ref.dtype, dtype, use_master) for name, ref in tensors.items()}
    shared = {
        renamed[alias]: renamed[owner]
        for alias, owner in checkpoint.shared.items()
        if alias in renamed and owner in renamed
    }
    return Weights(
        tensors=tensors,
        dtypes=targets,
        shared=shared,
        about=_about(checkpoint),
        checks=checkpoint.checks,
        stem=checkpoint.layout.stem,
        notes=tuple(_notes(checkpoint, chosen, names, use_master)),
    )


def _about(checkpoint: Checkpoint) -> dict[str, str]:
    """Where the weights come from, as strings: what a safetensors header can hold."""
    state = checkpoint.train_state
    known = {
        "step": state.step,
        "epoch": state.epoch,
        "train_loss": state.train_loss,
        "val_loss": state.val_loss,
    }
    return {name: str(value) for name, value in known.items() if value is not None}


def _chosen(checkpoint: Checkpoint, use_master: bool) -> dict[str, TensorRef]:
    """Every name of the model in the model's order, with the copy that is wanted."""
    if not use_master:
        return dict(checkpoint.tensors)
    master = checkpoint.master
    out: dict[str, TensorRef] = {}
    for name, ref in checkpoint.tensors.items():
        owner = checkpoint.shared.get(name, name)
        out[name] = master.get(name, master.get(owner, ref))
    return out | {name: ref for name, ref in master.items() if name not in out}


def _wanted(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    inside = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return inside and not any(fnmatchcase(name, pattern) for pattern in exclude)


def _target(have: DType, asked: DType | None, use_master: bool) -> DType:
    if not have.is_float or have.itemsize == 1:  # float8 values need their scales: never cast
        return have
    if asked is not None:
        return asked
    return FLOAT32 if use_master and have in (BFLOAT16, FLOAT16) else have


def _notes(
    checkpoint: Checkpoint, chosen: Mapping[str, TensorRef], names: list[str], use_master: bool
) -> Iterable[str]:
    if use_master:
        without = [
            name
            for name in names
            if name not in checkpoint.master
            and checkpoint.shared.get(name) not in checkpoint.master
            and chosen[name].dtype.is_float
        ]
        if without:
            yield (
                f"{len(without)} tensors have no master weights (frozen parameters and buffers): "
                f"taken as trained with, the first {escape(without[0])}"
            )
    if len(names) < len(chosen):
        yield f"{len(chosen) - len(names)} of {len(chosen)} tensors are left out, as asked for"
    if checkpoint.groups:
        yield "not carried: optimizer state, scheduler and counters (weights only)"
