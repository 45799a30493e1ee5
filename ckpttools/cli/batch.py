"""ckpt batch: effective batch, iterations, updates, what an iteration number means, ways to keep a batch."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import JSON, PATH, TAG, number
from ckpttools.errors import CkptError
from ckpttools.schedules.lengths import Batch, Data

if TYPE_CHECKING:
    from ckpttools.operations.batch import Batches


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
def command(src: Path | None, as_json: bool, **options: Any) -> None:
    """Effective batch = batch per GPU x GPUs x accumulation, and what follows from it.

    With --new-bs, --new-gpus or --new-accum: the same for the new settings, what --iteration means under
    each, and the ways to keep the effective batch. SRC, a training checkpoint, supplies what it knows of
    the batch, the dataset, the epochs and the iteration.
    """
    from ckpttools.operations.batch import batch

    found = batch(src, **options)
    if as_json:
        render.document(_json(found))
    else:
        click.echo("\n".join(_text(found)))


def _text(shown: Batches) -> Iterator[str]:
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


def _json(shown: Batches) -> dict[str, object]:
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
