"""Logs of text: the Trainer's state, JSON lines, CSV. Each gives its entries in the order of the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping

from ckpttools.containers import jsons
from ckpttools.errors import CkptError
from ckpttools.location import Location
from ckpttools.runs.logs.record import Record
from ckpttools.stores.files import opened

MAX_BYTES = 200 << 20
COUNTS = ("step", "iteration", "global_step")
SAMPLES = ("samples_seen", "samples", "consumed_samples")
_NO_VALUES = {*COUNTS, *SAMPLES, "iter", "epoch"}


def trainer_state(path: Location) -> Iterator[Record]:
    """The HF Trainer's log_history: updates."""
    history = jsons.read(path, allow_nan=True).get("log_history")
    yield from _records(entry for entry in (history if isinstance(history, list) else ()))


def json_lines(path: Location) -> Iterator[Record]:
    """One object per line; a torn last line, as a killed run leaves it, ends the log.

    MMEngine states no iteration with a validation, and as its step the epoch: it stands at the last one.
    """
    yield from _records(_objects(_text(path)))


def csv_rows(path: Location) -> Iterator[Record]:
    """Lightning's CSVLogger: a column for each name, most of them empty in each row."""
    yield from _records(csv.DictReader(io.StringIO(_text(path))))


def _records(entries: Iterator[object] | csv.DictReader[str]) -> Iterator[Record]:
    iteration: float | None = None
    for entry in entries:
        if not isinstance(entry, Mapping):
            continue
        numbers = {str(key): n for key, value in entry.items() if (n := _number(value)) is not None}
        iteration = numbers.get("iter", iteration)
        own = next((numbers[key] for key in COUNTS if key in numbers), None)
        count = iteration if iteration is not None else own
        if count is None:
            continue
        values = {key: n for key, n in numbers.items() if key not in _NO_VALUES}
        samples = next((numbers[key] for key in SAMPLES if key in numbers), None)
        if values:
            yield Record(count=count, values=values, samples=samples)


def _objects(text: str) -> Iterator[object]:
    for line in text.splitlines():
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                return


def _number(value: object) -> float | None:
    if isinstance(value, str):
        try:
            return float(value) if value.strip() else None
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 or value != value else None


def _text(path: Location) -> str:
    with opened(path) as file:
        if file.size > MAX_BYTES:
            raise CkptError(
                "text-too-long",
                f"a log of {file.size} bytes",
                where=path,
                why="a log is read whole into memory",
            )
        return file.head(MAX_BYTES).decode("utf-8", errors="replace")
