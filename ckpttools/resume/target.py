"""What a path leads to, and the forecast for it."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import replace

from ckpttools import frameworks as training_of
from ckpttools import runs
from ckpttools.checks import Verdict
from ckpttools.checks.kept import PARTIAL
from ckpttools.errors import CkptError, Unsupported, UsageError, escape
from ckpttools.findings import ERROR, WARNING, Finding
from ckpttools.formats import Source, locate, read
from ckpttools.frameworks import framework_of
from ckpttools.frameworks.rules import CAREFUL, SAFE, About, AutoResume
from ckpttools.location import Location
from ckpttools.resume import arguments, deepspeed, trainers
from ckpttools.resume.forecast import Check, Difference, Forecast, check
from ckpttools.resume.lengths import length, length_check, planned
from ckpttools.resume.new_run import NewRun
from ckpttools.resume.rates import ahead
from ckpttools.resume.rates import rates as rates_of
from ckpttools.stores.files import is_file, is_folder


class Target(Struct, frozen=True, kw_only=True):
    """A checkpoint that was found; `saved` is None where it is no DeepSpeed engine's.

    `path` is what was asked about; `one` is one checkpoint, which `ckpt verify` understands.
    """

    path: Location
    one: Location
    source: Source
    saved: deepspeed.Saved | None
    auto_resume: tuple[AutoResume, ...] = ()
    further: Difference | None = None  # another checkpoint of the folder is further on

    @classmethod
    def find(cls, path: Location, tag: str | None = None) -> Target:
        """Raises CkptError where a path means no checkpoint, or one that is damaged.

        In a run folder it is the one that an automatic resume takes.
        """
        one = path
        chosen: tuple[AutoResume, ...] = ()
        folder = tag is None and is_folder(path)
        if folder:
            chosen = training_of.auto_resume(path)
        try:
            source = None if folder and runs.holds_others(path) else locate(path, tag)
        except UsageError as error:
            below = folder and error.id == "not-a-checkpoint" and runs.paths(path)
            if error.id != "several-checkpoints" and not below:
                raise
            source = None
        if source is None:
            taken = next((c.path for c in chosen if c.path is not None), None)
            if taken is None:
                choice = runs.newest(path)
                taken = choice.path
                chosen = (*chosen, AutoResume(framework="ckpt latest", path=taken, why=choice.why))
            one = taken
            source = replace(locate(one), how=f"what an automatic resume in {escape(path)} takes")
        _refuse_universal(source)
        saved = deepspeed.read_saved(source.target) if deepspeed.is_engine(source.target) else None
        if saved is not None and tag is None:
            saved = replace(saved, place=one)
        further = _further(path, {one, source.target}) if tag is None and is_folder(path) else None
        return cls(path=path, one=one, source=source, saved=saved, auto_resume=chosen, further=further)


def _refuse_universal(source: Source) -> None:
    """Raise Unsupported for what another loader reads than the one that is foretold here."""
    if source.format.name == "universal":
        raise Unsupported(
            "layout-unsupported",
            "what load_universal makes of a universal checkpoint is not foretold yet",
            where=source.target,
            why="it restores neither buffers nor frozen weights, and stage 3 the settings of one group alone",
            hint="ckpt verify says whether it is whole; ckpt convert --to zero2 (or zero3) --world-size N "
            "makes a folder of it that resume-check foretells",
        )


def _further(folder: Location, taken: set[Location]) -> Difference | None:
    """That the one which is taken is not the newest of its run, by what the checkpoints say themselves."""
    entries = runs.find(folder)
    own = next((entry for entry in entries if entry.path in taken), None)
    if own is None:
        return None
    run = [entry for entry in entries if entry.run == own.run]
    newest = next((e for e in run if e.problem is None and e.resumes is not False), own)
    if run.index(newest) >= run.index(own):
        return None
    return Difference(
        about=About.CHOICE,
        setting="newest",
        old=f"{escape(own.path.name)} ({own.at or '?'})",
        new=f"{escape(newest.path.name)} ({newest.at or '?'})",
        cls=CAREFUL,
        why="a resume takes the former, and the latter is further on: its training would be lost",
        hint=f"to go on from the newest: name {escape(newest.path)}; ckpt latest {escape(folder)} tells more",
    )


def foretell(target: Target, run: NewRun) -> Forecast:
    """The forecast, from headers alone. Whether every file is whole is for `with_verdict` to say."""
    saved = target.saved
    if saved is not None:
        run = replace(run, config=arguments.resolved(run, saved.config))
        if is_file(target.source.root / "adapter_config.json"):
            run = replace(run, strict=False)  # as transformers loads PEFT's models
        found = deepspeed.forecast(target.one, saved, run)
        if run.settings is not None:
            found = _with(
                found, arguments.trainer_settings(saved, run.settings), About.DATA, "the same samples"
            )
        found = _driven(target, run, found)
    else:
        found = trainers.forecast(target.one, target.source, run)
    if target.further is not None:
        found = replace(found, differences=(*found.differences, target.further))
    return replace(found, auto_resume=target.auto_resume)


def _with(found: Forecast, more: Iterable[Difference], about: About, good: str) -> Forecast:
    """The forecast with further differences, and the line of the check-list that they fill."""
    more = tuple(more)
    line = check(about, good, more)
    return replace(found, differences=(*found.differences, *more), checks=(*found.checks, line))


def _driven(target: Target, run: NewRun, found: Forecast) -> Forecast:
    """What a framework that drives DeepSpeed knows beside it: epoch, length, batch and schedule."""
    if target.saved is None or target.saved.stage not in (1, 2, 3):
        return found
    try:
        training = training_of.read(target.source, read(target.source))
    except CkptError as error:
        return replace(
            found, notes=(*found.notes, f"its training state is not read further: {error.message}")
        )
    differences = [*found.differences, *length(training, run)]
    total = planned(training, run)
    checks = [*found.checks, length_check(total, training, differences)]
    if training.framework in ("deepspeed", "ckpt train"):
        return replace(found, differences=tuple(differences), checks=tuple(checks))
    differences = [d for d in differences if d.about is not About.BATCH or d.refusal is not None]
    differences += trainers.batch(target.one, training, run)
    own_optimizer = "optimizer" in target.saved.config  # DeepSpeed's, whatever the framework names
    settings = trainers.settings(training, run)
    differences += (d for d in settings if d.about is not About.OPTIMIZER or not own_optimizer)
    epoch = found.epoch if found.epoch is not None else training.epoch
    own = target.saved.scheduler is not None or not training.schedules
    rule = framework_of(training).rule
    rates = found.rates
    if not own:
        rates = rates_of(training, engine=True)
        if not any(ahead(training, each, engine=True) for each in training.schedules):
            rates = replace(rates, first=found.rates.first)
    notes = [*found.notes, f"{training.framework} drives DeepSpeed: {rule.batch}"]
    lines = {About.BATCH: trainers.batch_check(training, run, differences)}
    if target.saved.scheduler is None:
        differences += trainers.unsaved_schedule(training)
        has = bool(training.schedules)
        good = f"saved by {training.framework}" if has else "none is saved"
        lines[About.SCHEDULE] = check(About.SCHEDULE, good, differences, known=has)
    if not own:
        if not rule.saved and any(d.cls != SAFE and d.about in trainers.RECOMPUTED for d in differences):
            rates = replace(rates, next=None, note=trainers.ANEW)
        notes = [note for note in notes if note != deepspeed.OUTSIDE]
    return replace(
        found,
        format=f"{found.format} ({training.framework})",
        epoch=epoch,
        rates=rates,
        checks=tuple(lines.get(c.about, c) if isinstance(c.about, About) else c for c in checks),
        differences=tuple(differences),
        overridden=(*found.overridden, *trainers.overridden(training, run)),
        notes=tuple(notes),
    )


def with_verdict(found: Forecast, verdict: Verdict | None, how: str) -> Forecast:
    """The forecast with the lines "complete" and "intact" in front; `how` says what was read.

    None stands for a layout that cannot be verified.
    """
    if verdict is None:
        lines = [Check(about="intact", ok=None, text=how)]
        return replace(found, checks=(*lines, *found.checks))
    bad = [f for f in verdict.findings if f.severity == ERROR]
    absent = [f for f in bad if f.id in ABSENT]
    broken = [f for f in bad if f.id not in ABSENT]
    doubts = [f for f in verdict.findings if f.severity == WARNING]
    lines = [
        Check(about="complete", ok=not absent, text=absent[0].message if absent else "every file is here"),
        Check(about="intact", ok=not broken, text=broken[0].message if broken else how),
    ]
    contradictions = (
        Difference(about=About.STATE, setting=f.where or f.id, cls=CAREFUL, why=f.text, hint=f.hint)
        for f in doubts
    )
    checks = [*lines, *found.checks]
    unsure = [_partial(f) for f in verdict.findings if f.id == PARTIAL]
    for each in unsure:  # not known to be good, nor to be bad
        own = (c.about is About.OPTIMIZER and c.ok is True for c in checks)
        checks = [replace(c, ok=None, text=each.why) if o else c for c, o in zip(checks, own, strict=True)]
    found = replace(found, checks=tuple(checks), differences=(*found.differences, *unsure), damaged=bool(bad))
    return _with(found, contradictions, About.STATE, "what is saved agrees with itself")


def _partial(finding: Finding) -> Difference:
    """What torch loads without a word, and takes for parameters that no update has reached."""
    return Difference(
        about=About.OPTIMIZER,
        setting="optimizer state",
        cls=CAREFUL,
        why=f"{finding.message}; those that are trained begin with moments of zero",
        hint="nothing where these are frozen; else compare with another save of the run: ckpt diff",
    )


# findings that say that something is not here, rather than wrong
ABSENT = frozenset(
    ("buffer-missing", "field-missing", "index-missing", "key-missing", "latest-missing", "model-missing",
     "moment-missing", "no-master", "no-optimizer", "no-optimizer-shards", "no-optimizer-states",
     "no-weights", "shapes-missing", "shard-missing", "tag-missing", "tensor-missing")
)  # fmt: skip


def unreadable(path: Location, error: CkptError) -> Forecast:
    """The forecast for a checkpoint that cannot even be read: it will not resume, and why."""
    line = Check(about="complete", ok=False, text=f"{error.message} [{error.id}]")
    hints = tuple(text for text in (error.why, error.hint) if text)
    chosen = training_of.auto_resume(path) if is_folder(path) else ()
    return Forecast(
        path=path, format="unreadable", checks=(line,), notes=hints, damaged=True, auto_resume=chosen
    )
