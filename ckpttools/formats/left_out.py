"""Weights that the model has and the source has not: whoever loads the result must be told."""

from __future__ import annotations

from collections.abc import Iterator

from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import some


def left_out(checkpoint: Checkpoint) -> Iterator[str]:
    """The note of a plan, whatever its format."""
    then = "load them into the model first, and then this, not strictly"
    if checkpoint.left_out:
        names = some(checkpoint.left_out, 12)
        yield f"{len(checkpoint.left_out)} weights of the model are not in the source ({names}): {then}"
    elif checkpoint.excludes_frozen:
        yield f"frozen weights are not in the source, nor their names (exclude_frozen_parameters): {then}"
