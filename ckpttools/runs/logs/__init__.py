"""What a run logged beside its checkpoints: losses and learning rate over its own count, and over samples.

    trainer_state.json       log_history of the newest checkpoint, or of the output folder (the HF Trainer)
    train_log.jsonl          one object per update (ckpt train)
    vis_data/*.json          one object per line (MMEngine's LocalVisBackend)
    metrics.csv              Lightning's CSVLogger
    events.out.tfevents.*    TensorBoard

A run that was resumed from an older point logs the same counts again: what was logged last counts. Of a name
that several files hold, the first of these kinds is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct, field

from ckpttools.errors import CkptError
from ckpttools.location import Location
from ckpttools.runs.logs import events, lines
from ckpttools.runs.logs.record import Record
from ckpttools.siblings import is_ours
from ckpttools.stores.files import is_file, is_link, stat, walk

LOSS = ("loss", "train_loss", "train/loss", "Loss/train", "loss/train", "train_loss_step", "train_loss_epoch")
VAL = (
    "val_loss",
    "eval_loss",
    "eval/loss",
    "val/loss",
    "Loss/val",
    "loss/val",
    "validation_loss",
    "valid_loss",
)
RATE = ("learning_rate", "lr", "train/learning_rate", "base_lr", "train/lr", "meta_data/learning_rate")
MAX_FILES = 200
_SKIPPED = frozenset(("node_modules", ".git", "__pycache__", "wandb"))


class Series(Struct, frozen=True, kw_only=True):
    """Values over the run's own count, in order. `samples` are those seen at each, where the log says so."""

    name: str
    points: tuple[tuple[float, float], ...]
    samples: tuple[tuple[float, float], ...] = ()
    source: Location


class Log(Struct, frozen=True, kw_only=True):
    """Everything that was logged, by name; `notes` say what could not be read. `seconds` is how long logging
    went on, None where no log has times."""

    series: Mapping[str, Series] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float | None = None

    def first(self, names: Iterable[str]) -> Series | None:
        """The series that goes by one of these names."""
        return next((self.series[name] for name in names if name in self.series), None)


STATE = "trainer_state.json"  # the HF Trainer's, which lies in each checkpoint, too


def read(home: Location, others: Iterable[Location] = (), states: Iterable[Location] = ()) -> Log:
    """What lies below a run's home, but not in `others`, which are its checkpoints and other runs. `states`
    are trainer_state.json files, the newest last."""
    found: dict[str, Series] = {}
    notes: list[str] = []
    spans: list[tuple[float, float]] = []
    for kind, paths in _files(home, frozenset(others), list(states)):
        made: dict[str, Series] = {}
        for path in paths:
            try:
                records = list(_READERS[kind](path))
            except (CkptError, OSError, ValueError) as error:
                said = error.message if isinstance(error, CkptError) else str(error)
                notes.append(f"{path.name} is not read: {said}")
                continue
            for name, series in _series(records, path).items():
                made[name] = _joined(made[name], series) if name in made else series
            times = [record.time for record in records if record.time is not None]
            if times:
                spans.append((min(times), max(times)))
        found = {**made, **found}  # of a name in files of several kinds the first kind's is taken
    return Log(series=found, notes=tuple(notes), seconds=_covered(spans) if spans else None)


def _covered(spans: list[tuple[float, float]]) -> float:
    """How long at least one of the files was written: a run may write several at once."""
    total, until = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, until))
        until = max(until, last)
    return total


_READERS = {
    "trainer_state": lines.trainer_state,
    "jsonl": lines.json_lines,
    "vis_data": lines.json_lines,
    "csv": lines.csv_rows,
    "events": events.scalars,
}


def _files(
    home: Location, others: frozenset[Location], states: list[Location]
) -> Iterator[tuple[str, list[Location]]]:
    """The log files by kind, each kind's in the order in which they were written."""
    found: dict[str, list[Location]] = {kind: [] for kind in _READERS}
    count = 0
    names = {each.name for each in others}
    for path, entry in walk(home, into=lambda name: name not in _SKIPPED | names and not is_ours(name)):
        kind = _kind(path.parent, entry.name)
        if kind is not None and count < MAX_FILES and is_file(entry) and not is_link(entry):
            found[kind].append(path)
            count += 1
    found["trainer_state"] += states
    for kind, paths in found.items():
        paths.sort(key=lambda path: (stat(path).mtime_ns, path.name))
        yield kind, paths[-1:] if kind == "trainer_state" else paths


def _kind(folder: Location, name: str) -> str | None:
    if name == STATE:
        return "trainer_state"
    if name.endswith(".jsonl") and "log" in name:
        return "jsonl"
    if folder.name == "vis_data" and name.endswith(".json"):
        return "vis_data"
    if name == "metrics.csv":
        return "csv"
    return "events" if ".tfevents." in name else None


def _series(records: Iterable[Record], source: Location) -> dict[str, Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    samples: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.values.items():
            _put(points.setdefault(name, []), record.count, value)
            if record.samples is not None:
                _put(samples.setdefault(name, []), record.samples, value)
    return {
        name: Series(name=name, points=tuple(own), samples=tuple(samples.get(name, ())), source=source)
        for name, own in points.items()
    }


def _put(points: list[tuple[float, float]], at: float, value: float) -> None:
    while points and points[-1][0] >= at:  # the run went back to an older checkpoint
        points.pop()
    points.append((at, value))


def _joined(first: Series, second: Series) -> Series:
    points, samples = list(first.points), list(first.samples)
    for own, new in ((points, second.points), (samples, second.samples)):
        for at, value in new:
            _put(own, at, value)
    return Series(name=first.name, points=tuple(points), samples=tuple(samples), source=second.source)
