"""Where a launch writes and what it continues from; reads checkpoints, changes nothing.

The launcher decides before any rank starts and hands the decision over in a file: every byte is checked
once. Where torchrun started the ranks by itself, rank 0 decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from ckpttools import runs
from ckpttools.errors import UsageError, counted
from ckpttools.formats import locate
from ckpttools.stores.files import local
from ckpttools.trainer import folders, search
from ckpttools.trainer.compared import warnings
from ckpttools.trainer.config import Config, is_name
from ckpttools.trainer.options import Options

DECISION = "start.json"


Mode = Literal["resume", "reset", "weights", "evaluate"]


class Start(Struct, frozen=True, kw_only=True):
    """The decision, and the sentences that explain it.

    `mode` is what is taken of `checkpoint`: all of it; weights and position ("reset"); weights alone; or it
    is evaluated and nothing is trained, with all of `others`.
    """

    run: Path
    checkpoint: Path | None = None
    mode: Mode = "resume"
    notes: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()


def decide(config: Config, options: Options, world: int) -> Start:
    """Choose the run folder and the checkpoint. Raises CkptError where it could not be loaded.

    `--resume` alone continues in the folder of the checkpoint that it finds, and so does a launch of an
    experiment whose tag is there already. `--resume-from` starts a new run folder, so that the old one keeps
    its history, unless `--work-dir` names one.
    """
    _check(config, options)
    if options.evaluate is not None:
        return _evaluated(options.evaluate)
    own = folders.experiment(config)
    fresh = options.work_dir or (
        own / (options.extra_tag or "default")
        if config.save.layout == "experiment"
        else folders.new_run(own.parent, own.name)
    )
    if options.resume_from is not None:
        if options.resume:
            checkpoint = _named(options.resume_from)
            start = Start(run=fresh, checkpoint=checkpoint, notes=(f"Resumed from {checkpoint}",))
            return _continued(start, checkpoint, config, options, world)
        _unused(fresh)
        checkpoint = _any(options.resume_from)
        search.check(checkpoint, weights_only=True)
        note = f"Weights loaded from {checkpoint}; optimizer, schedule and counters start anew"
        return Start(run=fresh, checkpoint=checkpoint, mode="weights", notes=(note,))
    same_tag = config.save.layout == "experiment" and folders.held(fresh) > 0
    if options.resume or same_tag:
        searched = options.work_dir or (fresh if config.save.layout == "experiment" else own)
        found = search.search(searched)
        if found.path is None:
            return Start(run=fresh, notes=found.notes)
        start = Start(run=folders.run_of(found.path), checkpoint=found.path, notes=found.notes)
        return _continued(start, found.path, config, options, world)
    _unused(fresh)
    return Start(run=fresh)


def _check(config: Config, options: Options) -> None:
    resumes = options.resume or config.save.layout == "experiment"
    wrong = ""
    if options.reset_optimizer and not resumes:
        wrong = "--reset-optimizer is for --resume: without it no optimizer state is loaded anyway"
    if options.extra_tag is not None and config.save.layout != "experiment":
        wrong = "--extra-tag is for save.layout: experiment"
    if options.extra_tag is not None and (not options.extra_tag or not is_name(options.extra_tag)):
        wrong = f"--extra-tag {options.extra_tag!r} is no folder name"
    if options.evaluate is not None and (options.resume or options.resume_from):
        wrong = "--evaluate trains nothing: leave out --resume and --resume-from"
    if wrong:
        raise UsageError(
            "bad-usage",
            wrong,
            where="ckpt train",
            why="as they stand, the options and the configuration cannot all be followed",
            hint="ckpt train --help",
        )


def _evaluated(path: Path) -> Start:
    """One checkpoint, or all of a run, newest first: also of one whose `latest` names a single one."""
    found: tuple[Path, ...] = (path,)
    notes: list[str] = []
    if path.is_dir():
        entries = runs.find(path)
        found = tuple(local(entry.path) for entry in entries if entry.problem is None)
        found = found or (local(locate(path).root),)  # which says what is wrong with it
        notes = [f"Passed over {e.path}: {e.problem.message}" for e in entries if e.problem is not None]
    for each in found:
        search.check(each, weights_only=True)
    place = path if path.is_dir() else path.parent
    return Start(run=place, checkpoint=found[0], mode="evaluate", notes=tuple(notes), others=found[1:])


def hand_over(start: Start, folder: Path) -> None:
    """Leave a decision for the ranks."""
    fields: dict[str, Any] = {"run": str(start.run), "mode": start.mode, "notes": start.notes}
    fields["checkpoint"] = None if start.checkpoint is None else str(start.checkpoint)
    fields["others"] = list(map(str, start.others))
    (folder / DECISION).write_text(json.dumps(fields), "utf-8")


def handed_over(folder: Path) -> Start:
    """The decision that the launcher left."""
    fields = json.loads((folder / DECISION).read_text("utf-8"))
    checkpoint = fields["checkpoint"]
    return Start(
        run=Path(fields["run"]),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        mode=fields["mode"],
        notes=tuple(fields["notes"]),
        others=tuple(map(Path, fields["others"])),
    )


def _continued(start: Start, checkpoint: Path, config: Config, options: Options, world: int) -> Start:
    """With what is different from the run that saved. Raises CkptError where it could not be loaded."""
    if not options.reset_optimizer:
        _loadable(checkpoint, config, world)
    if options.resume_from is not None:
        search.check(checkpoint, weights_only=options.reset_optimizer)
    if options.reset_optimizer:
        note = "optimizer and schedule start anew; weights and position are the checkpoint's"
        return replace(start, mode="reset", notes=(*start.notes, note))
    _same_stage(checkpoint, config, world)
    said = warnings(folders.inner(checkpoint), config, options.config, world)
    return replace(start, notes=(*start.notes, *said))


def _named(path: Path) -> Path:
    """What somebody named to continue from. Raises UsageError where it is none of this trainer's."""
    if path.is_dir() and (path / folders.BUNDLE).is_dir():
        return path
    if not path.exists():
        locate(path)  # says what is wrong with it
    return path if path.is_file() else folders.resolve(path)


def _any(path: Path) -> Path:
    """A checkpoint of any format whose weights can be read. Raises CkptError where there is none."""
    tag = folders.tag_of(path)
    return tag if tag is not None else local(locate(path).root)


def _loadable(checkpoint: Path, config: Config, world: int) -> None:
    stage = config.zero.stage
    if checkpoint.is_file() or stage == 0:
        if checkpoint.is_file() and stage == 0:
            return
        kind = f"zero{stage} --world-size {world}" if stage else "pt"
        raise UsageError(
            "zero-stage",
            f"saved {'in a single file' if checkpoint.is_file() else 'by DeepSpeed'}, this run uses"
            f" zero.stage {stage}",
            where=checkpoint,
            why="neither loads the files of the other",
            hint=f"ckpt convert {checkpoint} DST --to {kind}",
        )
    tag = folders.inner(checkpoint)
    saved, by_bf16 = folders.shards(tag)
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
            f"saved by {counted(saved, 'rank')}, this run has {world}",
            where=checkpoint,
            why="DeepSpeed loads ZeRO optimizer states only on the number of ranks that saved them",
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


def _same_stage(checkpoint: Path, config: Config, world: int) -> None:
    was, stage = folders.stage(checkpoint), config.zero.stage
    if was is not None and (was == 3) != (stage == 3):
        raise UsageError(
            "zero-stage",
            f"saved by ZeRO stage {was}, this run uses zero.stage {stage}",
            where=checkpoint,
            why="DeepSpeed names the files of stage 3 otherwise and would not find them",
            hint=f"ckpt convert {checkpoint} DST --to zero{stage} --world-size {world}",
        )


def _unused(run: Path) -> None:
    held = folders.held(run)
    if held:
        raise UsageError(
            "run-exists",
            f"the run folder already holds {counted(held, 'checkpoint')}",
            where=run,
            why="a new run would overwrite them one by one",
            hint="add --resume to continue that run, or choose another --work-dir",
        )
