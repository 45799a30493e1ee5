"""What a client of DeepSpeed saved of its own: keys in the model file, or training_info.json beside it.

    {"global_step": 200, "epoch": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "dataset_size": 4000}

DeepSpeed's own counters say what a client's step counts: updates where both are equal, micro-batches where it
is as many times more as gradients are accumulated. A key that fits neither is named and left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.containers import jsons
from ckpttools.containers.edit import edited, place
from ckpttools.containers.torch_file import TorchFile
from ckpttools.formats.counters import BATCH as BATCH_KEYS
from ckpttools.formats.counters import BATCH_NAMES, DATASET, STEP, TRAIN_LOSS, VAL_LOSS
from ckpttools.formats.deepspeed import kept_batch
from ckpttools.frameworks import parts
from ckpttools.location import Location
from ckpttools.plan import OutputFile, copy_file
from ckpttools.schedules.evidence import Known, What, stated
from ckpttools.schedules.lengths import Unit
from ckpttools.stores.files import is_file, size_of
from ckpttools.training import BatchField, Counter, Edit, Place, Training

INFO = "training_info.json"
OWN = {"global_steps"}  # DeepSpeed's
RANKS = "world_size"
BATCH = "batch_size"  # of a rank or of an update: the number tells
RATES = ("learning_rate", "lr")


def of_model_file(own: Training, file: TorchFile) -> Training | None:
    """A client's keys at the top of DeepSpeed's model file."""
    keys = {*STEP, *DATASET, *BATCH_NAMES, BATCH} - OWN
    values = {key: parts.integer(file, key) for key in keys}
    return _client(own, values, lambda key: place(file, key), "the client's")


def of_bundle(own: Training, root: Location) -> Training | None:
    """training_info.json of a bundle."""
    path = root / INFO
    if not is_file(path):
        return None
    values = jsons.read(path, allow_nan=True)
    losses = {key: values.get(key) for key in (*TRAIN_LOSS, *VAL_LOSS)}
    found = _client(own, values, lambda key: Place(file=path, at=(key,)), f"{INFO}'s")
    said = tuple((key, float(v)) for key, v in losses.items() if isinstance(v, int | float))
    rates = [
        f"{INFO}'s {key} is {values[key]}, that of the save: it is left as it is"
        for key in RATES
        if isinstance(values.get(key), int | float)
    ]
    return replace(found, losses=said, notes=(*found.notes, *rates)) if found is not None else None


def restated(path: Location, name: str, saved: Checkpoint, to: Layout) -> tuple[OutputFile, list[str]]:
    """training_info.json for another number of ranks, at `name` in the output, and what to say of it: the
    settings that the saved ones decide, as ds_config has them in the output.
    """
    new, _ = kept_batch(saved, to)
    moves = {RANKS: (saved.layout.dp_degree, to.dp_degree)}
    for key, what in {**BATCH_NAMES, BATCH: "micro"}.items():
        own = BATCH_KEYS.get(what, "")
        if own in new and what in saved.training.saved_batch:
            moves[key] = saved.training.saved_batch[what], new[own]
    stated = jsons.read(path, allow_nan=True)
    edits = [
        Edit(place=Place(file=path, at=(key,)), old=old, new=value, why="another number of ranks")
        for key, (old, value) in moves.items()
        if stated.get(key) == old
    ]
    if not edits:
        return copy_file(path, name, size_of(path)), []
    said = ", ".join(f"{edit.place.at[0]} {edit.old} -> {edit.new}" for edit in edits)
    return edited(path, name, edits)[0], [f"{INFO}: {said}"]


def _client(
    own: Training, values: Mapping[str, object], at: Callable[[str], Place], whose: str
) -> Training | None:
    numbers = {k: v for k, v in values.items() if isinstance(v, int) and not isinstance(v, bool) and v > 0}
    if not numbers:
        return None
    known, notes = own.batch, list[str]()
    counters = []
    for key in (key for key in STEP if key in numbers and key not in OWN):
        unit = _unit(numbers[key], own.count, known)
        if unit is not None:
            counters.append(Counter(name=key, value=numbers[key], unit=unit, places=(at(key),)))
        elif own.count is not None:
            notes.append(
                f"{whose} {key} is {numbers[key]}, and DeepSpeed counted {own.count} updates: what it counts "
                "is not known, and it is left as it is"
            )
    named = dict(_named(numbers, known))
    if BATCH in numbers and BATCH not in named:
        notes.append(f"{whose} {BATCH} is {numbers[BATCH]}, of what is not known: it is left as it is")
    evidence = [fact for key, what in named.items() for fact in stated(what, numbers[key], f"{whose} {key}")]
    return Training(
        framework="client",
        unit="update",
        evidence=tuple(evidence),
        size=next((numbers[key] for key in DATASET if key in numbers), None),
        counters=tuple(counters),
        batch_fields=tuple(
            BatchField(name=key, which=what, value=numbers[key], places=(at(key),))
            for key, what in named.items()
        ),
        notes=tuple(notes),
    )


def _unit(value: int, updates: int | None, known: Known) -> Unit | None:
    if value == updates:
        return "update"
    steps = known.accumulation
    return "micro" if steps is not None and updates is not None and value // steps == updates else None


def _named(numbers: Mapping[str, int], known: Known) -> Iterator[tuple[str, What]]:
    for key, what in BATCH_NAMES.items():
        if key in numbers:
            yield key, what
    if numbers.get(BATCH) in (known.micro, known.total) and BATCH in numbers:
        yield BATCH, "micro" if numbers[BATCH] == known.micro else "total"
