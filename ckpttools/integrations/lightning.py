"""A callback for Lightning's Trainer.

    trainer = Trainer(..., callbacks=[ModelCheckpoint(...), VerifySaves(Rules(keep_last=3))])
    trainer.fit(model, ckpt_path=VerifySaves.resume_from(folder))

A damaged `ckpt_path` is refused before the first update: no earlier hook knows the path. Saves are noticed
at the hook after the one in which a ModelCheckpoint wrote: Lightning calls these last, and has no hook after
a save.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from ckpttools.integrations.guard import Guard, Rules, newest_good, refuse_damaged
from ckpttools.integrations.ranks import everywhere
from ckpttools.stores.files import exists, stat


class VerifySaves(pl.Callback):
    """Verifies each save; see guard.py."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.guard = Guard(rules=rules or Rules())
        self._seen: dict[str, int] = {}

    @staticmethod
    def resume_from(folder: str | Path) -> str | None:
        """For `Trainer.fit(ckpt_path=...)`: the newest good one of a folder. Raises CkptError."""
        found = newest_good(Path(folder))
        return None if found is None else str(found)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        path = trainer.ckpt_path
        if path is not None:
            everywhere(lambda: refuse_damaged(Path(path)) if exists(Path(path)) else None)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._look(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer)
        if trainer.is_global_zero:
            self.guard.close()

    def _look(self, trainer: Any) -> None:
        if not trainer.is_global_zero:
            return
        for each in trainer.checkpoint_callbacks:
            # with save_last the last that it saved is last.ckpt alone
            names = ("_last_checkpoint_saved", "best_model_path", "last_model_path")
            for path in dict.fromkeys(getattr(each, name, "") for name in names):
                if not path or not exists(Path(path)):
                    continue
                time = stat(Path(path)).mtime_ns
                if self._seen.get(path) != time:
                    self._seen[path] = time
                    self.guard.saved(Path(path))
