"""What a batch makes of a run: iterations, updates, what an iteration number means; the same for another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.errors import UsageError
from ckpttools.location import Location
from ckpttools.schedules.batch import Lengths, Meaning, Way, lengths, meaning, ways
from ckpttools.schedules.evidence import Known
from ckpttools.schedules.lengths import Batch, Clock, Data, Steps, check_sizes

if TYPE_CHECKING:
    from ckpttools.training import Training


class Batches(Struct, frozen=True, kw_only=True):
    """The batch, and the new one where one was asked for; `runs` and `means` of each, where they are known.

    `moves` are counters and where they go under the new batch; `unknown` which of ranks, accumulation and
    total the batch does not say; `by` what in the checkpoint decided each part.
    """

    batches: list[Batch]
    runs: list[Lengths]
    means: list[Meaning]
    kept: list[Way]
    data: Data | None
    epochs: int | float | None
    moves: list[tuple[str, int, int]]
    unknown: frozenset[str]
    by: Mapping[str, str]
    notes: tuple[str, ...]


def batch(
    src: Location | None = None,
    *,
    tag: str | None = None,
    bs: int | None = None,
    gpus: int | None = None,
    accum: int | None = None,
    dataset_size: int | None = None,
    epochs: int | None = None,
    drop_last: bool | None = None,
    iteration: int | None = None,
    new_bs: int | None = None,
    new_gpus: int | None = None,
    new_accum: int | None = None,
) -> Batches:
    """`src`, a training checkpoint, supplies what it knows of what is not given.

    Raises UsageError where no batch size is known, or a number makes no sense.
    """
    given = {"--bs": bs, "--gpus": gpus, "--accum": accum, "--dataset-size": dataset_size, "--epochs": epochs}
    given |= {"--new-bs": new_bs, "--new-gpus": new_gpus, "--new-accum": new_accum}
    check_sizes(given)
    if iteration is not None and iteration < 0:
        raise UsageError(
            "bad-usage",
            f"--iteration {iteration} makes no sense",
            where="--iteration",
            why="iterations are counted from 0",
            hint="give 0 or more",
        )
    training, dangers = (None, ()) if src is None else _read(src, tag)
    known = Known(ranks=1, accumulation=1) if training is None else training.batch
    said = {"micro": bs, "ranks": gpus, "accumulation": accum}
    by = {} if training is None else {what: how for what, how in known.by.items() if not said.get(what)}
    bs, gpus, accum = bs or known.micro, gpus or known.ranks, accum or known.accumulation
    if bs is None:
        raise UsageError(
            "batch-unknown",
            "no batch size is given" + (", and SRC does not say one" if src else ""),
            where="--bs" if src is None else str(src),
            why="all else is computed from the samples that one GPU takes in one step",
            hint="ckpt batch --bs 64 --gpus 2 --accum 2 --dataset-size 100000 --epochs 8",
        )
    unknown = frozenset(n for n, value in (("ranks", gpus), ("accumulation", accum)) if value is None)
    if training is not None and known.total is None and not any(said.values()):
        unknown |= {"total"}  # what SRC says contradicts itself
    old = Batch(micro=bs, ranks=gpus or 1, accumulation=accum or 1)
    changed = new_bs is not None or new_gpus is not None or new_accum is not None
    new = Batch(
        micro=new_bs or old.micro, ranks=new_gpus or old.ranks, accumulation=new_accum or old.accumulation
    )
    moves: list[tuple[str, int, int]] = []
    whole: int | float | None = epochs
    if training is not None:
        training = _as_counted(training, accum)
        dataset_size, whole = dataset_size or training.size, epochs or training.epochs
        drop_last = training.drop_last if drop_last is None else drop_last
        iteration = _iteration(training, accum) if iteration is None else iteration
        moves = _moves(training, old, new, unknown, dataset_size, whole, drop_last=drop_last)
    drop_last = True if drop_last is None else drop_last
    data = None if dataset_size is None else Data(size=dataset_size, drop_last=drop_last)
    if training is None and changed and iteration is not None:
        clocks = (Clock.of(each, "micro", data) for each in (old, new))
        steps = Steps(old=next(clocks), new=next(clocks), multiple=new.accumulation)
        moves = [("iteration", iteration, steps.position(iteration))]
    batches = [old, new] if changed else [old]
    counted = data is not None and "ranks" not in unknown
    flush = training is not None and training.remainder == "flush"
    runs = [lengths(each, data, whole, flush=flush) for each in batches] if counted and data else []
    means = [meaning(iteration, run) for run in runs] if iteration is not None else []
    kept = ways(old, new.micro, new_gpus) if changed and not unknown else []
    return Batches(
        batches=batches,
        runs=runs,
        means=means,
        kept=kept,
        data=data,
        epochs=whole,
        moves=moves if changed else [],
        unknown=unknown,
        by=by,
        notes=(*dangers, *known.notes),
    )


def _read(src: Location, tag: str | None) -> tuple[Training, tuple[str, ...]]:
    """What a training checkpoint says, and what loading its files would run."""
    from ckpttools import frameworks
    from ckpttools.formats import read
    from ckpttools.operations.dangers import dangers, warning
    from ckpttools.operations.source import find

    source = find(src, tag)
    checkpoint = read(source)
    said = tuple(warning(*danger) for danger in dangers(source, checkpoint))
    return frameworks.read(source, checkpoint), said


def _as_counted(training: Training, accumulation: int | None) -> Training:
    """With the unit of its counter that a rebase takes it to have."""
    from ckpttools.transforms.rebase.counters import with_unit

    return with_unit(training, None, accumulation)


def _iteration(training: Training, accumulation: int | None) -> int | None:
    """Its counter in micro-batches per rank; an epoch's last update may be made of fewer."""
    if training.unit == "micro" or training.count is None:
        return training.count
    if accumulation is None:
        return None
    batches = training.batches
    if batches is None or training.remainder != "flush" or accumulation != training.batch.accumulation:
        return training.count * accumulation
    epochs, rest = divmod(training.count, -(-batches // accumulation))
    return epochs * batches + min(rest * accumulation, batches)


def _moves(
    training: Training,
    old: Batch,
    new: Batch,
    unknown: frozenset[str],
    size: int | None,
    epochs: int | float | None,
    *,
    drop_last: bool | None,
) -> list[tuple[str, int, int]]:
    """Where the checkpoint's counter goes, as a rebase moves it; nothing where that cannot be told."""
    from ckpttools.transforms.rebase.timeline import Request, timeline

    if training.count is None:
        return []
    ranks, accumulation = "ranks" not in unknown, "accumulation" not in unknown
    request = Request(
        old_bs=old.micro,
        new_bs=new.micro,
        batch_is="per-gpu",
        old_gpus=old.ranks if ranks else None,
        new_gpus=new.ranks if ranks else None,
        old_accum=old.accumulation if accumulation else None,
        new_accum=new.accumulation if accumulation else None,
        dataset_size=size,
        epochs=epochs,
    )
    kind = training if drop_last is None else replace(training, drop_last=drop_last)
    try:
        steps = timeline(kind, request).steps[training.unit]
    except UsageError:
        return []
    name = "iteration" if training.unit == "micro" else "update"
    return [(name, training.count, steps.position(training.count))]
