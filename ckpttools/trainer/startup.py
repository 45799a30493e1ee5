"""Where a launch writes and what it continues from; reads checkpoints, changes nothing.

The launcher decides before any rank starts and hands the decision over in a file: every byte is checked
once. Where torchrun started the ranks by itself, rank 0 decides.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from ckpttools.errors import UsageError
from ckpttools.trainer import folders, search
from ckpttools.trainer.compared import warnings
from ckpttools.trainer.config import Config
from ckpttools.trainer.options import Options

DECISION = "start.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The decision, and the sentences that explain it."""

    run: Path
    checkpoint: Path | None = None
    weights_only: bool = False
    notes: tuple[str, ...] = ()


def decide(config: Config, options: Options, world: int) -> Start:
    """Choose the run folder and the checkpoint. Raises CkptError where it could not be loaded.

    `--resume` alone continues in the folder of the checkpoint that it finds. `--resume-from` starts a
    new run folder, so that the old one keeps its history, unless `--work-dir` names one.
    """
    fresh = options.work_dir or folders.new_run(Path(config.work_dirs), config.experiment)
    if options.resume_from is not None:
        checkpoint = folders.resolve(options.resume_from)
        if options.resume:
            start = Start(run=fresh, checkpoint=checkpoint, notes=(f"Resumed from {checkpoint}",))
            return _continued(start, checkpoint, config, options, world)
        _unused(fresh)
        search.check(checkpoint, weights_only=True)
        note = f"Weights loaded from {checkpoint}; optimizer, schedule and counters start anew"
        return Start(run=fresh, checkpoint=checkpoint, weights_only=True, notes=(note,))
    if options.resume:
        searched = options.work_dir or Path(config.work_dirs) / config.experiment
        found = search.search(searched)
        if found.path is None:
            return Start(run=fresh, notes=found.notes)
        start = Start(run=found.path.parent, checkpoint=found.path, notes=found.notes)
        return _continued(start, found.path, config, options, world)
    _unused(fresh)
    return Start(run=fresh)


def hand_over(start: Start, folder: Path) -> None:
    """Leave a decision for the ranks."""
    fields = {"run": str(start.run), "weights_only": start.weights_only, "notes": start.notes}
    fields["checkpoint"] = None if start.checkpoint is None else str(start.checkpoint)
    (folder / DECISION).write_text(json.dumps(fields), "utf-8")


def handed_over(folder: Path) -> Start:
    """The decision that the launcher left."""
    fields = json.loads((folder / DECISION).read_text("utf-8"))
    checkpoint = fields["checkpoint"]
    return Start(
        run=Path(fields["run"]),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        weights_only=fields["weights_only"],
        notes=tuple(fields["notes"]),
    )


def _continued(start: Start, checkpoint: Path, config: Config, options: Options, world: int) -> Start:
    """With what is different from the run that saved. Raises CkptError where it could not be loaded."""
    _loadable(checkpoint, config, world)
    if options.resume_from is not None:
        search.check(checkpoint, weights_only=False)
    return replace(start, notes=(*start.notes, *warnings(checkpoint, config, options.config, world)))


def _loadable(checkpoint: Path, config: Config, world: int) -> None:
    saved, by_bf16 = folders.shards(checkpoint)
    if saved == 0:
        raise UsageError(
            "no-optimizer-states",
            "this checkpoint holds weights but no ZeRO optimizer states",
            where=checkpoint,
            why="training cannot continue where it stopped without them",
            hint=f"start from the weights alone: --resume-from {checkpoint} without --resume",
        )
    if saved != world:
        raise UsageError(
            "world-size",
            f"saved by {saved} ranks, this run has {world}",
            where=checkpoint,
            why="DeepSpeed loads ZeRO-1/2 optimizer states only on the number of ranks that saved them",
            hint=f"ckpt reshard {checkpoint} --world-size {world}",
        )
    if by_bf16 != (config.precision == "bf16"):
        kind = "bf16" if by_bf16 else "fp16 or fp32"
        raise UsageError(
            "precision",
            f"saved by {kind} training, this run uses {config.precision}",
            where=checkpoint,
            why="DeepSpeed names the optimizer files after the precision and would not find them",
            hint=f"set precision to {'bf16' if by_bf16 else 'the one it was trained with'},"
            " or start from the weights alone without --resume",
        )


def _unused(run: Path) -> None:
    held = folders.tags(run)
    if held:
        raise UsageError(
            "run-exists",
            f"the run folder already holds {len(held)} checkpoints",
            where=run,
            why="a new run would overwrite them one by one",
            hint="add --resume to continue that run, or choose another --work-dir",
        )
