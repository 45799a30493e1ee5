"""Weights that the model has and the source has not: whoever loads the result must be told."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import escape

SHOWN = 12


def left_out(checkpoint: Checkpoint) -> Iterator[str]:
    """The note of a plan, whatever its format."""
    then = "load them into the model first, and then this, not strictly"
    if checkpoint.left_out:
        names = ", ".join(escape(name) for name in islice(checkpoint.left_out, SHOWN))
        more = ", ..." if len(checkpoint.left_out) > SHOWN else ""
        yield f"{len(checkpoint.left_out)} weights of the model are not in the source ({names}{more}): {then}"
    elif checkpoint.excludes_frozen:
        yield f"frozen weights are not in the source, nor their names (exclude_frozen_parameters): {then}"
