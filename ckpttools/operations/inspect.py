"""What a checkpoint is: header reads only."""

from __future__ import annotations

from pathlib import Path

from ckpttools.operations.opened import Opened
from ckpttools.operations.opened import open as open_checkpoint


def inspect(path: str | Path, *, tag: str | None = None) -> Opened:
    """What a checkpoint holds, by its headers: `checkpoint` describes it, `source` says why this one.

    >>> inspect("fixtures/hf-trainer/plain/checkpoint-2").checkpoint.training.step
    2
    """
    return open_checkpoint(path, tag)
