"""The two runs of a rebase, old and new: their batches, the lengths of their epochs, and how counts map.

What the checkpoint does not say comes from the request; what neither says is found where it must be so,
and refused where two answers are possible.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.errors import CkptError, UsageError
from ckpttools.schedules.evidence import Known
from ckpttools.schedules.lengths import (
    MAX_SIZE,
    Batch,
    Clock,
    Data,
    Remainder,
    Steps,
    Unit,
    check_sizes,
    nearest,
)
from ckpttools.training import Training


class Request(Struct, frozen=True, kw_only=True):
    """What is asked for; None is what the checkpoint says, and for the new run what the old one had."""

    old_bs: int | None = None
    new_bs: int | None = None
    batch_is: Literal["auto", "per-gpu", "global"] = "auto"
    old_accum: int | None = None
    new_accum: int | None = None
    old_gpus: int | None = None
    new_gpus: int | None = None
    unit: Unit | None = None
    schedule_unit: Literal["micro", "update", "epoch"] | None = None
    dataset_size: int | None = None
    steps_per_epoch: int | None = None
    epochs: int | float | None = None
    drop_last: bool = False
    warmup: Literal["scale", "keep"] = "scale"
    lr_scaling: Literal["none", "linear", "sqrt", "adam-sde"] = "none"
    counters_only: bool = False
    again: bool = False  # although the checkpoint was rebased before


class Timeline(Struct, frozen=True, kw_only=True):
    """Old and new batch, and for each unit how its counts map."""

    old: Batch
    new: Batch
    unit: Unit
    steps: dict[Unit, Steps]
    notes: tuple[str, ...]
    unknown: frozenset[str] = frozenset()  # parts of the batch that stand as 1 in both

    def shown(self, batch: Batch) -> Known:
        """One of the two as far as it is known."""
        return Known(
            micro=batch.micro,
            ranks=None if "ranks" in self.unknown else batch.ranks,
            accumulation=None if "accumulation" in self.unknown else batch.accumulation,
            total=None if self.unknown else batch.total,
        )

    @property
    def ratio(self) -> Fraction:
        """New effective batch over the old one."""
        return Fraction(self.new.total, self.old.total)


def timeline(training: Training, request: Request) -> Timeline:
    """Raises UsageError where the batches cannot be told, do not divide, or contradict the checkpoint."""
    _check(request)
    notes: list[str] = []
    old, new, unknown = batches(training, request, notes)
    unit = training.unit
    data, remainder = _data(training, request, old, new, unit, notes)
    proven = training.batches is not None or training.updates is not None
    proven = proven or request.steps_per_epoch is not None
    _check_unknown(training, old, new, unknown, data, proven=proven)
    units: tuple[Unit, ...] = ("micro", "update")
    steps = {each: _steps(training, request, each, (old, new), data, remainder) for each in units}
    if new != old and new.accumulation > 1:
        across = remainder == "running"
        steps["micro"] = replace(steps["micro"], multiple=new.accumulation, across=across)
    return Timeline(
        old=old, new=new, unit=unit, steps=steps, notes=tuple(dict.fromkeys(notes)), unknown=unknown
    )


def _check(request: Request) -> None:
    runs = ("old_bs", "new_bs", "old_accum", "new_accum", "old_gpus", "new_gpus")
    names = (*runs, "dataset_size", "steps_per_epoch", "epochs")
    check_sizes({"--" + name.replace("_", "-"): getattr(request, name) for name in names})


# --- batches ------------------------------------------------------------------------------------------


def batches(training: Training, request: Request, notes: list[str]) -> tuple[Batch, Batch, frozenset[str]]:
    """The old and the new batch, and which of "ranks" and "accumulation" nobody knows.

    Such a part stands as 1 in both batches, which then count all of it in one: it is the same in both runs.
    """
    known = training.batch
    parts = {
        "ranks": request.old_gpus or known.ranks,
        "accumulation": request.old_accum or known.accumulation,
    }
    unknown = frozenset(name for name, value in parts.items() if value is None)
    ranks, accumulation = parts["ranks"] or 1, parts["accumulation"] or 1
    _contradiction("--old-accum", request.old_accum, known.accumulation, notes)
    _contradiction("--old-gpus", request.old_gpus, known.ranks, notes)
    for name, option in (("ranks", "gpus"), ("accumulation", "accum")):
        if name in unknown and getattr(request, f"new_{option}") is not None:
            raise _unknown(name, f"--new-{option} is given, and the old number cannot be compared with it")
    is_global = _is_global(training, request, accumulation * ranks, notes)
    if is_global and unknown and request.batch_is == "auto":
        raise _unknown(min(unknown), "it states the batch of a whole update, and not how that is made")
    old = _old(training, request, accumulation, ranks, is_global=is_global)
    new = Batch(
        micro=old.micro,
        accumulation=request.new_accum or old.accumulation,
        ranks=request.new_gpus or old.ranks,
    )
    if request.new_bs is not None:
        new = _with_size(new, request.new_bs, "--new-bs", is_global=is_global)
    elif is_global and request.new_gpus is not None and request.new_accum is None:
        new = _with_size(new, old.total, "the global batch", is_global=True)
    return old, new, unknown


def _unknown(part: str, why: str) -> UsageError:
    """Where a part of the batch that nobody knows would have to be taken for 1."""
    what, option = {
        "ranks": ("how many GPUs it was trained on", "--old-gpus"),
        "accumulation": ("how many micro-batches an update sums", "--old-accum"),
    }[part]
    return UsageError(
        "batch-unknown", f"the checkpoint does not say {what}", why=why, hint=f"give it with {option} (1 too)"
    )


def _check_unknown(
    training: Training, old: Batch, new: Batch, unknown: frozenset[str], data: Data | None, *, proven: bool
) -> None:
    """Refuse where an unknown part does not cancel out. `proven`: the saved epochs agree with `data`."""
    if old == new:
        return
    units = {c.unit for c in training.counters if c.value + c.offset and c.role in ("position", "inside")}
    if "accumulation" in unknown and len(units) > 1:
        raise _unknown(
            "accumulation", "it counts updates as well as micro-batches, and they move differently"
        )
    if data is not None and not proven:
        for part in sorted(unknown - ({"accumulation"} if training.unit == "micro" else set())):
            raise _unknown(part, "without it the length of an epoch does not follow from the dataset's size")


def _contradiction(option: str, said: int | None, known: int | None, notes: list[str]) -> None:
    if said is not None and known is not None and said != known:
        notes.append(f"{option} {said}, where the checkpoint says {known}: taken as you say")


def _is_global(training: Training, request: Request, parts: int, notes: list[str]) -> bool:
    """Whether the sizes given are of the whole batch of an update, rather than of one rank's step."""
    known = training.batch
    given, micro = request.old_bs, known.micro
    total = known.total or (micro * parts if micro is not None else None)
    if request.batch_is != "auto":
        expected = total if request.batch_is == "global" else micro
        _contradiction(f"--old-bs ({request.batch_is})", given, expected, notes)
        return request.batch_is == "global"
    if given is None:
        return micro is None and total is not None  # the one size that is stated
    if given == micro:
        return False
    if given == total:
        return True
    if micro is None and total is None:
        return False
    raise UsageError(
        "batch-differs",
        f"--old-bs {given} is not the checkpoint's batch: {micro or '?'} per GPU, {total or '?'} in all",
        why="with another old batch every position in the data would be wrong",
        hint="give the batch that the checkpoint was trained with; if what it says is wrong, "
        "add --batch-is per-gpu or --batch-is global",
    )


def _old(training: Training, request: Request, accumulation: int, ranks: int, *, is_global: bool) -> Batch:
    if request.old_bs is not None:
        return _with_size(
            Batch(micro=1, accumulation=accumulation, ranks=ranks),
            request.old_bs,
            "--old-bs",
            is_global=is_global,
        )
    known = training.batch
    if known.micro is not None:
        return Batch(micro=known.micro, accumulation=accumulation, ranks=ranks)
    if known.total is not None:
        whole = Batch(micro=1, accumulation=accumulation, ranks=ranks)
        return _with_size(whole, known.total, "the checkpoint's batch", is_global=True)
    raise UsageError(
        "batch-unknown",
        "the checkpoint does not say with which batch size it was trained",
        why="without it nobody can tell how many samples an iteration stands for",
        hint="give it with --old-bs (per GPU), and --old-gpus and --old-accum where they were not 1",
    )


def _with_size(batch: Batch, size: int, what: str, *, is_global: bool) -> Batch:
    if not is_global:
        return Batch(micro=size, accumulation=batch.accumulation, ranks=batch.ranks)
    micro, rest = divmod(size, batch.ranks * batch.accumulation)
    if rest or not micro:
        fits = [a for a in range(1, 65) if size % (batch.ranks * a) == 0]
        hint = f"accumulations that fit: {', '.join(map(str, fits))}" if fits else "no accumulation fits"
        raise UsageError(
            "batch-indivisible",
            f"{what} {size} does not divide by {batch.ranks} ranks x {batch.accumulation} accumulated",
            why="every rank must get the same number of samples in each step",
            hint=f"{hint} (--old-accum, --new-accum); ckpt batch lists the ways to make a batch",
        )
    return Batch(micro=micro, accumulation=batch.accumulation, ranks=batch.ranks)


# --- epochs -------------------------------------------------------------------------------------------


def _data(
    training: Training, request: Request, old: Batch, new: Batch, unit: Unit, notes: list[str]
) -> tuple[Data | None, Remainder]:
    """The samples of an epoch, None where it is unknown: then everything goes by the ratio of batches."""
    drop = request.drop_last or training.drop_last
    known_batches, known_updates = training.batches, training.updates
    if request.steps_per_epoch is not None:
        if unit == "micro":
            known_batches = request.steps_per_epoch
        else:
            known_updates, known_batches = request.steps_per_epoch, None
    remainder = training.remainder
    if known_batches and known_updates and remainder == "flush":
        fewer, more = known_batches // old.accumulation, -(-known_batches // old.accumulation)
        remainder = "floor" if known_updates == fewer != more else "flush"
    size = request.dataset_size or training.size
    if size is not None:
        if size > MAX_SIZE:
            raise CkptError("counter-wild", f"a dataset of {size} samples", why="no dataset is so large")
        data = Data(size=size, drop_last=drop)
        _agrees(data, old, known_batches, known_updates, remainder)
        return data, remainder
    bounds = _bounds(known_batches, known_updates, old, remainder, drop=drop)
    if bounds is None:
        notes.append(
            "the length of an epoch is not known: positions go by the ratio of the batches, and partial "
            "batches at the ends of epochs are not counted; --dataset-size makes them exact"
        )
        return None, remainder
    low, high = (Data(size=max(1, n), drop_last=drop) for n in bounds)
    needed: list[Unit] = ["micro"] if training.unit == "micro" else ["update"]
    ends = [(Clock.of(new, each, low, remainder), Clock.of(new, each, high, remainder)) for each in needed]
    if any(a.epoch != b.epoch for a, b in ends):
        first, last = ends[0][0].epoch, ends[0][1].epoch
        raise UsageError(
            "dataset-ambiguous",
            f"an epoch has between {bounds[0]} and {bounds[1]} samples, which is {first} to {last} "
            f"{'iterations' if unit == 'micro' else 'updates'} of the new batch",
            why="with the wrong one every epoch would end too early or too late",
            hint="give the number of training samples with --dataset-size",
        )
    if bounds[0] != bounds[1]:
        notes.append(
            f"by the old iterations an epoch has {bounds[0]} to {bounds[1]} samples, which is "
            f"{float(ends[0][0].epoch or 0):g} new ones either way; samples are counted with the larger"
        )
    return high, remainder


def _bounds(
    known_batches: int | None, known_updates: int | None, batch: Batch, remainder: Remainder, *, drop: bool
) -> tuple[int, int] | None:
    """The fewest and the most samples that make an epoch of so many micro-batches or updates."""
    ga = batch.accumulation
    if known_batches is not None:
        fewest = most = known_batches
    elif known_updates is None:
        return None
    elif remainder == "flush":
        fewest, most = (known_updates - 1) * ga + 1, known_updates * ga
    else:
        fewest, most = known_updates * ga, known_updates * ga + ga - 1
    if drop:
        return fewest * batch.step, (most + 1) * batch.step - 1
    return (fewest - 1) * batch.step + 1, most * batch.step


def _agrees(
    data: Data,
    old: Batch,
    known_batches: int | None,
    known_updates: int | None,
    remainder: Remainder,
) -> None:
    """Refuse a dataset size that contradicts what the checkpoint knows of its epochs."""
    made = Clock.of(old, "micro", data, remainder).epoch if remainder != "drop" else None
    updates = Clock.of(old, "update", data, remainder).epoch
    pairs = ((known_batches, made, "micro-batches"), (known_updates, updates, "updates"))
    for known, computed, what in pairs:
        if known is not None and computed is not None and known != computed:
            raise UsageError(
                "dataset-differs",
                f"{data.size} samples at {old} make epochs of {float(computed):g} {what}, "
                f"but the checkpoint's have {known}",
                why="the dataset, the batch or the number of GPUs is not the one that it was trained with",
                hint="check --dataset-size, --old-bs, --old-gpus, --old-accum and --drop-last",
            )


def _whole_run(epochs: float, each: Fraction) -> int:
    """The units of a run; a part of an epoch, which the Trainer alone takes, is rounded up as it does."""
    return int(epochs * each) if isinstance(epochs, int) else math.ceil(epochs * float(each))


def _steps(
    training: Training,
    request: Request,
    each: Unit,
    runs: tuple[Batch, Batch],
    data: Data | None,
    remainder: Remainder,
) -> Steps:
    old, new = (Clock.of(batch, each, data, remainder) for batch in runs)
    unit, epochs = training.unit, request.epochs or training.epochs
    plain = Steps(old=old, new=new)
    if epochs is not None and old.epoch is not None and new.epoch is not None:
        old_total, new_total = _whole_run(epochs, old.epoch), _whole_run(epochs, new.epoch)
        if each != unit or training.total_count in (None, old_total):
            return Steps(old=old, new=new, old_total=old_total, new_total=new_total)
    if each == unit and training.total_count is not None:
        total = training.total_count
        return Steps(old=old, new=new, old_total=total, new_total=max(1, nearest(plain.length(total))))
    return plain
