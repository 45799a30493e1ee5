"""Where a launch writes and what it continues from; reads folders and file names, changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpttools.errors import UsageError
from ckpttools.trainer import folders
from ckpttools.trainer.config import Config
from ckpttools.trainer.options import Options


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
            _loadable(checkpoint, config, world)
            return Start(run=fresh, checkpoint=checkpoint, notes=(f"Resumed from {checkpoint}",))
        _unused(fresh)
        note = f"Weights loaded from {checkpoint}; optimizer, schedule and counters start anew"
        return Start(run=fresh, checkpoint=checkpoint, weights_only=True, notes=(note,))
    if options.resume:
        searched = options.work_dir or Path(config.work_dirs) / config.experiment
        found = _search(searched, whole_experiment=options.work_dir is None)
        if found is None:
            note = f"No checkpoint found under {searched}: starting from step 0"
            return Start(run=fresh, notes=(note,))
        _loadable(found, config, world)
        note = f"Auto resumed from the latest checkpoint {found}"
        return Start(run=found.parent, checkpoint=found, notes=(note,))
    _unused(fresh)
    return Start(run=fresh)


def _search(folder: Path, whole_experiment: bool) -> Path | None:
    if not whole_experiment:
        return folders.newest(folder)
    runs = sorted((p for p in folder.glob("*") if p.is_dir()), key=lambda p: p.name, reverse=True)
    return next((found for run in runs if (found := folders.newest(run))), None)


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
