"""A hook for MMEngine's Runner.

    custom_imports = dict(imports=["ckpttools.integrations.mmengine"])
    custom_hooks = [dict(type="VerifySavesHook", keep_last=3)]

It comes after the CheckpointHook and looks at `last_checkpoint`. With `resume=True` a damaged checkpoint is
refused before it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import find_latest_checkpoint

from ckpttools.errors import CkptError
from ckpttools.integrations.guard import Guard, Rules, refuse_damaged
from ckpttools.integrations.ranks import everywhere
from ckpttools.stores.files import exists, small_text

POINTER = "last_checkpoint"


@HOOKS.register_module()
class VerifySavesHook(Hook):  # type: ignore[misc]  # untyped base
    """Verifies each save; the arguments are those of guard.Rules."""

    priority = "LOWEST"

    def __init__(self, **rules: Any) -> None:
        self.guard = Guard(rules=Rules(**rules))
        self._seen: str | None = None

    def before_run(self, runner: Any) -> None:
        """Before MMEngine loads anything."""

        def look() -> None:
            named = runner._load_from
            if runner._resume and named is None:
                named = find_latest_checkpoint(runner.work_dir)
            if named is not None and exists(Path(named)):
                refuse_damaged(Path(named))

        everywhere(look)
        self._seen = _named(runner)

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        self._look(runner)

    def after_train_epoch(self, runner: Any) -> None:
        self._look(runner)

    def after_run(self, runner: Any) -> None:
        if is_main_process():
            self._look(runner)
            self.guard.close()

    def _look(self, runner: Any) -> None:
        if not is_main_process():
            return
        named = _named(runner)
        if named is not None and named != self._seen and exists(Path(named)):
            self._seen = named
            self.guard.saved(Path(named))


def _named(runner: Any) -> str | None:
    try:
        return small_text(Path(runner.work_dir) / POINTER, 4096).strip()
    except (OSError, CkptError):
        return None
