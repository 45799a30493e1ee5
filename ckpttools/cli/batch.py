"""ckpt batch: effective batch, iterations, updates, what an iteration number means, ways to keep a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpttools.cli import render
from ckpttools.cli.options import JSON, PATH, TAG, number
from ckpttools.errors import CkptError, UsageError
from ckpttools.schedules.batch import Lengths, Meaning, Way, lengths, meaning, ways
from ckpttools.schedules.evidence import Known
from ckpttools.schedules.lengths import Batch, Clock, Data, Steps, check_sizes

if TYPE_CHECKING:
    from ckpttools.training import Training


@click.command("batch")
@click.argument("src", type=PATH, required=False)
@number("--bs", help="Samples per GPU and step.")
@number("--gpus", help="Data-parallel ranks; 1 by default.")
@number("--accum", help="Gradient accumulation; 1 by default.")
@number("--dataset-size", help="Training samples.")
@number("--epochs", help="Epochs of the run.")
@click.option(
    "--drop-last/--keep-last",
    default=None,
    show_default="as SRC says, else dropped",
    help="What happens to an epoch's last, partial batch.",
)
@number("--iteration", help="An iteration number of this run: what it means here and there.")
@number("--new-bs", help="Another batch per GPU to compare with.")
@number("--new-gpus", help="Another number of GPUs.")
@number("--new-accum", help="Another accumulation.")
@TAG
@JSON
def command(
    src: Path | None,
    bs: int | None,
    gpus: int | None,
    accum: int | None,
    dataset_size: int | None,
    epochs: int | None,
    drop_last: bool | None,
    iteration: int | None,
    new_bs: int | None,
    new_gpus: int | None,
    new_accum: int | None,
    tag: str | None,
    as_json: bool,
) -> None:
    """Effective batch = batch per GPU x GPUs x accumulation, and what follows from it.

    With --new-bs, --new-gpus or --new-accum: the same for the new settings, what --iteration means under
    each, and the ways to keep the effective batch. SRC, a training checkpoint, supplies what it knows of
    the batch, the dataset, the epochs and the iteration.
    """
    given = {"--bs": bs, "--gpus": gpus, "--accum": accum, "--dataset-size": dataset_size, "--epochs": epochs}
    given |= {"--new-bs": new_bs, "--new-gpus": new_gpus, "--new-accum": new_accum}
    check_sizes(given)
    if iteration is not None and iteration < 0:
        raise UsageError("bad-usage", f"--iteration {iteration} makes no sense", hint="give 0 or more")
    training = None if src is None else _read(src, tag)
    known = Known(ranks=1, accumulation=1) if training is None else training.batch
    said = {"micro": bs, "ranks": gpus, "accumulation": accum}
    by = {} if training is None else {what: how for what, how in known.by.items() if not said.get(what)}
    bs, gpus, accum = bs or known.micro, gpus or known.ranks, accum or known.accumulation
    if bs is None:
        raise UsageError(
            "batch-unknown",
            "no batch size is given" + (", and SRC does not say one" if src else ""),
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
    runs = [lengths(batch, data, whole) for batch in batches] if counted and data is not None else []
    means = [meaning(iteration, run) for run in runs] if iteration is not None else []
    kept = ways(old, new.micro, new_gpus) if changed and not unknown else []
    shown = _Shown(
        batches=batches,
        runs=runs,
        means=means,
        kept=kept,
        data=data,
        epochs=whole,
        moves=moves if changed else [],
        unknown=unknown,
        by=by,
        notes=known.notes,
    )
    if as_json:
        render.document(_json(shown))
        return
    click.echo("\n".join(_text(shown)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """What is printed: `moves` are counters and where they go under the new batch."""

    batches: list[Batch]
    runs: list[Lengths]
    means: list[Meaning]
    kept: list[Way]
    data: Data | None
    epochs: int | float | None
    moves: list[tuple[str, int, int]]
    unknown: frozenset[str]
    by: Mapping[str, str]  # what in SRC decided each part
    notes: tuple[str, ...]


def _read(src: Path, tag: str | None) -> Training:
    """What a training checkpoint says."""
    from ckpttools import frameworks
    from ckpttools.formats import read
    from ckpttools.operations.source import find

    source = find(src, tag)
    return frameworks.read(source, read(source))


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
    from dataclasses import replace

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


def _text(shown: _Shown) -> Iterator[str]:
    batches, runs, means, kept = shown.batches, shown.runs, shown.means, shown.kept
    data, epochs, unknown = shown.data, shown.epochs, shown.unknown
    rows: list[tuple[object, ...]] = [
        ("batch per GPU", *(b.micro for b in batches)),
        ("GPUs", *("?" if "ranks" in unknown else b.ranks for b in batches)),
        ("accumulation", *("?" if "accumulation" in unknown else b.accumulation for b in batches)),
        ("effective batch", *("?" if unknown else b.total for b in batches)),
    ]
    if runs:
        rows.append(("iterations per epoch", *(run.per_epoch for run in runs)))
    if runs and epochs is not None:
        rows.append((f"iterations in {epochs} epochs", *(run.iterations for run in runs)))
        updates = ("?" if "accumulation" in unknown else run.updates for run in runs)
        rows.append(("optimizer updates", *updates))
    if means:
        rows.append((f"iteration {means[0].iteration} is epoch", *(_two(m.epochs) for m in means)))
        if means[0].share is not None:
            rows.append(("  of the run", *(f"{_two(m.share * 100)} %" for m in means if m.share is not None)))
        rows.append(("  samples seen", *(m.samples for m in means)))
    for name, at, there in shown.moves:
        rows.append((f"the same place: {name}", at, there))
    yield render.table(rows, ("", "now", "new")[: len(batches) + 1])
    if data is not None:
        yield ""
        kept_last = Data(size=data.size, drop_last=not data.drop_last)
        other = [_batches(kept_last, b) for b in batches]
        how = "dropped; kept" if data.drop_last else "kept; dropped"
        yield f"partial last batches are {how}, an epoch has {', '.join(map(str, other))} iterations"
    if kept:
        yield ""
        yield f"ways to an effective batch of {batches[0].total} with {batches[-1].micro} per GPU:"
        yield render.table(
            [(w.batch.ranks, w.batch.accumulation, w.batch.total, _off(w.off), w.changes) for w in kept],
            ("GPUs", "accumulation", "effective", "", "changes"),
        )
    if shown.by:
        names = (("micro", "batch per GPU"), ("ranks", "GPUs"), ("accumulation", "accumulation"))
        yield ""
        yield "from SRC: " + "; ".join(
            f"{name} by {shown.by[what]}" for what, name in names if what in shown.by
        )
    for note in shown.notes:
        yield f"note: {note}"


def _batches(data: Data, batch: Batch) -> int:
    try:
        return data.batches(batch)
    except CkptError:
        return 0


def _two(value: Fraction) -> str:
    return f"{float(value):.2f}"


def _off(off: Fraction) -> str:
    return "exact" if off == 0 else f"{float(off * 100):+.1f} %"


def _json(shown: _Shown) -> dict[str, object]:
    batches, runs, means, kept = shown.batches, shown.runs, shown.means, shown.kept
    data, epochs, unknown = shown.data, shown.epochs, shown.unknown

    def one(i: int) -> dict[str, object]:
        batch = batches[i]
        out: dict[str, object] = {
            "batch_per_gpu": batch.micro,
            "gpus": None if "ranks" in unknown else batch.ranks,
            "accumulation": None if "accumulation" in unknown else batch.accumulation,
            "effective_batch": None if unknown else batch.total,
        }
        if runs:
            out["iterations_per_epoch"] = runs[i].per_epoch
            out["iterations"] = runs[i].iterations
            out["updates"] = None if "accumulation" in unknown else runs[i].updates
        if means:
            share = means[i].share
            out["iteration"] = {
                "number": means[i].iteration,
                "epochs": float(means[i].epochs),
                "share": None if share is None else float(share),
                "samples": means[i].samples,
            }
        for name, *counts in shown.moves:
            out["same_place"] = {"unit": name, "count": counts[i]}
        return out

    names = ("now", "new")
    return {
        "ok": True,
        "dataset_size": None if data is None else data.size,
        "drop_last": None if data is None else data.drop_last,
        "epochs": epochs,
        "from": dict(shown.by),
        **{names[i]: one(i) for i in range(len(batches))},
        "ways": [
            {
                "batch_per_gpu": w.batch.micro,
                "gpus": w.batch.ranks,
                "accumulation": w.batch.accumulation,
                "effective_batch": w.batch.total,
                "off": float(w.off),
                "changes": w.changes,
            }
            for w in kept
        ],
    }
