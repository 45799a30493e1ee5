"""The formats: each reads a path into a Checkpoint and plans the files of one, moving no tensor bytes.

`format` says what a format is, `table` which there are, `locate` asks them whose a path is.
"""

from __future__ import annotations

from ckpttools.checkpoint import Checkpoint
from ckpttools.formats.format import Checked, Folder, Format, Source
from ckpttools.formats.locate import locate
from ckpttools.formats.table import FORMATS, PLANS
from ckpttools.location import Location
from ckpttools.stores.links import within

__all__ = [
    "FORMATS",
    "PLANS",
    "Checked",
    "Folder",
    "Format",
    "Source",
    "locate",
    "open_checkpoint",
    "read",
    "refuse_rank_local",
]


def read(source: Source) -> Checkpoint:
    """Read what `locate` found: headers only."""
    with within(source.root):
        return source.format.read(source)


def refuse_rank_local(checkpoint: Checkpoint) -> None:
    """Raise Unsupported where optimizer state belongs to single ranks: no other format has a place for it."""
    for format in FORMATS:
        format.refuse_rank_local(checkpoint)


def open_checkpoint(path: Location, tag: str | None = None) -> Checkpoint:
    """Read the one checkpoint that a path means: headers only. Raises CkptError."""
    return read(locate(path, tag))
