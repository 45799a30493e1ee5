"""Saving and loading in a plain DeepSpeed loop.

    saves = Saves("run", Rules(keep_last=3))
    state = saves.load(engine)                     # the newest good one, None where there is none
    for step, batch in enumerate(...):
        ...
        if step % 100 == 0:
            saves.save(engine, f"global_step{step}", {"step": step})
    saves.close()

Every rank calls them, as DeepSpeed's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed import comm

from ckpttools.errors import CkptError
from ckpttools.integrations.guard import Guard, Rules, newest_good
from ckpttools.integrations.ranks import everywhere


class Saves:
    """The checkpoints of one run's folder; see guard.py."""

    def __init__(self, folder: str | Path, rules: Rules | None = None) -> None:
        self.folder = Path(folder)
        self.guard = Guard(rules=rules or Rules())

    def save(self, engine: Any, tag: str, client_state: Mapping[str, Any] | None = None) -> None:
        """`engine.save_checkpoint`, verified. Raises CkptError on every rank where the rules say so."""
        engine.save_checkpoint(str(self.folder), tag=tag, client_state=dict(client_state or {}))
        comm.barrier()
        everywhere(lambda: self.guard.saved(self.folder / tag))

    def load(self, engine: Any) -> Mapping[str, Any] | None:
        """Load the newest good one; returns its client state. Raises CkptError where all are damaged."""
        found = everywhere(lambda: newest_good(self.folder))
        if found is None:
            return None
        # the save folder itself where it holds a single tag
        folder, tag = (found, None) if found == self.folder else (found.parent, found.name)
        path, state = engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise CkptError(
                "resume-failed",
                "DeepSpeed found nothing to load",
                where=found,
                why="training would begin anew",
            )
        loaded: Mapping[str, Any] = state
        return loaded

    def close(self) -> None:
        """Wait until all is read."""
        everywhere(self.guard.close)
