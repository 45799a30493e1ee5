"""What a path leads to, and the forecast for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ckpttools import frameworks as training_of
from ckpttools import runs
from ckpttools.checks import Verdict
from ckpttools.containers import jsons
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.formats import Source, locate, read
from ckpttools.resume import arguments, auto, deepspeed, trainers
from ckpttools.resume.framework_rules import rule_of
from ckpttools.resume.new_run import NewRun, real
from ckpttools.resume.report import SAFE, About, AutoResume, Check, Forecast, check


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A checkpoint that was found; `saved` is None where it is no DeepSpeed engine's.

    `path` is what was asked about; `one` is one checkpoint, which `ckpt verify` understands.
    """

    path: Path
    one: Path
    source: Source
    saved: deepspeed.Saved | None
    auto_resume: tuple[AutoResume, ...] = ()

    @classmethod
    def find(cls, path: Path, tag: str | None = None) -> Target:
        """Raises CkptError where a path means no checkpoint, or one that is damaged.

        In a run folder it is the one that an automatic resume takes.
        """
        one = path
        chosen: tuple[AutoResume, ...] = ()
        if tag is None and path.is_dir():
            chosen = auto.auto_resume(path)
        try:
            source = locate(path, tag)
        except UsageError as error:
            if error.id != "several-checkpoints":
                raise
            taken = next((c.path for c in chosen if c.path is not None), None)
            if taken is None:
                choice = runs.newest(path)
                taken = choice.path
                chosen = (*chosen, AutoResume(framework="ckpt latest", path=taken, why=choice.why))
            one = taken
            source = replace(locate(one), how=f"what an automatic resume in {escape(path)} takes")
        saved = deepspeed.read_saved(source.target) if deepspeed.is_engine(source.target) else None
        if saved is not None and tag is None:
            saved = replace(saved, place=one)
        return cls(path=path, one=one, source=source, saved=saved, auto_resume=chosen)


def foretell(target: Target, run: NewRun) -> Forecast:
    """The forecast, from headers alone. Whether every file is whole is for `with_verdict` to say."""
    saved = target.saved
    if saved is not None:
        run = replace(run, config=arguments.resolved(run.config, run.arguments, saved.config))
        found = deepspeed.forecast(target.one, saved, run)
        if run.settings is not None:
            more = tuple(arguments.trainer_settings(saved, run.settings))
            line = check(About.DATA, "the same samples", more)
            found = replace(found, differences=(*found.differences, *more), checks=(*found.checks, line))
        found = _driven(target, found)
    else:
        found = trainers.forecast(target.one, target.source, run)
    return replace(found, auto_resume=target.auto_resume)


def _driven(target: Target, found: Forecast) -> Forecast:
    """Where another framework drove DeepSpeed: its own epoch and schedule, which DeepSpeed does not see."""
    if target.saved is None or target.saved.stage not in (1, 2):
        return found
    try:
        training = training_of.read(target.source, read(target.source))
    except CkptError as error:
        return replace(
            found, notes=(*found.notes, f"its training state is not read further: {error.message}")
        )
    if training.framework in ("deepspeed", "ckpt train"):
        return found
    epoch = found.epoch if found.epoch is not None else training.epoch
    state = target.source.root / "trainer_state.json"
    if epoch is None and state.is_file():
        epoch = real(jsons.read(state, allow_nan=True).get("epoch"))
    own = target.saved.scheduler is not None or not training.schedules
    rule = rule_of(training)
    rates = found.rates if own else replace(trainers.rates(training), first=found.rates.first)
    checks = found.checks
    notes = (*found.notes, f"{training.framework} drives DeepSpeed: {rule.batch}")
    if not own:
        if not rule.saved and any(d.cls != SAFE and d.about is About.BATCH for d in found.differences):
            rates = replace(rates, next=None, note=trainers.ANEW)
        line = Check(about=About.SCHEDULE, ok=True, text=f"saved by {training.framework}")
        checks = tuple(line if one.about is About.SCHEDULE else one for one in checks)
        notes = tuple(note for note in notes if note != deepspeed.OUTSIDE)
    return replace(
        found,
        format=f"{found.format} ({training.framework})",
        epoch=epoch,
        rates=rates,
        checks=checks,
        notes=notes,
    )


def with_verdict(found: Forecast, verdict: Verdict | None, how: str) -> Forecast:
    """The forecast with the lines "complete" and "intact" in front; `how` says what was read.

    None stands for a layout that cannot be verified.
    """
    if verdict is None:
        lines = [Check(about="intact", ok=None, text=how)]
        return replace(found, checks=(*lines, *found.checks))
    bad = [f for f in verdict.findings if f.severity == "error"]
    absent = [f for f in bad if "missing" in f.id or f.id.startswith(("no-", "shard"))]
    broken = [f for f in bad if f not in absent]
    lines = [
        Check(about="complete", ok=not absent, text=absent[0].message if absent else "every file is here"),
        Check(about="intact", ok=not broken, text=broken[0].message if broken else how),
    ]
    return replace(found, checks=(*lines, *found.checks), damaged=bool(bad))


def unreadable(path: Path, error: CkptError) -> Forecast:
    """The forecast for a checkpoint that cannot even be read: it will not resume, and why."""
    line = Check(about="complete", ok=False, text=f"{error.message} [{error.id}]")
    hints = tuple(text for text in (error.why, error.hint) if text)
    chosen = auto.auto_resume(path) if path.is_dir() else ()
    return Forecast(
        path=path, format="unreadable", checks=(line,), notes=hints, damaged=True, auto_resume=chosen
    )
