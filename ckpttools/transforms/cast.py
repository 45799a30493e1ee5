"""Another dtype for the weights of a checkpoint."""

from __future__ import annotations

from math import inf

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, common_dtype
from ckpttools.errors import UsageError, escape
from ckpttools.tensors import DTYPES, DType, TensorRef

# what --dtype takes, in torch's words and in short; float8_e8m0fnu, powers of two, is for scales
_TARGETS = [d for d in DTYPES.values() if d.is_float and d.name != "float8_e8m0fnu"]
DTYPE_NAMES = {d.short: d for d in _TARGETS} | {d.name: d for d in _TARGETS}


# the largest finite value; that of bfloat16 counts as float32's
LARGEST = {
    "float32": 3.4e38,
    "bfloat16": 3.4e38,
    "float16": 65504.0,
    "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
    "float8_e4m3fnuz": 240.0,
    "float8_e5m2fnuz": 57344.0,
}


def dtype_named(name: str | None) -> DType | None:
    """What --dtype asks for. Raises UsageError."""
    if name is not None and name not in DTYPE_NAMES:
        raise UsageError(
            "bad-usage",
            f"'{escape(name)}' is not a dtype",
            where="--dtype",
            why="the elements of weights are cast to one of these",
            hint=f"choose from {', '.join(DTYPE_NAMES)}",
        )
    return DTYPE_NAMES[name] if name is not None else None


def castable(dtype: DType) -> bool:
    """Whether the values stand for themselves: those of float8 need scales that are kept elsewhere."""
    return dtype.is_float and dtype.itemsize > 1


def cast(checkpoint: Checkpoint, dtype: DType) -> Checkpoint:
    """The checkpoint with all floating point weights and buffers in `dtype`, rounded once: from the fp32
    master where there is one. float8 stays as it is. The optimizer's state, masters included, keeps the
    precision that the optimizer works in.
    """
    best = checkpoint.best_copies()
    kept = sum(ref.dtype.is_float and not castable(ref.dtype) for ref in checkpoint.tensors.values())
    tensors = {
        name: best[name].cast(dtype) if castable(ref.dtype) and ref.dtype is not dtype else ref
        for name, ref in checkpoint.tensors.items()
    }
    notes = [f"{kept} float8 tensors stay as they are: their values need scales that are kept apart"]
    notes = notes if kept else []
    narrowed = [n for n, ref in tensors.items() if ref is not checkpoint.tensors[n] and wider(best[n], dtype)]
    if narrowed:
        notes.append(
            f"{len(narrowed)} tensors become {dtype.short}: {_beyond(dtype)}; the first {escape(narrowed[0])}"
        )
    return replace(
        checkpoint,
        tensors=tensors,
        layout=replace(checkpoint.layout, dtype=common_dtype(tensors)),
        notes=(*checkpoint.notes, *notes),
    )


def wider(ref: TensorRef, dtype: DType) -> bool:
    """Whether a tensor may hold values that are beyond the largest of `dtype`."""
    return LARGEST.get(ref.dtype.name, inf) > LARGEST.get(dtype.name, inf)


def _beyond(dtype: DType) -> str:
    most = f"{LARGEST[dtype.name]:g}"
    if castable(dtype):
        return f"values beyond {most} become infinite"
    return f"no scales are written, and values beyond {most} do not stay as they are"
