"""Experiments side by side: what each was set to, how far it came, and what came out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct, field

from ckpttools import frameworks, runs
from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.formats import locate, read
from ckpttools.frameworks.progress import progress
from ckpttools.location import Location, below
from ckpttools.runs import logs
from ckpttools.runs.find import Entry
from ckpttools.runs.logs import Log, Series
from ckpttools.runs.retain import VAL
from ckpttools.siblings import THEIRS
from ckpttools.stores.files import entries, is_file, local, named
from ckpttools.stores.links import resolved
from ckpttools.suggest import did_you_mean
from ckpttools.training import Training

VAL_NAMES = frozenset((*VAL, *logs.VAL))
# what training code calls its configuration in a file of its own
CONFIGS = ("config", "cfg", "args", "opt", "hparams", "hyper_parameters", "hyperparameters")
# of param_groups: those that a schedule moves, and how an implementation computes
MOVING = ("lr", "initial_lr", "params", "foreach", "fused", "capturable", "differentiable", "maximize")
# of a configuration: where things lie, and what is of no weight for the result
PLACES = ("output_dir", "logging_dir", "run_name", "work_dir", "work_dirs", "experiment", "timestamp")


# whose values are nobody's business
SECRET = re.compile(
    r"(^|[._-])(tokens?|secrets?|passwords?|passwd|api_?keys?|access_?keys?|credentials?)([._-]|$)"
    r"|(token|secret|password|passwd|api_?key|access_?key|credentials?)$",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


class Best(Struct, frozen=True, kw_only=True):
    """A loss: its last value and its least, and after how many of the run's steps that was."""

    name: str
    last: float
    least: float
    at: float | None = None


class Experiment(Struct, frozen=True, kw_only=True):
    """One run. None is what nothing says.

    `tag` is the name that its folder was given. `settings` are by dotted names. `batch` is the effective one,
    `per_step` the samples of one of the steps that `unit` counts. `span` is from the first to the last thing
    written, in ns since 1970, `seconds` how long that is. `parent` is the run that it was started from.
    """

    path: Location
    tag: str
    framework: str | None
    checkpoints: tuple[Entry, ...]
    unit: str
    step: int | None
    total: int | None
    epoch: float | None
    batch: int | None
    per_step: int | None
    schedule: tuple[str, ...]
    losses: tuple[Best, ...]
    settings: Mapping[str, object]
    log: Log
    span: tuple[int, int]
    parent: str | None = None
    training: Training | None = None
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> int | None:
        """Seen so far, as the batch makes them."""
        return self.step * self.per_step if self.step is not None and self.per_step else None

    @property
    def seconds(self) -> float | None:
        """By the log alone: files that were copied are as old as the copy."""
        return self.log.seconds or None

    def over_samples(self, series: Series) -> tuple[tuple[float, float], ...] | None:
        """A series over samples: those that the log states, else by the batch; None where it is not known."""
        if series.samples:
            return series.samples
        return None if not self.per_step else tuple((at * self.per_step, v) for at, v in series.points)


class Experiments(Struct, frozen=True, kw_only=True):
    """Runs side by side, the newest first; `differing` are the settings that are not the same in all, and
    `closed` is what may not be read.
    """

    folder: Location
    runs: tuple[Experiment, ...]
    differing: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    closed: tuple[Location, ...] = ()


def experiments(
    folder: str | Location, only: Sequence[str] = (), *, found: list[list[Entry]] | None = None
) -> Experiments:
    """Every run below a folder, or those that are called as in `only`. Raises UsageError where there is none.

    >>> found = experiments("fixtures/trainer")
    >>> one = next(each for each in found.runs if each.tag == "z2_bf16_2")
    >>> one.batch, one.step, one.samples, "zero.stage" in found.differing
    (8, 3, 24, True)
    """
    folder = named(folder)
    found = runs.grouped(folder) if found is None else found
    if not found:
        raise runs.nothing(folder)
    shut = [entry for run in found for entry in run if entry.problem and entry.problem.id == "no-permission"]
    found = [[entry for entry in run if entry not in shut] for run in found]
    found = [run for run in found if run]
    places = [entries[0].run for entries in found]
    made = [_experiment(entries, folder, places) for entries in found]
    made = _only(made, only, folder)
    return Experiments(
        folder=folder, runs=tuple(made), differing=differing(made), closed=tuple(e.path for e in shut)
    )


def differing(found: Sequence[Experiment]) -> dict[str, tuple[object, ...]]:
    """Setting -> its value in each run, None where a run does not say, as far as they are not all the same.

    A setting that one of them does not state is compared among those that do.
    """
    names = dict.fromkeys(name for each in found for name in each.settings)
    out: dict[str, tuple[object, ...]] = {}
    for name in names:
        values = tuple(each.settings.get(name) for each in found)
        stated = [repr(each.settings[name]) for each in found if name in each.settings]
        if len(set(stated)) > 1:
            out[name] = values
    return out


def _experiment(entries: list[Entry], top: Location, places: list[Location]) -> Experiment:
    run = entries[0].run if len(entries) > 1 or is_file(entries[0].path) else _alone(entries[0], top)
    home = run.parent if run.name in THEIRS and run != top else run
    notes: list[str] = []
    good = next((e for e in entries if e.problem is None and e.resumes), None)
    good = good or next((e for e in entries if e.problem is None), None)
    training, checkpoint, schedule = _opened(good, notes) if good is not None else (None, None, ())
    others = [*(e.path for e in entries), *(p for p in places if p not in (run, home))]
    states = [e.path / logs.STATE for e in entries[::-1]]
    log = logs.read(home, others, [path for path in states if is_file(path)])
    settings = dict(_settings(training, checkpoint, home, notes))
    known = training.batch if training is not None else None
    unit = "iteration" if training is not None and training.unit == "micro" else "step"
    step = next(
        (e.count("iteration" if unit == "iteration" else "step") for e in entries if e.problem is None), None
    )
    count = training.count if training is not None and training.count is not None else step
    per_step = None if known is None else known.step if unit == "iteration" else known.total
    written = [e.time for e in entries if e.time]
    parent = next(
        (settings[key] for key in ("load_from", "resume_from_checkpoint", "init_from") if settings.get(key)),
        None,
    )
    return Experiment(
        path=home,
        tag=below(home, top) if home != top and top in home.parents else resolved(home).name,
        framework=training.framework if training is not None else None,
        checkpoints=tuple(entries),
        unit=unit,
        step=int(count) if count is not None else None,
        total=training.total_count if training is not None else None,
        epoch=next((e.state.epoch for e in entries if e.state.epoch is not None), None),
        batch=known.total if known is not None else None,
        per_step=per_step,
        schedule=schedule,
        losses=tuple(_losses(log, entries, unit)),
        settings=settings,
        training=training,
        log=log,
        span=(min(written, default=0), max(written, default=0)),
        parent=str(parent) if isinstance(parent, str) else None,
        notes=(
            *notes,
            *log.notes,
            *(() if per_step else ("its batch is not known: no samples are counted",)),
        ),
    )


def _alone(entry: Entry, top: Location) -> Location:
    """The run of a single checkpoint: DeepSpeed's save folder, or the folder that it lies in."""
    is_folder = is_file(entry.path / "latest") or entry.path == top
    return entry.path if is_folder else entry.run


def _opened(entry: Entry, notes: list[str]) -> tuple[Training | None, Checkpoint | None, tuple[str, ...]]:
    """Its training state, what it holds, and its schedules in words."""
    try:
        source = locate(entry.path)
        checkpoint = read(source)
    except CkptError as error:
        notes.append(f"{escape(entry.path.name)}: {error.message} [{error.id}]")
        return None, None, ()
    try:
        training = frameworks.read(source, checkpoint)
    except CkptError as error:
        if error.id != "weights-only":
            notes.append(f"{escape(entry.path.name)}: {error.message} [{error.id}]")
        return None, checkpoint, ()
    return training, checkpoint, progress(source, checkpoint).schedules


def _settings(
    training: Training | None, checkpoint: Checkpoint | None, home: Location, notes: list[str]
) -> Iterator[tuple[str, object]]:
    """By dotted names, the most telling source last: it overrules the others."""
    if checkpoint is not None:
        yield "parameters", sum(ref.numel for ref in checkpoint.tensors.values())
        yield from _flat(checkpoint.settings, "ds_config")
        for key in CONFIGS:
            found = checkpoint.client.get(key)
            if isinstance(found, Mapping):
                yield from _flat(found)
        if checkpoint.optimizer:
            yield "optimizer", checkpoint.optimizer
        for i, group in enumerate(checkpoint.groups):
            kept = {key: value for key, value in group.hyper.items() if key not in MOVING}
            yield from _flat(kept, "optimizer" if len(checkpoint.groups) == 1 else f"optimizer.{i}")
    if training is not None:
        yield from _flat(training.configuration)
        batch = training.batch
        parts = {
            "micro": batch.micro,
            "accumulation": batch.accumulation,
            "ranks": batch.ranks,
            "total": batch.total,
        }
        yield from ((f"batch.{key}", value) for key, value in parts.items() if value is not None)
    yield from _yaml(home, notes)


def _yaml(home: Location, notes: list[str]) -> Iterator[tuple[str, object]]:
    """The configuration that lies beside a run, where there is one."""
    from ckpttools.resume.config_files import read_yaml

    try:
        names = [e.name for e in entries(home) if is_file(e) and e.name.endswith((".yaml", ".yml"))]
    except CkptError:  # a single file is its own run
        return
    paths = [home / name for name in names]
    for path in paths[:4]:
        try:
            yield from _flat(read_yaml(local(path)))
        except CkptError as error:
            notes.append(f"{escape(path.name)} is not read: {error.message}")


def _flat(
    config: Mapping[str, object] | Mapping[object, object], at: str = ""
) -> Iterator[tuple[str, object]]:
    """Plain values by dotted names; places on disk are no settings."""
    for key, value in config.items():
        name = f"{at}.{key}" if at else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, list | tuple) and all(isinstance(v, str | int | float | bool) for v in value):
            yield name, [_shown(name, item) for item in value]
        elif isinstance(value, str | int | float | bool) and name.rpartition(".")[2] not in PLACES:
            yield name, _shown(name, value)


def _shown(name: str, value: str | float) -> str | float:
    """Texts without what is nobody's business; numbers are no secrets: max_tokens."""
    if not isinstance(value, str) or not value:
        return value
    return "(hidden)" if SECRET.search(name) else _LOGIN.sub("(hidden)@", value)


def _losses(log: Log, entries: list[Entry], unit: str) -> Iterator[Best]:
    """From the log; else from what the checkpoints state. The least is of those that are numbers."""
    for names, own in ((logs.LOSS, ("train_loss", "loss")), (logs.VAL, VAL)):
        series = log.first(names)
        points = list(series.points) if series is not None else []
        name = series.name if series is not None else ""
        if not points:
            name = next((n for n in own if any(n in e.metrics for e in entries)), "")
            points = [
                (math.nan if at is None else at, e.metrics[name])
                for e in entries[::-1]
                if name in e.metrics
                for at in [e.count(unit) or e.count("step")]
            ]
        if points:
            numbers = [point for point in points if not math.isnan(point[1])]
            at, least = min(numbers, key=lambda point: point[1], default=(math.nan, math.nan))
            yield Best(name=name, last=points[-1][1], least=least, at=None if math.isnan(at) else at)


def _only(made: list[Experiment], tags: Sequence[str], folder: Location) -> list[Experiment]:
    """Those of these tags, in their order; all where none is named."""
    known = {each.tag: each for each in made}
    lacking = next((tag for tag in tags if tag not in known), None)
    if lacking is not None:
        names = ", ".join(map(escape, list(known)[:12]))
        raise UsageError(
            "run-missing",
            f"there is no run {escape(lacking)}",
            where=folder,
            hint=did_you_mean(lacking, list(known)) or f"the runs are {names}",
        )
    return [known[tag] for tag in dict.fromkeys(tags)] if tags else made
