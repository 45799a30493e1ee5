"""Saving: staged, flushed, verified, and only then named; then the best model, and what may go.

    1. every rank writes into .NAME.ckpt-tmp-train, which no reader takes for a checkpoint
    2. each node flushes the files to its disk
    3. rank 0 adds what the layout has besides, verifies, and renames
    4. `latest` and `last_checkpoint` name it
    5. the rules of `ckpt prune` say which of those that lie there, named as these, are not needed any more

A run that is killed in between, or whose disk is full, has the checkpoints that it had before. What such a
save leaves is removed when the run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from msgspec import Struct

from ckpttools import checks, runs
from ckpttools.checkpoint import Layout
from ckpttools.checks import check_before_use
from ckpttools.errors import CkptError
from ckpttools.execute.system import RENAME_EXCHANGE, fsync_file, fsync_folder, renameat2
from ckpttools.findings import errors
from ckpttools.formats import PLANS, locate, read
from ckpttools.operations.extract import extract
from ckpttools.operations.prune import carry_out as carry_out_pruning
from ckpttools.operations.prune import plan_of
from ckpttools.operations.replacing import refuse_pinned
from ckpttools.operations.source import find
from ckpttools.operations.writing import Writing, carry_out
from ckpttools.runs.retain import Policy
from ckpttools.siblings import STAGING
from ckpttools.trainer import folders
from ckpttools.trainer.config import Batch
from ckpttools.trainer.engine import Engine, from_rank0, together
from ckpttools.trainer.options import Verify
from ckpttools.trainer.split import split
from ckpttools.transforms.select import weights_only


class Saving(Struct, frozen=True, kw_only=True):
    """How one run saves. `limit` checkpoints of each kind stay; None: all."""

    run: Path
    layout: str
    zero: bool
    verify: Verify
    limit: int | None
    say: Callable[[str], None]

    @property
    def place(self) -> Path:
        return folders.place(self.run, self.layout)

    def save(self, engine: Engine, name: str, state: dict[str, Any]) -> Path:
        """A checkpoint under its name, on every rank. Raises CkptError or OSError, the old ones untouched."""
        staged = self.stage(engine, name, state)
        target = self.place / name
        from_rank0(lambda: self._appear(staged, target))
        return target

    def stage(self, engine: Engine, name: str, state: dict[str, Any]) -> Path:
        """The same without its name: whole, flushed and verified, for rank 0 to rename or remove."""
        staged = self.place / f".{name}{STAGING}train"
        tag = staged
        if self.layout == "bundle":
            tag = staged / folders.BUNDLE / f"global_step{state['global_step']}"
        from_rank0(lambda: _clear(staged, tag.parent))
        engine.write(tag, state)
        together()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _flush(staged)
        together()
        from_rank0(lambda: self._complete(staged, tag, state))
        return staged

    def _complete(self, staged: Path, tag: Path, state: dict[str, Any]) -> None:
        if self.layout == "bundle":
            folders.write_text(tag.parent / "latest", tag.name)
            folders.write_text(staged / "training_info.json", json.dumps(_info(state), indent=2) + "\n")
            extract(tag, staged / "hf_model", hf_config=self.run / folders.HF_CONFIG)
        if self.verify == "off":
            return
        bad = errors(checks.verify(staged, quick=self.verify == "quick").findings)
        if bad:
            raise CkptError(
                "save-damaged",
                f"what was just saved is damaged: {bad[0].message} [{bad[0].id}]",
                where=staged / bad[0].file,
                why="the checkpoint was not given its name; the ones before it are as they were",
                hint="look for a full or failing disk, then go on with --resume",
            )

    def _appear(self, staged: Path, target: Path) -> None:
        if os.path.lexists(target):
            refuse_pinned(target)
            # saved again by a run that went on from further back: at no moment is there none
            if not renameat2(staged, target, RENAME_EXCHANGE):
                _remove(target)
                staged.rename(target)
            _remove(staged)
        else:
            staged.rename(target)
        fsync_folder(self.place)
        if self.zero and self.layout != "bundle":
            folders.write_text(self.place / "latest", target.name)
        folders.write_text(self.place / folders.POINTER, target.name)

    def best(self, checkpoint: Path) -> None:
        """The weights of a checkpoint and where it was, as best_model.pt, in place of an older; on rank 0."""
        found = weights_only(check_before_use(find(checkpoint)), None)
        plan = PLANS["pt"](found, Layout(format="pt"))
        carry_out(checkpoint, self.place / folders.BEST, plan, Writing(force=True), label="best")

    def known_best(self, checkpoint: Path, loss: float | None, best: float | None) -> float | None:
        """The loss that a later one must be less than, on rank 0: what best_model.pt here says, not what the
        checkpoint that is gone on from does. A run that was ended between the two has a best_model.pt that is
        older, a new run folder none: it is written where this checkpoint is the best itself.
        """
        path = self.place / folders.BEST
        stated = read(locate(path)).training.val_loss if path.exists() else None
        if best == stated:
            return best
        if loss is not None and loss == best and (stated is None or loss < stated):
            self.best(checkpoint)
            self.say(f"best so far: {path}, written from {checkpoint}")
            return best
        says = "is not there" if stated is None else f"has {stated:.6g}"
        was = "none" if best is None else f"{best:.6g}"
        self.say(f"{path} {says}, the best of the checkpoint was {was}: the former counts")
        return stated

    def drop(self, staged: Path) -> None:
        """Remove a staged checkpoint; on rank 0."""
        _remove(staged)

    def retain(self) -> None:
        """Remove what the limit leaves out; on rank 0. What cannot be removed does not stop a run."""
        if self.limit is None:
            return
        try:
            own = [e for e in runs.own(self.place) if folders.is_ours(e.path.name, self.layout)]
            plan = plan_of(self.place, Policy(last=self.limit, per_kind=True), found=[own])
            carry_out_pruning(plan)
        except CkptError as error:
            self.say(f"careful: nothing was removed: {error.message} [{error.id}]")
            return
        for entry in plan.removed:
            self.say(f"removed {entry.path}, older than the last {self.limit} of its kind")


def clean(place: Path) -> None:
    """Remove what saves left that were interrupted."""
    for path in place.glob(f".*{STAGING}train"):
        _remove(path)


def _clear(staged: Path, parent: Path) -> None:
    _remove(staged)
    parent.mkdir(parents=True, exist_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return
    with suppress(FileNotFoundError):
        path.unlink()


def _flush(path: Path) -> None:
    if not path.is_dir():
        fsync_file(path)
        return
    for place, _, files in os.walk(path):
        for name in files:
            fsync_file(Path(place) / name)
        fsync_folder(Path(place))


def _info(state: dict[str, Any]) -> dict[str, Any]:
    """training_info.json, with the keys that guides give it."""
    parts = split(Batch(**state["config"]["batch"]), dist.get_world_size())  # what the settings leave open
    return {
        "global_step": state["global_step"],
        "epoch": state["epoch"],
        "batch_size": parts.micro,
        "gradient_accumulation_steps": parts.accumulation,
        "world_size": dist.get_world_size(),
        "learning_rate": state["learning_rate"],
        "train_loss": state["train_loss"],
        "val_loss": state["val_loss"],
    }
