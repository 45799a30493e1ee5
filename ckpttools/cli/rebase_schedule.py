"""ckpt rebase-schedule: go on at the same sample with another batch size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import DST, SRC, how, number, writing
from ckpttools.errors import UsageError, escape
from ckpttools.location import Location, below

if TYPE_CHECKING:
    from ckpttools.schedules.evidence import Known
    from ckpttools.training import Edit
    from ckpttools.transforms.rebase import Rebased


@click.command("rebase-schedule")
@SRC
@DST
@number("--old-bs", help="The batch size that SRC was trained with; read from it where it says.")
@number("--new-bs", help="The batch size to go on with.")
@click.option(
    "--batch-is",
    type=click.Choice(["auto", "per-gpu", "global"]),
    default="auto",
    show_default=True,
    help="What the sizes count: samples per GPU and step, or of a whole update. auto: what matches SRC, "
    "else per-gpu.",
)
@number("--old-accum", help="Gradient accumulation of SRC; read from it, else 1.")
@number("--new-accum", help="The new gradient accumulation; the old one by default.")
@number("--old-gpus", help="Data-parallel ranks of SRC; read from it, else 1.")
@number("--new-gpus", help="The new number of ranks; the old one by default.")
@click.option(
    "--unit",
    type=click.Choice(["micro", "update"]),
    help="What SRC's main counter counts: micro-batches or optimizer updates; by the framework.",
)
@click.option(
    "--schedule-unit",
    type=click.Choice(["micro", "update", "epoch"]),
    help="What one step of the schedule is, where neither SRC nor its framework says.",
)
@number("--dataset-size", help="Training samples; found from SRC's counters where they tell.")
@number("--steps-per-epoch", help="Iterations of an old epoch, in SRC's own unit.")
@number("--epochs", help="Epochs of the whole run, where SRC does not say.")
@click.option("--drop-last", is_flag=True, help="The loader drops an epoch's last, partial batch.")
@click.option(
    "--warmup",
    type=click.Choice(["scale", "keep"]),
    default="scale",
    show_default=True,
    help="A warmup given in iterations: the same samples, or the same number of iterations.",
)
@click.option(
    "--lr-scaling",
    type=click.Choice(["none", "linear", "sqrt", "adam-sde"]),
    default="none",
    show_default=True,
    help="Change the learning rate's scale with the batch.",
)
@click.option(
    "--counters-only", is_flag=True, help="No schedule is saved, or leave it alone: move the counters only."
)
@click.option("--again", is_flag=True, help="Rebase what a rebase made: another change on top of it.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg",
    help="Draw the learning rate over samples: before, after, and without a rebase. .png, .pdf: matplotlib.",
)
@writing
def command(src: Path, dst: Location | None, plot: Path | None, tag: str | None, **options: Any) -> None:
    """Change the batch size of a training checkpoint: counters, schedule and learning rate follow.

    Training goes on at the same place in the data with the learning rate that a run at the new batch size
    has there. Works on ZeRO folders, HF Trainer, Lightning, accelerate, MMEngine, OpenPCDet and plain .pt
    checkpoints. SRC is never changed; DST is by default bsN-of-SRC beside it. --dry-run shows every value,
    old and new.
    """
    from ckpttools.operations.rebase import prepare
    from ckpttools.operations.rebase import write as write_rebased
    from ckpttools.transforms.rebase import Request

    asked = {name: options.pop(name) for name in Request.__struct_fields__ if name in options}
    if plot is not None:
        _check_plot(plot, src)
    ready = prepare(src, dst, Request(**asked), tag)
    result, quiet = ready.rebased, options["quiet"]
    if not options["as_json"] and not quiet:
        click.echo("\n".join(_text(result, ready.source.root)), err=not options["dry_run"])
    if plot is not None and options["dry_run"]:
        render.say("note: a dry run draws no plot", quiet=quiet)
    elif plot is not None:
        _draw(result, plot)
    done = write_rebased(ready, src, how(options))
    render.written(done, options, _json(result, ready.source.root))


# --- text and JSON ------------------------------------------------------------------------------------


def _text(result: Rebased, root: Location) -> Iterator[str]:
    line = result.timeline
    unit = "micro-batch" if line.unit == "micro" else "update"
    yield f"batch     {line.shown(line.old)}  ->  {line.shown(line.new)}"
    if result.old_count is not None and result.samples is not None:
        old, new = result.samples
        again = f", {old - new:,.0f} of them seen again" if old > new and not result.ahead else ""
        yield (
            f"position  {unit} {result.old_count}  ->  {result.new_count}, after {old:,.0f} samples{again}"
        )
    if result.families:
        yield f"schedule  {', '.join(map(escape, result.families))}"
    if result.lr is not None:
        yield f"next lr   {result.lr[0]!r}  ->  {result.lr[1]!r}"
    yield ""
    if result.is_identity:
        same = line.old == line.new
        yield "nothing changes: " + ("the batch is the same" if same else "nothing here counts iterations")
    else:
        yield render.table(_rows(result, root), ("what", "field", "old", "new", "in"))
    if result.settings or result.outside:
        yield ""
        yield "set in the new run, which no checkpoint carries:"
        for setting in result.settings:
            was = "as before" if setting.new == setting.old else f"was {setting.old}"
            yield f"  {escape(setting.where)}: {escape(setting.name)} = {setting.new} ({was})"
        for text in result.outside:
            yield f"  {text}"
    yield ""
    yield from render.notes_text(result.notes)


def _rows(result: Rebased, root: Location) -> Iterator[tuple[object, ...]]:
    """One row per field and change: shards that hold copies of it share a row, and so does a log."""
    rows: dict[tuple[str, str, str, str], list[Edit]] = {}
    for edit in result.edits:
        if edit.why == "marker":
            continue
        field = "log_history[].step" if edit.why == "log" else str(edit.place)
        values = ("...", "...") if edit.why == "log" else (_short(edit.old), _short(edit.new))
        rows.setdefault((edit.why, field, *values), []).append(edit)
    for (why, field, old, new), edits in rows.items():
        files = list(dict.fromkeys(edit.place.file for edit in edits))
        where = below(files[0], root) if files[0] != root else root.name
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        if why == "log":
            old, new = f"{len(edits)} steps", "in proportion"
        yield why, field, old, new, where + more


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json(result: Rebased, root: Location) -> dict[str, object]:
    line = result.timeline

    def batch(of: Known) -> dict[str, int | None]:
        return {"micro": of.micro, "gpus": of.ranks, "accumulation": of.accumulation, "total": of.total}

    return {
        "batch": {"old": batch(line.shown(line.old)), "new": batch(line.shown(line.new))},
        "unit": line.unit,
        "position": {"old": result.old_count, "new": result.new_count},
        "samples": None if result.samples is None else {"old": result.samples[0], "new": result.samples[1]},
        "schedule": list(result.families),
        "next_lr": None if result.lr is None else {"old": result.lr[0], "new": result.lr[1]},
        "changes": [
            {
                "file": below(edit.place.file, root) if edit.place.file != root else root.name,
                "field": str(edit.place),
                "old": None if edit.why == "marker" else edit.old,
                "new": edit.new,
                "kind": edit.why,
            }
            for edit in result.edits
        ],
        "settings": [{"where": s.where, "name": s.name, "old": s.old, "new": s.new} for s in result.settings],
        "outside": list(result.outside),
        "rebase_notes": list(result.notes),
    }


# --- the plot -----------------------------------------------------------------------------------------


def _check_plot(plot: Path, src: Path) -> None:
    """Find out before anything is written that the plot cannot be."""
    from ckpttools.operations.figures import check_picture
    from ckpttools.stores.files import exists, is_folder
    from ckpttools.stores.links import resolved

    check_picture(plot)
    if not is_folder(plot.parent):
        raise UsageError("not-found", "there is no such folder", where=plot.parent, hint="make it first")
    found = resolved(plot)
    if exists(plot) and resolved(src) in (found, *found.parents):
        raise UsageError(
            "bad-usage",
            "the plot would overwrite the source",
            where=plot,
            why="sources are only read",
            hint="name another file",
        )


def _draw(result: Rebased, plot: Path) -> None:
    from ckpttools.transforms.rebase import curves

    found = curves(result.moved)
    if found is None:
        render.say("note: no plot: the schedule's curve or its length is not known")
        return
    from ckpttools.execute.small import put
    from ckpttools.operations.figures import of_rebase, picture

    put(plot, picture(of_rebase(found, result), plot), force=True)
    render.say(f"plotted {escape(plot)}")
