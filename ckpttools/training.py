"""Where a checkpoint says how far training is: counters, schedules, optimizer settings, batch sizes.

A container (a ZeRO folder, a Trainer's folder, a single file ...) is read into a `Training`: plain values,
each with the places that hold it. What is to change comes back as `Edit`s on those places. So the reader
knows no mathematics of schedules, and `transforms.rebase` knows no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from ckpttools.errors import escape
from ckpttools.location import Location
from ckpttools.schedules.evidence import Fact, Known, What, known, of_counters, of_samples, stated
from ckpttools.schedules.lengths import Remainder, Unit
from ckpttools.tree import Key, Value


class Place(Struct, frozen=True, kw_only=True):
    """A value inside a file: the keys and indices that lead to it from the file's root."""

    file: Location
    at: tuple[Key, ...]

    def below(self, *at: Key) -> Place:
        return Place(file=self.file, at=(*self.at, *at))

    def __str__(self) -> str:
        shown = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.at)
        return shown.removeprefix(".")


class Edit(Struct, frozen=True, kw_only=True):
    """One value of one file that becomes another; `why` is shown to people.

    An `old` of `ABSENT` means that the key is new.
    """

    place: Place
    old: object
    new: object
    why: str


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def equal(old: object, new: object) -> bool:
    """Whether two plain values are the same; NaN is the same as NaN."""
    both_nan = isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new)
    return old is new or old == new or both_nan


# position: units done in all; inside: units done in the running epoch; total: units of the whole run;
# warmup: its warmup; samples: nominal samples, counted as the batch size per update; skipped: updates that
# overflowed, which a scheduler does not count
Role = Literal["position", "inside", "total", "warmup", "samples", "skipped"]


class Counter(Struct, frozen=True, kw_only=True):
    """A whole number that counts micro-batches or updates. It counts `value + offset` of them.

    One that `config` names is a setting of the new run, to be made there by hand; `places` hold copies.
    `repeats` is how often each unit is counted (Lightning adds up the updates of several optimizers).
    """

    name: str
    value: int
    unit: Unit
    places: tuple[Place, ...]
    role: Role = "position"
    offset: int = 0
    repeats: int = 1
    config: str | None = None


class Held(Struct, frozen=True, kw_only=True):
    """What a torch optimizer keeps, as its file has it: the numbers of each group's parameters, and for a
    number what is kept, by its dotted name.
    """

    params: tuple[tuple[Key, ...], ...] = ()
    state: Mapping[Key, Mapping[str, Value]] = field(default_factory=dict)


class OptimizerSettings(Struct, frozen=True, kw_only=True, eq=False):
    """The param_groups of one optimizer, without tensors and `params`, and every place that holds them.

    A rank of ZeRO restores its own copy, so each shard is a place. `base` holds settings that a framework
    treats as one group more (MMEngine's base_param_settings).
    """

    name: str
    groups: tuple[Mapping[str, object], ...]
    places: tuple[Place, ...]
    base: Place | None = None
    base_group: Mapping[str, object] | None = None
    # reads the updates that the optimizer itself has counted: tensors, of no use to a listing
    counts: Callable[[], list[int | float]] = list
    # reads what it keeps, where its parameters may have no names
    held: Callable[[], Held] = Held
    first_update: bool = True  # whether the saved lr is the one of the first resumed update

    def _said(self) -> tuple[object, ...]:
        """All but how to read more."""
        return self.name, self.groups, self.places, self.base, self.base_group, self.first_update

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OptimizerSettings) and self._said() == other._said()

    __hash__ = None  # type: ignore[assignment]  # groups are mappings

    def __repr__(self) -> str:
        return f"OptimizerSettings{self._said()}"

    @property
    def steps(self) -> int | None:
        """The updates that Adam counted; None where it does not say. Raises CkptError."""
        whole = (n for n in self.counts() if isinstance(n, int) or n.is_integer())
        return max((int(n) for n in whole if n >= 0), default=None)


def first_of(optimizers: Sequence[OptimizerSettings]) -> str:
    """Whose settings are shown where there are several optimizers; "" where there is one."""
    if len(optimizers) < 2:
        return ""
    return f"of {escape(optimizers[0].name)}, the first of {len(optimizers)} optimizers"


class SavedSchedule(Struct, frozen=True, kw_only=True):
    """Scheduler states that act on one optimizer, in the order in which they are stepped.

    `framework` says how to read them (`schedules.recognise`). `unit` is None where neither the framework
    nor the state says what one step of the schedule is. `about` is what else the framework's own
    mathematics needs; `config_places` hold the constants when these are saved apart from the state.
    """

    name: str
    framework: str
    states: tuple[Mapping[str, object], ...]
    places: tuple[Place, ...]
    optimizer: int = 0
    unit: Unit | None = None
    repeats: int = 1
    about: Mapping[str, object] = field(default_factory=dict)
    config_places: tuple[Place, ...] = ()


class BatchField(Struct, frozen=True, kw_only=True):
    """A saved batch setting."""

    name: str
    which: What
    value: int
    places: tuple[Place, ...]


class StepList(Struct, frozen=True, kw_only=True):
    """Step numbers of the past that must stay in order with the new ones: a log's history."""

    name: str
    values: tuple[int, ...]
    places: tuple[Place, ...]
    unit: Unit


class Best(Struct, frozen=True, kw_only=True):
    """What a framework calls its best checkpoint so far by a metric: the path, as it was on the machine that
    trained. `score` is the metric there, `less` whether less of it is better; None where that is not said."""

    metric: str
    path: str
    score: float | None = None
    less: bool | None = None


class Training(Struct, frozen=True, kw_only=True):
    """All of that for one checkpoint. Numbers are None where the checkpoint does not say.

    A format fills what stands in its own files under the usual names, `step` to `keys`; the framework that
    saved the checkpoint adds what that means. `unit` is what its main counter counts; `evidence` is all that
    speaks of the batch. `size` counts the samples of an epoch, `batches` its micro-batches per rank,
    `updates` its optimizer updates; `epochs` is the length of the run.
    """

    step: int | None = None  # optimizer steps
    iteration: int | None = None  # the framework's own iteration count where it differs from `step`
    epoch: int | float | None = None
    samples: int | None = None
    skipped_steps: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    scheduler: Value = field(default_factory=dict)  # its state as saved, a list where there are several
    saved_batch: Mapping[str, int] = field(default_factory=dict)  # global, micro, accumulation, as saved
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # field -> where it was found
    framework: str = ""  # "" as long as none has read it
    unit: Unit = "update"
    count: int | None = None
    epochs_done: int | None = None  # whole ones
    endless: bool = False  # its loop may know no epochs: a 0 that is saved as one says nothing
    evidence: tuple[Fact, ...] = ()
    size: int | None = None
    batches: int | None = None
    updates: int | None = None
    epochs: int | float | None = None
    total_count: int | None = None
    inside: int | None = None  # samples of the running epoch, where the run finds its place by them
    remainder: Remainder = "flush"
    drop_last: bool = False
    counters: tuple[Counter, ...] = ()
    optimizers: tuple[OptimizerSettings, ...] = ()
    schedules: tuple[SavedSchedule, ...] = ()
    batch_fields: tuple[BatchField, ...] = ()
    follows: bool = False  # the schedule is a function of the counter, and not saved
    # settings of the run's length from which a schedule is made anew: their names, what they count, values
    lengths: tuple[tuple[str, Literal["epochs", "steps"], int | float | None], ...] = ()
    scheduled: bool = False  # whether the configuration names a schedule
    histories: tuple[StepList, ...] = ()
    losses: tuple[tuple[str, float], ...] = ()  # the last of each, by the name that it was logged under
    best: tuple[Best, ...] = ()
    configuration: Mapping[str, object] = field(default_factory=dict)  # that the run was started with
    marker: Place | None = None  # where a rebase is noted; its value in `marked`
    marked: Mapping[str, object] | None = None
    # what the new run's configuration calls the parts of its batch: part, setting, whose
    batch_names: tuple[tuple[What, str, str], ...] = ()
    outside: tuple[str, ...] = ()  # what the user must set in the new run, in words
    stays: tuple[str, ...] = ()  # what speaks of the old run in every copy that is written
    notes: tuple[str, ...] = ()

    def over(self, stated: Training) -> Training:
        """With what a format found, where the framework does not say: the main counter decides."""
        own = {name: getattr(self, name) for name in _STATED}
        both = {name: getattr(stated, name) if own[name] in (None, {}) else own[name] for name in _STATED}
        if both["epoch"] is None or (self.endless and not both["epoch"]):
            both["epoch"] = self.epochs_done
        if self.count is not None and self.unit == "update":
            both["step"] = self.count
        elif self.count is not None:
            alone = both["keys"].get("step") == both["keys"].get("iteration")  # one key, taken for both
            both |= {"iteration": self.count, "step": self.count if alone and both["step"] else both["step"]}
        return replace(self, **both)

    @property
    def brief(self) -> Training:
        """What a list of many shows of each, and nothing else."""
        kept = (*_STATED, "framework", "losses", "best")
        return Training(**{name: getattr(self, name) for name in kept})

    @property
    def stated(self) -> dict[str, Value]:
        """What files have keys of their own for, by field, in the order in which it is written."""
        names = (
            "scheduler",
            "epoch",
            "step",
            "iteration",
            "samples",
            "skipped_steps",
            "train_loss",
            "val_loss",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def batch(self) -> Known:
        """The batch that all evidence makes, the counters' included."""
        counted = _counted(self.counters, self.remainder)
        return known((*self._noted(), *self.evidence, *counted))

    @property
    def is_rebased(self) -> bool:
        """Whether the noted rebase made this very checkpoint.

        Training code that saves the keys it loaded carries the note on, but its runs count further.
        """
        return self.marked is not None and self.marked.get("count") == self.count

    def _noted(self) -> Iterator[Fact]:
        """The batch that a rebase was for: a configuration that is saved as text still names the old one."""
        noted = self.marked.get("to") if self.is_rebased and self.marked is not None else None
        names: dict[str, What] = {"micro": "micro", "gpus": "ranks", "accumulation": "accumulation"}
        batch: Mapping[str, object] = noted if isinstance(noted, Mapping) else {}
        for key, what in names.items():
            value = batch.get(key)
            yield from stated(what, value if isinstance(value, int) else None, "the rebase that made it")


def noted_arguments(marked: Mapping[str, object] | None, count: int | None) -> dict[str, object]:
    """The arguments of the new run as the rebase notes them that made this very checkpoint."""
    found = marked.get("arguments") if marked is not None and marked.get("count") == count else None
    return {str(key): value for key, value in found.items()} if isinstance(found, Mapping) else {}


# the fields that a format fills
_STATED = (
    *("step", "iteration", "epoch", "samples", "skipped_steps"),
    *("train_loss", "val_loss", "scheduler", "saved_batch", "keys"),
)


def _counted(counters: tuple[Counter, ...], remainder: Remainder) -> Iterator[Fact]:
    """What counters of different things say of each other."""

    def first(role: Role, unit: Unit) -> int | None:
        values = ((c.value + c.offset) // c.repeats for c in counters if c.role == role and c.unit == unit)
        return next(values, None)

    iterations, updates = first("position", "micro"), first("position", "update")
    if remainder == "running" and iterations is not None and updates is not None:
        yield from of_counters(iterations, updates)
    yield from of_samples(first("samples", "update"), updates)


def merge(first: Training, *others: Training) -> Training:
    """One description out of several of the same checkpoint.

    The first part that knows a number counts, tuples are joined; what cannot be unknown is the first's.
    """
    found: dict[str, Any] = {}
    for name in Training.__struct_fields__:
        values = [getattr(part, name) for part in (first, *others)]
        if isinstance(values[0], tuple):
            found[name] = tuple(item for each in values for item in each)
        else:
            found[name] = next((value for value in values if value is not None), None)
    own = ("framework", "unit", "remainder", "drop_last", "configuration", "scheduled", "follows", "endless")
    kept = {name: getattr(first, name) for name in own}
    if first.batch_names:  # whoever drives DeepSpeed configures it
        kept["batch_names"] = first.batch_names
    return replace(first, **(found | kept))
