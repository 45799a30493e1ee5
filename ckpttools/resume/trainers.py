"""The forecast for containers without a DeepSpeed engine: single files, Trainer folders, accelerate's.

What their frameworks take from the checkpoint and what from the new run's configuration differs; each
framework's own line is in `frameworks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ckpttools import frameworks as training_of
from ckpttools import schedules
from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import jsons
from ckpttools.errors import CkptError, escape
from ckpttools.formats import Source, read
from ckpttools.resume.fit import fit, module
from ckpttools.resume.framework_rules import Rule, rule_of
from ckpttools.resume.model import tensors_of
from ckpttools.resume.new_run import NewRun, real, section, whole
from ckpttools.resume.report import (
    CAREFUL,
    IMPOSSIBLE,
    SAFE,
    About,
    Check,
    Difference,
    Forecast,
    Mismatch,
    Moment,
    Overridden,
    Rates,
    Refusal,
    check,
)
from ckpttools.stores.files import entries
from ckpttools.training import Training

ANEW = "not forecast: the framework computes it from the new settings"


def forecast(path: Path, source: Source, run: NewRun) -> Forecast:
    """What a framework other than DeepSpeed will do, as far as it can be told from files."""
    checkpoint = read(source)
    try:
        training: Training | None = training_of.read(source, checkpoint)
        missing = ""
    except CkptError as error:
        if error.exit_code == 1:
            raise
        training, missing = None, error.message
    if training is not None and not (training.optimizers or training.schedules or training.counters):
        training, missing = None, "the file holds weights and no training state"
    framework = training.framework if training is not None else "weights"
    rule = rule_of(training)
    differences: list[Difference] = []
    tensors: tuple[Mismatch, ...] = ()
    if training is None:
        differences.append(
            Difference(
                about=About.STATE,
                setting="training state",
                cls=IMPOSSIBLE,
                why=missing,
                hint="start a new run from these weights",
            )
        )
    else:
        differences += _batch(path, training, run, rule)
        differences += _lengths(source, run)
        differences += _parts(source, training)
    if run.model is not None:
        found, tensors = _model(checkpoint, training, run, rule)
        differences += found
    over = list(_overridden(training, run)) if training is not None else []
    lr = rates(training)
    if not rule.saved and any(d.cls != SAFE and d.about in (About.BATCH, About.LENGTH) for d in differences):
        lr = replace(lr, next=None, note=ANEW)
    state = checkpoint.train_state
    step = training.count if training is not None and training.count is not None else state.step
    return Forecast(
        path=path,
        format=framework if framework != "weights" else checkpoint.layout.format,
        step=step,
        epoch=state.epoch,
        samples=state.samples,
        rates=lr,
        loads=tuple(_loads(checkpoint, training)),
        checks=tuple(_checks(training, run, differences)),
        differences=tuple(differences),
        tensors=tensors,
        overridden=tuple(over),
        notes=(
            f"the schedule's constants come from {rule.constants}",
            "not forecast here: what the training code itself does with these files",
        ),
    )


def rates(training: Training | None) -> Rates:
    if training is None or not training.optimizers:
        return Rates(note="no optimizer's settings are in the checkpoint")
    optimizer = training.optimizers[0]
    found = [real(group.get("lr")) for group in optimizer.groups]
    if not found or any(lr is None for lr in found):
        return Rates(note="the optimizer's settings hold no learning rate")
    first = tuple(lr for lr in found if lr is not None)
    note = "" if optimizer.first_update else "the framework computes it anew before the first update"
    own = [s for s in training.schedules if s.optimizer == 0]
    if not own:
        return Rates(first=first, next=None, note=note or "no schedule is saved: what follows is the code's")
    try:
        program = schedules.recognise(own[0].framework, own[0].states, optimizer.groups, own[0].about)
        if not program.known:
            return Rates(first=first, note="not forecast: the schedule's function is not in the checkpoint")
        machine = program.machine(fresh=False)
        machine.step()
        following = tuple(float(group["lr"]) for group in machine.groups)
    except CkptError as error:
        return Rates(first=first, note=f"not forecast: {error.message}")
    if any(map(math.isnan, following)):
        return Rates(first=first, note="not forecast: the schedule's function is not in the checkpoint")
    return Rates(first=first, next=following, note=note)


def new_batch(run: NewRun, training: Training) -> tuple[int | None, int | None, int | None]:
    """Micro batch, accumulation and ranks of the new run; what is not said is as it was."""
    known = training.batch
    micro, steps = known.micro, known.accumulation
    for source in (run.arguments or {}, run.config or {}):
        for key in ("per_device_train_batch_size", "train_micro_batch_size_per_gpu"):
            found = whole(source.get(key))
            micro = micro if found is None else found
        found = whole(source.get("gradient_accumulation_steps"))
        steps = steps if found is None else found
    return micro, steps, run.world_size or known.ranks


def _batch(path: Path, training: Training, run: NewRun, rule: Rule) -> Iterator[Difference]:
    micro, steps, ranks = new_batch(run, training)
    known = training.batch
    old, new = (known.micro, known.accumulation, known.ranks), (micro, steps, ranks)
    if old == new:
        return
    if None in old or None in new:
        changed = [
            f"{name} {now}"
            for name, was, now in zip(("batch per rank", "accumulation", "ranks"), old, new, strict=True)
            if was != now
        ]
        yield Difference(
            about=About.BATCH,
            setting="batch",
            old="not stated in the checkpoint",
            new=", ".join(changed),
            cls=CAREFUL,
            why=f"whether the effective batch is the same cannot be told; if it is not, {rule.batch}",
        )
        return
    was, now = math.prod(n for n in old if n), math.prod(n for n in new if n)
    if was == now:
        yield Difference(
            about=About.BATCH,
            setting="batch per rank x accumulation x ranks",
            old=" x ".join(map(str, old)),
            new=" x ".join(map(str, new)),
            cls=SAFE if training.unit == "update" else CAREFUL,
            why=f"the effective batch is still {now}"
            if training.unit == "update"
            else f"the effective batch is still {now}, but this framework counts micro-batches: {rule.batch}",
        )
        return
    yield Difference(
        about=About.BATCH,
        setting="effective batch",
        old=was,
        new=now,
        cls=CAREFUL,
        why=f"it loads, and {rule.batch}",
        hint=f"ckpt rebase-schedule {escape(path)} --old-bs {was} --new-bs {now}",
    )


def _parts(source: Source, training: Training) -> Iterator[Difference]:
    """What a resume needs and does not find."""
    if not training.optimizers:
        lightning = training.framework == "lightning"
        yield Difference(
            about=About.OPTIMIZER,
            setting="optimizer state",
            cls=IMPOSSIBLE if lightning else CAREFUL,
            why="it was saved with weights alone, and Lightning refuses to resume from that"
            if lightning
            else "none is saved here: the optimizer starts anew, with moments of zero",
            hint="start a new run from the weights",
            refusal=Refusal(
                moment=Moment.OPTIMIZER_STATE, error="KeyError", text="Trying to restore optimizer state"
            )
            if lightning
            else None,
        )
    if training.framework in ("hf-trainer", "accelerate") and source.target.is_dir():
        yield from _trainer_parts(source, training)


def _trainer_parts(source: Source, training: Training) -> Iterator[Difference]:
    names = {entry.name for folder in {source.target, source.root} for entry in entries(folder)}
    if "checkpoint-is-incomplete.txt" in names:
        yield Difference(
            about=About.STATE,
            setting="checkpoint-is-incomplete.txt",
            cls=IMPOSSIBLE,
            why="the Trainer did not finish this save",
            hint="resume from an older checkpoint",
        )
    if training.framework == "hf-trainer" and "scheduler.pt" not in names:
        yield Difference(
            about=About.SCHEDULE,
            setting="scheduler.pt",
            cls=CAREFUL,
            why="it is not here: neither optimizer nor scheduler is then loaded, and nothing says so",
        )
    if not any(name.startswith(("rng_state", "random_states")) for name in names):
        yield Difference(
            about=About.DATA,
            setting="random states",
            cls=CAREFUL,
            why="none are saved here: dropout and data order go on from fresh ones",
        )


def _model(
    checkpoint: Checkpoint, training: Training | None, run: NewRun, rule: Rule
) -> tuple[list[Difference], tuple[Mismatch, ...]]:
    assert run.model is not None
    found = fit(tensors_of(checkpoint), dict(checkpoint.shared), run.model)
    differences = list(module(found, strict=run.strict and rule.strict))
    counted = training is not None and training.optimizers and (found.missing or found.unexpected)
    if counted and not rule.strict:
        differences.append(
            Difference(
                about=About.MODEL,
                setting="model: parameters of the optimizer",
                cls=IMPOSSIBLE,
                why="names are not compared while the weights are loaded, but the optimizer's state is saved "
                "for each parameter of the old model",
                hint="build the model that was saved, or start a new run from its weights",
                refusal=Refusal(
                    moment=Moment.OPTIMIZER_STATE,
                    error="ValueError",
                    text="loaded state dict contains a parameter group that doesn't match the size of "
                    "optimizer's group",
                )
                if len(found.missing) != len(found.unexpected)
                else None,
            )
        )
    return differences, found.mismatches


def _lengths(source: Source, run: NewRun) -> Iterator[Difference]:
    """The length of a Trainer's run, which its schedule is computed from."""
    path = source.target / "trainer_state.json"
    if run.arguments is None or not path.is_file():
        return
    saved = jsons.read(path, allow_nan=True)
    for key in ("num_train_epochs", "max_steps"):
        old, new = saved.get(key), run.arguments.get(key)
        if new is None or (key == "max_steps" and (whole(new) or 0) <= 0) or real(old) == real(new):
            continue
        yield Difference(
            about=About.LENGTH,
            setting=key,
            old=old,
            new=new,
            cls=CAREFUL,
            why="the schedule is computed anew for the new length and continued at the old step",
        )


def _overridden(training: Training, run: NewRun) -> Iterator[Overridden]:
    wanted = real((run.arguments or {}).get("learning_rate"))
    if wanted is None:
        wanted = real(section(run.config or {}, "optimizer", "params").get("lr"))
    if wanted is None or not training.optimizers:
        return
    group = training.optimizers[0].groups[0]
    used = group.get("initial_lr", group.get("lr"))
    if used != wanted:
        yield Overridden(
            setting="learning_rate",
            configured=wanted,
            used=used,
            why="the optimizer's param_groups and the schedule's base are loaded from the checkpoint",
        )


def _loads(checkpoint: Checkpoint, training: Training | None) -> Iterator[str]:
    yield f"{len(checkpoint.tensors)} tensors of the model"
    if training is None:
        return
    if training.optimizers:
        yield f"the state of {len(training.optimizers)} optimizer" + (
            "s" if len(training.optimizers) > 1 else ""
        )
    if training.schedules:
        yield f"{len(training.schedules)} schedule" + ("s" if len(training.schedules) > 1 else "")
    if training.counters:
        yield f"counters: {', '.join(counter.name for counter in training.counters[:6])}"


def _checks(training: Training | None, run: NewRun, differences: list[Difference]) -> Iterator[Check]:
    stated = training is not None and training.batch.total is not None
    said = run.config is not None or run.arguments is not None
    known = stated and (said or run.world_size is None)
    batch = "the same" if known and said else "taken as unchanged" if known else "not known"
    yield check(About.BATCH, batch, differences, known=known)
    has = training is not None and bool(training.schedules)
    yield check(About.SCHEDULE, "saved" if has else "none is saved", differences, known=has)
    given = run.model is not None
    model = "every tensor fits" if given else "taken as unchanged: no --model was given"
    yield check(About.MODEL, model, differences, known=given)
    kept = training is not None and bool(training.optimizers)
    yield check(About.OPTIMIZER, "saved" if kept else "none is saved", differences, known=kept)
