"""The forecast for containers without a DeepSpeed engine: single files, Trainer folders, accelerate's.

What their frameworks take from the checkpoint and what from the new run's configuration differs; each
framework's own rule is in its file. The parts that a framework which drives DeepSpeed shares with
these (batch, length, settings) are functions of the Training alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial

from msgspec.structs import replace

from ckpttools import frameworks as training_of
from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import CkptError, counted, escape
from ckpttools.formats import Source, read
from ckpttools.frameworks import arguments, framework_of
from ckpttools.frameworks.framework import Framework
from ckpttools.frameworks.rules import CAREFUL, CLASSES, IMPOSSIBLE, SAFE, About, Setting
from ckpttools.location import Location
from ckpttools.resume.fit import fit, module
from ckpttools.resume.forecast import (
    Check,
    Difference,
    Forecast,
    Mismatch,
    Moment,
    Overridden,
    Refusal,
    check,
)
from ckpttools.resume.lengths import given, length, length_check, planned
from ckpttools.resume.model import prefix_of, tensors_of
from ckpttools.resume.new_run import NewRun, leaves
from ckpttools.resume.rates import rates
from ckpttools.stores.files import entries, is_folder
from ckpttools.training import Training

RECOMPUTED = (About.BATCH, About.LENGTH, About.SCHEDULE)  # what a schedule is computed anew from
ANEW = "not forecast: the framework computes it from the new settings"


def forecast(path: Location, source: Source, run: NewRun) -> Forecast:
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
    framework = framework_of(training)
    rule = framework.rule
    differences: list[Difference] = []
    tensors: tuple[Mismatch, ...] = ()
    if training is None:
        differences.append(_unread(source, checkpoint, run, missing))
    else:
        differences += [*batch(path, training, run), *length(training, run)]
        differences += [*_parts(source, training, framework), *settings(training, run)]
    if run.model is not None:
        found, tensors = _model(checkpoint, training, run, framework)
        differences += found
    total = planned(training, run) if training is not None else None
    done = training.count if training is not None else None
    left = total - done if total is not None and done is not None else None
    lr = rates(training, ranks=run.world_size, left=left)
    if not rule.saved and any(d.cls != SAFE and d.about in RECOMPUTED for d in differences):
        lr = replace(lr, next=None, note=ANEW, last=False)
    state = training if training is not None else checkpoint.training
    return Forecast(
        path=path,
        format=training.framework if training is not None else checkpoint.layout.format,
        step=state.step if training is None or training.count is None else training.count,
        epoch=state.epoch,
        samples=state.samples,
        rates=lr,
        loads=tuple(_loads(checkpoint, training)),
        checks=tuple(_checks(training, run, differences)),
        differences=tuple(differences),
        tensors=tensors,
        overridden=tuple(overridden(training, run)) if training is not None else (),
        notes=(
            f"the schedule's constants come from {rule.constants}",
            "not forecast here: what the training code itself does with these files",
        ),
    )


def _unread(source: Source, checkpoint: Checkpoint, run: NewRun, missing: str) -> Difference:
    """No training state, or none that is read here."""
    make = partial(Difference, about=About.STATE, setting="training state")
    if not source.format.weights_alone:
        return make(cls=IMPOSSIBLE, why=missing, hint="start a new run from these weights")
    saved, new = checkpoint.layout.ranks, run.world_size
    if new is not None and new != saved:
        return make(
            old=saved,
            new=new,
            cls=IMPOSSIBLE,
            why="each rank loads the file of its own number and of the number of ranks",
            hint=f"resume on {saved} ranks, or join the weights: ckpt extract",
        )
    return make(
        cls=CAREFUL,
        why=f"{source.format.name} reads it from files of {saved} ranks, which are checked and not read "
        "further: where it goes on is not known here",
        hint=f"resume on {saved} ranks",
    )


# --- batch, length, settings: of any framework --------------------------------------------------------


def batch(path: Location, training: Training, run: NewRun) -> Iterator[Difference]:
    """Another effective batch, and one of which that cannot be told."""
    said, rule = run.stated, framework_of(training).rule
    known = training.batch
    old = (known.micro, known.accumulation, known.ranks)
    parts = given(run)
    steps = parts[1]
    new = tuple(was if now is None else now for was, now in zip(old, parts, strict=True))
    was, now = known.total, _product(new)
    if said.total is not None and said.micro is None:
        now = said.total
    if parts == (None, None, None) and said.total is None:
        return
    if was is None or now is None:
        named = {"batch per rank": said.micro, "accumulation": steps, "ranks": run.world_size}
        changed = [f"{name} {n}" for name, n in (*named.items(), ("in all", said.total)) if n is not None]
        if old != new or said.total is not None:
            yield Difference(
                about=About.BATCH,
                setting="batch",
                old="not stated in the checkpoint" if was is None else was,
                new=", ".join(changed),
                cls=CAREFUL,
                why=f"whether the effective batch is the same cannot be told; if it is not, {rule.batch}",
            )
    elif was != now:
        yield Difference(
            about=About.BATCH,
            setting="effective batch",
            old=was,
            new=now,
            cls=CAREFUL,
            why=f"it loads, and {rule.batch}",
            hint=f"ckpt rebase-schedule {escape(path)} --old-bs {was} --new-bs {now}",
        )
    elif old != new:
        updates = training.unit == "update"
        yield Difference(
            about=About.BATCH,
            setting="batch per rank x accumulation x ranks",
            old=_shown(old),
            new=_shown(new),
            cls=SAFE if updates else CAREFUL,
            why=f"the effective batch is still {now}"
            + ("" if updates else f", but this framework counts micro-batches: {rule.batch}"),
        )


def _product(numbers: Sequence[int | None]) -> int | None:
    return None if None in numbers else math.prod(n for n in numbers if n is not None)


def _shown(numbers: Sequence[int | None]) -> str:
    return " x ".join("?" if n is None else str(n) for n in numbers)


def settings(training: Training, run: NewRun) -> Iterator[Difference]:
    """Every other setting of a configuration, where the checkpoint holds the old one."""
    framework, kind = framework_of(training), run.stated.kind
    partial = kind == arguments.KIND  # what is not given there is not known
    if not run.stated.values or kind != framework.config:
        if run.stated.values and not partial:
            yield Difference(
                about=About.SETTING,
                setting="--config",
                new=kind,
                cls=CAREFUL,
                why=f"the checkpoint is of {framework.title}: only batch, rate and length are compared",
            )
        return
    if not training.configuration and not partial:
        return
    old, new = dict(leaves(training.configuration)), dict(leaves(run.stated.values))
    for key in sorted((set(new) if partial else {*old, *new}) - {"_base_"}):
        known = _setting(framework, key)
        if old.get(key) != new.get(key) and known.why:
            yield Difference(
                about=known.about,
                setting=key,
                old=old.get(key),
                new=new.get(key),
                cls=known.cls if key in old and key in new else min(known.cls, CAREFUL, key=CLASSES.index),
                why=known.why,
            )
    for base in run.stated.unread:
        yield Difference(
            about=About.SETTING,
            setting="_base_",
            new=base,
            cls=CAREFUL,
            why="it was not read: only files below the configuration's own folder, or that of _base_, are",
        )


def _setting(framework: Framework, path: str) -> Setting:
    return next(s for s in framework.settings if re.fullmatch(s.pattern, path))


def overridden(training: Training, run: NewRun) -> Iterator[Overridden]:
    if run.stated.lr is None or not training.optimizers or not training.optimizers[0].groups:
        return
    group = training.optimizers[0].groups[0]
    used = group.get("initial_lr", group.get("lr"))
    if used != run.stated.lr and training.optimizers[0].first_update:
        yield Overridden(
            setting="learning_rate",
            configured=run.stated.lr,
            used=used,
            why="the optimizer's param_groups and the schedule's base are loaded from the checkpoint",
        )


# --- parts and model ----------------------------------------------------------------------------------


def _parts(source: Source, training: Training, framework: Framework) -> Iterator[Difference]:
    """What a resume needs and does not find."""
    rule = framework.rule
    if not training.optimizers:
        refusal = Refusal(
            moment=Moment.OPTIMIZER_STATE, error="KeyError", text="Trying to restore optimizer state"
        )
        yield Difference(
            about=About.OPTIMIZER,
            setting="optimizer state",
            cls=IMPOSSIBLE if rule.needs_optimizer else CAREFUL,
            why=f"it was saved with weights alone, and {framework.title} refuses to resume from that"
            if rule.needs_optimizer
            else "none is saved here: the optimizer starts anew, with moments of zero",
            hint="start a new run from the weights",
            refusal=refusal if rule.needs_optimizer else None,
        )
    yield from unsaved_schedule(training)
    if training.optimizers and training.count is None and training.epoch is None:
        yield Difference(
            about=About.LENGTH,
            setting="counters",
            cls=CAREFUL,
            why="neither a step nor an epoch is saved: whether the run goes on or counts anew is the code's",
            hint="resume from a checkpoint that states its step, or set it by hand",
        )
    if is_folder(source.target):
        names = {entry.name for folder in {source.target, source.root} for entry in entries(folder)}
        for lack in framework.lacks(names):
            yield Difference(
                about=lack.about, setting=lack.setting, cls=lack.cls, why=lack.why, hint=lack.hint
            )


def unsaved_schedule(training: Training) -> Iterator[Difference]:
    """A schedule that has left its traces in the optimizer, or is configured, and is not saved."""
    if training.schedules or not training.optimizers or not framework_of(training).rule.saved:
        return
    traced = any("initial_lr" in group for o in training.optimizers for group in o.groups)
    if traced or training.scheduled:
        yield Difference(
            about=About.SCHEDULE,
            setting="schedule",
            cls=CAREFUL,
            why="a scheduler was at work ("
            + ("initial_lr in param_groups" if traced else "the configuration names one")
            + ") and its state is not saved here: one that the code makes starts anew",
            hint="resume from a checkpoint that holds it, or step the new one to the place by hand",
        )


def _model(
    checkpoint: Checkpoint, training: Training | None, run: NewRun, framework: Framework
) -> tuple[list[Difference], tuple[Mismatch, ...]]:
    assert run.model is not None
    rule = framework.rule
    saved, model = tensors_of(checkpoint), run.model
    prefix = "" if rule.prefix else prefix_of(checkpoint)
    if prefix != ("" if rule.prefix else model.prefix):  # compare the names as they are written
        saved = {f"{prefix}{name}": tensor for name, tensor in saved.items()}
        named = {f"{model.prefix}{name}": tensor for name, tensor in model.tensors.items()}
        model = replace(model, tensors=named, shared={})
    found = fit(saved, {} if model is not run.model else dict(checkpoint.shared), model)
    differences = list(module(found, strict=run.strict and rule.strict))
    if model is not run.model:
        hint = "load it into the wrapped model (DDP, torch.compile), or ckpt extract: it removes the prefix"
        differences = [replace(d, hint=hint) for d in differences]
    counted = training is not None and training.optimizers and (found.missing or found.unexpected)
    if counted and not rule.strict:
        refusal = Refusal(
            moment=Moment.OPTIMIZER_STATE,
            error="ValueError",
            text="loaded state dict contains a parameter group that doesn't match the size of optimizer's "
            "group",
        )
        differences.append(
            Difference(
                about=About.MODEL,
                setting="model: parameters of the optimizer",
                cls=IMPOSSIBLE,
                why="names are not compared while the weights are loaded, but the optimizer's state is saved "
                "for each parameter of the old model",
                hint="build the model that was saved, or start a new run from its weights",
                refusal=refusal if len(found.missing) != len(found.unexpected) else None,
            )
        )
    return differences, found.mismatches


def _loads(checkpoint: Checkpoint, training: Training | None) -> Iterator[str]:
    yield f"{counted(len(checkpoint.tensors), 'tensor')} of the model"
    if training is None:
        return
    for what, number in (("optimizer", len(training.optimizers)), ("schedule", len(training.schedules))):
        if number:
            yield f"the state of {number} {what}" + ("s" if number > 1 else "")
    if training.counters:
        yield f"counters: {', '.join(counter.name for counter in training.counters[:6])}"


def _checks(training: Training | None, run: NewRun, differences: list[Difference]) -> Iterator[Check]:
    if training is None:
        for about in (About.BATCH, About.LENGTH, About.SCHEDULE, About.OPTIMIZER):
            yield Check(about=about, ok=None, text="no training state is saved")
    else:
        yield batch_check(training, run, differences)
        yield length_check(planned(training, run), training, differences)
        has = bool(training.schedules)
        yield check(About.SCHEDULE, "saved" if has else "none is saved", differences, known=has)
        kept = bool(training.optimizers)
        yield check(About.OPTIMIZER, "saved" if kept else "none is saved", differences, known=kept)
    given = run.model is not None
    model = "every tensor fits" if given else "taken as unchanged: no --model was given"
    yield check(About.MODEL, model, differences, known=given)


def batch_check(training: Training, run: NewRun, differences: list[Difference]) -> Check:
    total = training.batch.total
    said = (run.stated.micro, run.stated.total, run.world_size) != (None, None, None)
    text = f"{total} samples per update" if total is not None else "the checkpoint does not state it"
    unchanged = "" if said or total is None else ", taken as unchanged"
    return check(About.BATCH, text + unchanged, differences, known=total is not None)
