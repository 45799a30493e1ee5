"""The formats: each reads a path into a Checkpoint and plans the files of one, moving no tensor bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.formats import dcp, hf, torch, zero, zero3
from ckpttools.formats.locate import Source, locate
from ckpttools.formats.zero import target as zero_target
from ckpttools.formats.zero.join import ZeroFolder
from ckpttools.plan import Plan
from ckpttools.stores.links import within

FORMATS: dict[str, Callable[[Path], Checkpoint]] = {
    "zero": zero.read,
    "zero3": zero3.read,
    "pt": torch.read,
    "hf": hf.read,
    "dcp": dcp.read,
}

# what a Checkpoint can be written as; each takes the Checkpoint and a Layout
PLANS: dict[str, Callable[[Checkpoint, Layout], Plan]] = {
    "pt": torch.plan,
    "zero1": zero.plan,
    "zero2": zero.plan,
    "dcp": dcp.plan,
    "hf": hf.plan,
}

__all__ = ["FORMATS", "PLANS", "Source", "locate", "open_checkpoint", "read", "refuse_rank_local"]


def read(source: Source) -> Checkpoint:
    """Read what `locate` found: headers only."""
    with within(source.root):
        if source.key is not None:
            return torch.read(source.target, source.key)
        return FORMATS[source.format](source.target)


def refuse_rank_local(checkpoint: Checkpoint) -> None:
    """Raise Unsupported where optimizer state belongs to single ranks: no other format has a place for it."""
    if isinstance(checkpoint.template, ZeroFolder):
        zero_target.refuse_rank_local(checkpoint.template)


def open_checkpoint(path: Path, tag: str | None = None) -> Checkpoint:
    """Read the one checkpoint that a path means: headers only. Raises CkptError."""
    return read(locate(path, tag))
