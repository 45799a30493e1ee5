"""A callback for the Trainer of transformers.

    saves = VerifySaves(Rules(keep_last=3))
    trainer = Trainer(..., callbacks=[saves])
    trainer.train(resume_from_checkpoint=saves.resume_from(args.output_dir))

The last line starts anew where there is nothing, takes the newest good checkpoint, and raises where all are
damaged; given a checkpoint itself it takes that one or raises. A damaged one that is named in another way is
refused before the first update where it lies in `output_dir`, or TrainingArguments names it. One that lies
elsewhere is not known to a callback: the log says that nobody looked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState

from ckpttools.integrations.guard import Guard, Rules, log, newest_good, refuse_damaged
from ckpttools.integrations.ranks import everywhere
from ckpttools.stores.files import exists


class VerifySaves(transformers.TrainerCallback):  # type: ignore[misc]  # untyped base
    """Verifies each save; see guard.py."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.guard = Guard(rules=rules or Rules())
        self._taken: Path | None = None

    def resume_from(self, output_dir: str | Path) -> str | None:
        """For `Trainer.train(resume_from_checkpoint=...)`. Raises CkptError."""
        found = self._taken = newest_good(Path(output_dir))
        return None if found is None else str(found)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = getattr(args, "resume_from_checkpoint", None)
        checkpoint = Path(named) if named else Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step > 0:
            everywhere(lambda: self._look(checkpoint))

    def _look(self, checkpoint: Path) -> None:
        if self._taken is not None and self._taken.name == checkpoint.name:
            return  # every byte of it was read, wherever it lies
        if exists(checkpoint):
            refuse_damaged(checkpoint)
        else:
            log.warning("not verified: what was resumed from is not %s; name it by resume_from", checkpoint)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            PartialState().wait_for_everyone()  # each rank writes its own random state
        if state.is_world_process_zero:
            self.guard.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard.close()
