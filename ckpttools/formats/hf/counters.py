"""The counters and losses that a safetensors header can hold: strings in its `__metadata__`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct

from ckpttools.checkpoint import EXCLUDES_FROZEN
from ckpttools.tensors import TensorRef
from ckpttools.training import Training

KEYS = ("step", "epoch", "train_loss", "val_loss")
WEIGHTS, TORCH_KEYS = "model_state_dict", ("global_step", *KEYS[1:])  # of torch files, as training code saves
FORMAT = "format"  # "pt": which framework's tensors these are
RESERVED = (*KEYS, FORMAT, EXCLUDES_FROZEN)  # what a header says under them is no tied name
_INTEGER = re.compile(r"-?\d{1,18}")


class FreeText(Struct, frozen=True):
    """The keys of a header under which other tools keep what is theirs. It may hold for these very bytes only
    (how they are quantised), so it is named and not carried.
    """

    keys: tuple[str, ...]


def to_metadata(state: Training) -> dict[str, str]:
    """What of the training state has a place in the header, as strings that read back as they were."""
    values = (state.step, state.epoch, state.train_loss, state.val_loss)
    return {key: str(value) for key, value in zip(KEYS, values, strict=True) if value is not None}


def to_values(state: Training) -> dict[str, int | float]:
    """The same for a torch file, under the keys that training code gives them."""
    values = (state.step, state.epoch, state.train_loss, state.val_loss)
    return {key: value for key, value in zip(TORCH_KEYS, values, strict=True) if value is not None}


def from_metadata(metadata: Mapping[str, str]) -> Training:
    """The counters and losses that a header states; None for what is no number."""
    step, epoch, train, val = (_number(metadata.get(key)) for key in KEYS)
    return Training(
        step=step if isinstance(step, int) else None,
        epoch=epoch,
        train_loss=None if train is None else float(train),
        val_loss=None if val is None else float(val),
    )


def integer(text: str | None) -> int | None:
    return int(text) if text is not None and _INTEGER.fullmatch(text) else None


def _number(text: str | None) -> int | float | None:
    if text is None or (whole := integer(text)) is not None:
        return None if text is None else whole
    try:
        return float(text)  # a loss may be NaN or infinite
    except ValueError:
        return None


def aliases(metadata: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> dict[str, str]:
    """Alias -> owner for the names that the header says are tied to a tensor of the files."""
    return {
        alias: owner
        for alias, owner in metadata.items()
        if owner in tensors
        and alias not in tensors
        and alias not in RESERVED
        and ("." in alias or "." not in owner)  # else free text that happens to name a tensor
    }
