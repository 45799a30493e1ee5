"""The digits that scikit-learn ships, 1,797 images of 8 x 8 pixels: a task whose accuracy means something."""

from __future__ import annotations

import hashlib
from typing import Any

from msgspec import Struct

from ckpttools.errors import UsageError
from ckpttools.trainer.config import Data

CLASSES, SIDE = 10, 8


class Digits(Struct, frozen=True, kw_only=True):
    """`images` is (n, 8, 8) of fp32 in 0..1, `labels` (n,) of int64; the rest as text.Samples has it."""

    images: Any
    labels: Any
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    sha256: str


def read(data: Data, global_batch_size: int) -> Digits:
    """Hold out images at even distances. Raises UsageError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "train-requires",
            "the digits come with scikit-learn, which is not installed",
            where="data.source",
            hint="pip install scikit-learn",
        ) from None
    found = load_digits()
    count, held = len(found.target), data.validation_samples
    if count - held < global_batch_size:
        raise UsageError(
            "train-data",
            f"there are {count} images; {held} are held out and one update needs {global_batch_size}",
            where=data.source,
            why="an epoch would hold no update",
            hint="lower data.validation_samples or batch.global_batch_size",
        )
    images, labels = (found.images / 16).astype("float32"), found.target.astype("int64")
    held_out = {i * count // held for i in range(held)}
    digest = hashlib.sha256(f"digits {held} ".encode())
    digest.update(images.tobytes() + labels.tobytes())
    return Digits(
        images=images,
        labels=labels,
        train=tuple(i for i in range(count) if i not in held_out),
        held_out=tuple(sorted(held_out)),
        sha256=digest.hexdigest(),
    )
