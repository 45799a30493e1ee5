"""ckpt runs: experiments side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpttools.cli import render
from ckpttools.cli.ls import age
from ckpttools.cli.options import FOLLOW, FORCE, JSON, PATH, QUIET
from ckpttools.errors import UsageError, counted, escape

if TYPE_CHECKING:
    from ckpttools.operations.experiments import Best, Experiment, Experiments

HEADERS = ("run", "by", "batch", "progress", "samples", "loss", "best", "validation", "best", "time", "kept")


@click.command("runs")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option(
    "--run", "only", multiple=True, metavar="NAME", help="Only this run (repeatable, in this order)."
)
@click.option(
    "--top", type=click.IntRange(0), default=30, show_default=True, help="How many settings are listed."
)
@click.option(
    "--plot", type=PATH, metavar="FILE.svg", help="Draw loss and learning rate over samples; .png, .pdf too."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print one line of CSV for each run.")
@click.option(
    "--log", type=PATH, metavar="FILE.md", help="Add a row for each run to an experiment log (.md or .csv)."
)
@click.option("--parent", metavar="NAME", help="The run that --log tells the changes against.")
@FORCE
@FOLLOW
@JSON
@QUIET
def command(
    folder: Path,
    only: tuple[str, ...],
    top: int,
    plot: Path | None,
    as_csv: bool,
    log: Path | None,
    parent: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """The runs below DIR side by side: batch, progress, losses, time, and the settings that differ.

    They are read from the newest good checkpoint of each, its configuration, and what lies beside it: YAML,
    trainer_state.json, train_log.jsonl, MMEngine's vis_data, metrics.csv, TensorBoard's event files.
    A ? is what nothing says. --plot draws over samples, so that runs with other batches can be compared.
    Exit code 1: a checkpoint of one is damaged, as far as its headers tell.

        ckpt runs work_dirs --plot runs.svg --log experiments.md
    """
    from ckpttools.operations.experiments import experiments

    if as_csv and as_json:
        raise UsageError(
            "bad-usage",
            "--csv and --json contradict each other",
            where="--csv",
            why="each is all of what is printed",
            hint="use one of them",
        )
    if plot is not None:
        from ckpttools.execute.small import PICTURES, check_place
        from ckpttools.operations.figures import check_picture

        check_picture(plot)
        check_place(plot, PICTURES, force=force)
    if log is not None:
        from ckpttools.operations.logbook import check_log

        check_log(log)
    found = experiments(folder, only)
    if parent is not None and all(each.tag != parent for each in found.runs):
        raise UsageError(
            "run-missing",
            f"there is no run {escape(parent)}",
            where=folder,
            why="a run begins where its parent ended",
            hint="see ckpt runs",
        )
    written = list(_written(found, plot, log, parent, force=force))  # an error is then all that is printed
    if as_json:
        render.document(_json(found))
    elif as_csv:
        click.echo("".join(_csv(found)), nl=False)
    elif not quiet:
        click.echo("\n".join(_text(found, top)))
    damaged = [entry for each in found.runs for entry in each.checkpoints if entry.damaged]
    for entry in damaged:
        render.say(f"note: {escape(entry.path)} is damaged: {escape(entry.problem, 1000)}", quiet=quiet)
    for path in found.closed:
        render.say(f"note: {escape(path)} may not be read, and is left out", quiet=quiet)
    for each in found.runs:
        for note in render.notes_text(each.notes):
            render.say(f"{escape(each.tag)}: {note}", quiet=quiet)
    for text in written:
        render.say(text, quiet=quiet)
    return 1 if damaged else 0


def _written(
    found: Experiments, plot: Path | None, log: Path | None, parent: str | None, *, force: bool
) -> Iterator[str]:
    """Write the picture and the log; what to say of each."""
    if plot is not None:
        from ckpttools.execute.small import put
        from ckpttools.operations.figures import over_samples, picture

        put(plot, picture(over_samples(found.runs), plot), force=force)
        yield f"plotted {escape(plot)}"
    if log is not None:
        from ckpttools.operations.logbook import append

        rows = append(log, found.runs, parent)
        yield f"{counted(len(rows), 'row')} added to {escape(log)}"


def _text(found: Experiments, top: int) -> Iterator[str]:
    yield render.table(map(_row, found.runs), HEADERS)
    if len(found.runs) > 1:
        names = [escape(each.tag) for each in found.runs]
        yield ""
        if not found.differing:
            yield "all settings that are stated are the same"
            return
        yield "settings that differ:"
        rows = [(name, *map(_setting, values)) for name, values in list(found.differing.items())[:top]]
        yield render.table(rows, ("", *names))
        if len(found.differing) > top:
            yield f"and {len(found.differing) - top} more; --top {len(found.differing)} lists them"


def _setting(value: object) -> str:
    return "?" if value is None else escape(value, 40)


def _row(each: Experiment) -> tuple[object, ...]:
    train, val = losses(each)
    total = f" of {each.total}" if each.total is not None else ""
    epoch = f", epoch {each.epoch:.4g}" if each.epoch is not None else ""
    return (
        each.tag,
        each.framework or "?",
        _or(each.batch),
        f"{each.unit} {each.step}{total}{epoch}" if each.step is not None else "?",
        _or(each.samples),
        *_loss(train),
        *_loss(val),
        age(each.seconds) if each.seconds is not None else "?",
        _kept(each),
    )


def _kept(each: Experiment) -> str:
    bad = sum(entry.damaged for entry in each.checkpoints)
    return f"{len(each.checkpoints)}" + (f", {bad} damaged" if bad else "")


def losses(each: Experiment) -> tuple[Best | None, Best | None]:
    """Of training and of validation."""
    from ckpttools.operations.experiments import VAL_NAMES

    train = next((loss for loss in each.losses if loss.name not in VAL_NAMES), None)
    return train, next((loss for loss in each.losses if loss.name in VAL_NAMES), None)


def _loss(loss: Best | None) -> tuple[str, str]:
    return ("?", "?") if loss is None else (f"{loss.last:.5g}", f"{loss.least:.5g}")


def _or(value: object) -> object:
    return "?" if value is None else value


def _json(found: Experiments) -> dict[str, object]:
    return {
        "ok": not any(entry.damaged for each in found.runs for entry in each.checkpoints),
        "runs": [_run(each) for each in found.runs],
        "differing": {name: list(values) for name, values in found.differing.items()},
    }


def _run(each: Experiment) -> dict[str, object]:
    return {
        "path": str(each.path),
        "tag": each.tag,
        "framework": each.framework,
        "unit": each.unit,
        "step": each.step,
        "total": each.total,
        "epoch": each.epoch,
        "batch": each.batch,
        "samples": each.samples,
        "schedule": list(each.schedule),
        "losses": {loss.name: {"last": loss.last, "best": loss.least, "at": loss.at} for loss in each.losses},
        "seconds": each.seconds,
        "parent": each.parent,
        "checkpoints": len(each.checkpoints),
        "logged": sorted(each.log.series),
        "settings": dict(each.settings),
        "notes": list(each.notes),
    }


def _csv(found: Experiments) -> Iterator[str]:
    from ckpttools.operations.logbook import csv_line

    own = ("run", "framework", "batch", "unit", "step", "total", "epoch", "samples", "loss", "best_loss")
    more = ("val_loss", "best_val_loss", "seconds", "checkpoints", "schedule")
    yield csv_line((*own, *more, *found.differing))
    for i, each in enumerate(found.runs):
        sides = [(loss.last, loss.least) if loss else (None, None) for loss in losses(each)]
        facts = (
            each.tag,
            each.framework,
            each.batch,
            each.unit,
            each.step,
            each.total,
            each.epoch,
            each.samples,
        )
        rest = (each.seconds, len(each.checkpoints), "; ".join(each.schedule))
        values = (values[i] for values in found.differing.values())
        yield csv_line((*facts, *sides[0], *sides[1], *rest, *values))
