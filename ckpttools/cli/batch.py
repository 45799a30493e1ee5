"""ckpt batch: effective batch, iterations, updates, what an iteration number means, ways to keep a batch."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import click

from ckpttools.cli import render
from ckpttools.cli.options import JSON, PATH, TAG, number
from ckpttools.errors import CkptError, UsageError
from ckpttools.schedules.batch import Lengths, Meaning, Way, lengths, meaning, ways
from ckpttools.schedules.lengths import Batch, Data, check_sizes


@click.command("batch")
@click.argument("src", type=PATH, required=False)
@number("--bs", help="Samples per GPU and step.")
@number("--gpus", help="Data-parallel ranks; 1 by default.")
@number("--accum", help="Gradient accumulation; 1 by default.")
@number("--dataset-size", help="Training samples.")
@number("--epochs", help="Epochs of the run.")
@click.option(
    "--drop-last/--keep-last",
    default=True,
    show_default=True,
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
    drop_last: bool,
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
    if src is not None:
        known = _known(src, tag)
        bs, gpus, accum = bs or known["bs"], gpus or known["gpus"], accum or known["accum"]
        dataset_size, epochs = dataset_size or known["size"], epochs or known["epochs"]
        iteration = known["iteration"] if iteration is None else iteration
    if bs is None:
        raise UsageError(
            "batch-unknown",
            "no batch size is given" + (", and SRC does not say one" if src else ""),
            hint="ckpt batch --bs 64 --gpus 2 --accum 2 --dataset-size 100000 --epochs 8",
        )
    old = Batch(micro=bs, ranks=gpus or 1, accumulation=accum or 1)
    changed = new_bs is not None or new_gpus is not None or new_accum is not None
    new = Batch(
        micro=new_bs or old.micro, ranks=new_gpus or old.ranks, accumulation=new_accum or old.accumulation
    )
    data = None if dataset_size is None else Data(size=dataset_size, drop_last=drop_last)
    batches = [old, new] if changed else [old]
    runs = [lengths(batch, data, epochs) for batch in batches] if data is not None else []
    means = [meaning(iteration, run) for run in runs] if iteration is not None else []
    kept = ways(old, new.micro, new_gpus) if changed else []
    if as_json:
        render.document(_json(batches, runs, means, kept, data, epochs))
        return
    click.echo("\n".join(_text(batches, runs, means, kept, data, epochs)))


def _known(src: Path, tag: str | None) -> dict[str, int | None]:
    """What a training checkpoint says; its counter in micro-batches per rank."""
    from ckpttools import frameworks as training
    from ckpttools.formats import locate, read

    source = locate(src, tag)
    state = training.read(source, read(source))
    count, known = state.count, state.batch
    if count is not None and state.unit == "update":
        count = None if known.accumulation is None else count * known.accumulation
    return {
        "bs": known.micro,
        "gpus": known.ranks,
        "accum": known.accumulation,
        "size": state.size,
        "epochs": state.epochs,
        "iteration": count,
    }


def _text(
    batches: list[Batch],
    runs: list[Lengths],
    means: list[Meaning],
    kept: list[Way],
    data: Data | None,
    epochs: int | None,
) -> Iterator[str]:
    rows: list[tuple[object, ...]] = [
        ("batch per GPU", *(b.micro for b in batches)),
        ("GPUs", *(b.ranks for b in batches)),
        ("accumulation", *(b.accumulation for b in batches)),
        ("effective batch", *(b.total for b in batches)),
    ]
    if runs:
        rows.append(("iterations per epoch", *(run.per_epoch for run in runs)))
    if runs and epochs is not None:
        rows.append((f"iterations in {epochs} epochs", *(run.iterations for run in runs)))
        rows.append(("optimizer updates", *(run.updates for run in runs)))
    if means:
        rows.append((f"iteration {means[0].iteration} is epoch", *(_two(m.epochs) for m in means)))
        if means[0].share is not None:
            rows.append(("  of the run", *(f"{_two(m.share * 100)} %" for m in means if m.share is not None)))
        rows.append(("  samples seen", *(m.samples for m in means)))
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


def _batches(data: Data, batch: Batch) -> int:
    try:
        return data.batches(batch)
    except CkptError:
        return 0


def _two(value: Fraction) -> str:
    return f"{float(value):.2f}"


def _off(off: Fraction) -> str:
    return "exact" if off == 0 else f"{float(off * 100):+.1f} %"


def _json(
    batches: list[Batch],
    runs: list[Lengths],
    means: list[Meaning],
    kept: list[Way],
    data: Data | None,
    epochs: int | None,
) -> dict[str, object]:
    def one(i: int) -> dict[str, object]:
        batch = batches[i]
        shown: dict[str, object] = {
            "batch_per_gpu": batch.micro,
            "gpus": batch.ranks,
            "accumulation": batch.accumulation,
            "effective_batch": batch.total,
        }
        if runs:
            shown["iterations_per_epoch"] = runs[i].per_epoch
            shown["iterations"], shown["updates"] = runs[i].iterations, runs[i].updates
        if means:
            share = means[i].share
            shown["iteration"] = {
                "number": means[i].iteration,
                "epochs": float(means[i].epochs),
                "share": None if share is None else float(share),
                "samples": means[i].samples,
            }
        return shown

    names = ("now", "new")
    return {
        "ok": True,
        "dataset_size": None if data is None else data.size,
        "drop_last": None if data is None else data.drop_last,
        "epochs": epochs,
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
