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
from ckpttools.resume import arguments, auto, engine, plain
from ckpttools.resume.forecast import forecast
from ckpttools.resume.frameworks import rule_of
from ckpttools.resume.report import SAFE, AutoResume, Check, Forecast
from ckpttools.resume.run import NewRun, real


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A checkpoint that was found; `saved` is None where it is no DeepSpeed engine's.

    `path` is what was asked about; `target` is one checkpoint, which `ckpt verify` understands.
    """

    path: Path
    target: Path
    source: Source
    saved: engine.Saved | None
    auto_resume: tuple[AutoResume, ...] = ()

    @classmethod
    def find(cls, path: Path, tag: str | None = None) -> Subject:
        """Raises CkptError where a path means no checkpoint, or one that is damaged.

        In a run folder it is the one that an automatic resume takes.
        """
        target = path
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
            target = taken
            source = replace(locate(target), how=f"what an automatic resume in {escape(path)} takes")
        saved = engine.read_saved(source.target) if engine.is_engine(source.target) else None
        if saved is not None and tag is None:
            saved = replace(saved, place=target)
        return cls(path=path, target=target, source=source, saved=saved, auto_resume=chosen)


def foretell(subject: Subject, run: NewRun) -> Forecast:
    """The forecast, from headers alone. Whether every file is whole is for `with_verdict` to say."""
    saved = subject.saved
    if saved is not None:
        run = replace(run, config=arguments.resolved(run.config, run.arguments, saved.config))
        found = forecast(subject.target, saved, run)
        if run.settings is not None:
            more = tuple(arguments.trainer_settings(saved, run.settings))
            data = next((d for d in more if d.cls != SAFE), None)
            line = Check(name="data order", ok=data is None, text=data.why if data else "the same samples")
            found = replace(found, differences=(*found.differences, *more), checks=(*found.checks, line))
        found = _driven(subject, found)
    else:
        found = plain.forecast(subject.target, subject.source, run)
    return replace(found, auto_resume=subject.auto_resume)


def _driven(subject: Subject, found: Forecast) -> Forecast:
    """Where another framework drove DeepSpeed: its own epoch and schedule, which DeepSpeed does not see."""
    if subject.saved is None or subject.saved.stage not in (1, 2):
        return found
    try:
        training = training_of.read(subject.source, read(subject.source))
    except CkptError as error:
        return replace(
            found, notes=(*found.notes, f"its training state is not read further: {error.message}")
        )
    if training.framework in ("deepspeed", "ckpt train"):
        return found
    epoch = found.epoch if found.epoch is not None else training.epoch
    state = subject.source.root / "trainer_state.json"
    if epoch is None and state.is_file():
        epoch = real(jsons.read(state, allow_nan=True).get("epoch"))
    own = subject.saved.scheduler is not None or not training.schedules
    rule = rule_of(training)
    rates = found.rates if own else replace(plain.rates(training), first=found.rates.first)
    checks = found.checks
    notes = (*found.notes, f"{training.framework} drives DeepSpeed: {rule.batch}")
    if not own:
        if not rule.saved and any(d.cls != SAFE and "batch" in d.setting for d in found.differences):
            rates = replace(rates, next=None, note=plain.ANEW)
        line = Check(name="schedule", ok=True, text=f"saved by {training.framework}")
        checks = tuple(line if check.name == "schedule" else check for check in checks)
        notes = tuple(note for note in notes if "keeps outside" not in note)
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
        lines = [Check(name="intact", ok=None, text=how)]
        return replace(found, checks=(*lines, *found.checks))
    bad = [f for f in verdict.findings if f.severity == "error"]
    absent = [f for f in bad if "missing" in f.id or f.id.startswith(("no-", "shard"))]
    broken = [f for f in bad if f not in absent]
    lines = [
        Check(name="complete", ok=not absent, text=absent[0].message if absent else "every file is here"),
        Check(name="intact", ok=not broken, text=broken[0].message if broken else how),
    ]
    return replace(found, checks=(*lines, *found.checks), damaged=bool(bad))


def unreadable(path: Path, error: CkptError) -> Forecast:
    """The forecast for a checkpoint that cannot even be read: it will not resume, and why."""
    line = Check(name="complete", ok=False, text=f"{error.message} [{error.id}]")
    hints = tuple(text for text in (error.why, error.hint) if text)
    chosen = auto.auto_resume(path) if path.is_dir() else ()
    return Forecast(
        path=path, format="unreadable", checks=(line,), notes=hints, damaged=True, auto_resume=chosen
    )
