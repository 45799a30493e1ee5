"""The files of a verl folder, by name."""

from __future__ import annotations

import re

from ckpttools.formats.format import Folder

NAME = re.compile(
    r"(?P<kind>model|optim|extra_state)_world_size_(?P<ranks>\d{1,6})_rank_(?P<rank>\d{1,6})\.pt"
)
CONFIG = "fsdp_config.json"  # of rank 0: FSDP's version and the number of ranks


def holds(folder: Folder) -> bool:
    """Whether the folder directly holds a model file of verl."""
    return any((found := NAME.fullmatch(name)) and found["kind"] == "model" for name in folder.names)
