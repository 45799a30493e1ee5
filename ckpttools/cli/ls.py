"""ckpt ls: every checkpoint of a run or of a tree of runs, one line each. Header reads only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import PurePath
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, PLACE, STATS, ask, shown
from ckpttools.errors import escape
from ckpttools.location import Location, below
from ckpttools.stores.files import entries, is_folder, is_link

if TYPE_CHECKING:
    from ckpttools.operations.ls import Listed, Run

HEADERS = ("name", "kind", "step", "epoch", "losses", "size", "ranks", "age", "")
_AGES = ((86400 * 2, 86400, "d"), (7200, 3600, "h"), (120, 60, "min"), (0, 1, "s"))


@click.command("ls")
@click.argument("folder", metavar="DIR", type=PLACE)
@click.option(
    "--sort",
    type=click.Choice(("progress", "time", "size", "name")),
    default="progress",
    show_default=True,
    help="In which order.",
)
@click.option("--tree", is_flag=True, help="Show the folders that the runs lie in.")
@click.option("--verify", is_flag=True, help="Read every byte of each, as ckpt verify does.")
@FOLLOW
@STATS
@shown
def command(folder: Location, tree: bool, **options: Any) -> int:
    """The checkpoints below DIR by run, the furthest first by what they state; `ckpt DIR` is the same.

    What a resume would take is marked `<- latest`. A `?` is what a checkpoint does not say. Exit code 1 where
    one is damaged, as far as headers tell (every byte with --verify), or a pointer leads nowhere.
    """
    from ckpttools.operations.ls import ls

    found, quiet = ask(ls, folder, **options), options["quiet"]
    ok = all(run.ok for run in found)
    if options["as_json"]:
        render.document({"ok": ok, "runs": [_json(run) for run in found]})
    else:
        click.echo("\n".join(_text(found, folder, tree)))
    for run in found:
        for note in render.notes_text(run.notes):
            render.say(note if len(found) == 1 else f"{escape(run.path)}: {note}", quiet=quiet)
    for entry in entries(folder):
        if is_link(entry) and is_folder(entry):
            lists = f"ckpt ls {escape(quote(str(folder / entry.name)), 4000)}"
            render.say(f"note: {escape(entry.name)} is a link, which is not followed: {lists}", quiet=quiet)
    return 0 if ok else 1


def _json(run: Run) -> dict[str, object]:
    return {"path": str(run.path), "checkpoints": [_checkpoint(each) for each in run.checkpoints]}


def _checkpoint(each: Listed) -> dict[str, object]:
    entry = each.entry
    return {
        "path": str(entry.path),
        "kind": each.kind,
        "format": entry.format,
        "step": entry.state.step,
        "epoch": entry.state.epoch,
        "samples": entry.state.samples,
        "nbytes": entry.nbytes,
        "ranks": entry.ranks,
        "marks": list(each.marks),
        "metrics": dict(entry.metrics) | _iteration(each),
    }


def _iteration(each: Listed) -> dict[str, int]:
    """A count of micro-batches is no step: it stands among the metrics, by its name."""
    counted = each.entry.state.iteration
    return {} if counted is None else {"iteration": counted}


def _text(found: tuple[Run, ...], folder: Location, tree: bool) -> Iterator[str]:
    shown: tuple[str, ...] = ()
    if tree:
        yield f"{escape(folder, 4000)}/"
    for number, run in enumerate(found):
        name = PurePath(below(run.path, folder) if folder in run.path.parents else str(run.path))
        if tree:
            parts = name.parts if run.path != folder else ()
            for depth, part in enumerate(parts):
                if parts[: depth + 1] != shown[: depth + 1]:
                    yield f"{'  ' * (depth + 1)}{escape(part)}/"
            shown, indent = parts, "  " * (len(parts) + 1)
        else:
            yield from ([""] if number else [])
            yield escape(run.path, 4000)
            indent = "  "
        rows = [_row(each, run.path) for each in run.checkpoints]
        yield from (indent + line for line in render.table(rows, HEADERS).splitlines())
        for each in run.checkpoints:
            yield from (f"{indent}{escape(each.entry.path.name)}: {escape(why, 1000)}" for why in each.why)


def _row(each: Listed, run: Location) -> tuple[object, ...]:
    entry, state = each.entry, each.entry.state
    step = f"{state.step}" if state.step is not None else "?"
    if state.iteration is not None and state.iteration != state.step:
        step = f"iter {state.iteration}" + ("" if state.step is None else f", {step}")
    losses = ", ".join(f"{name} {value:.6g}" for name, value in entry.metrics.items())
    return (
        entry.path.name if entry.path != run else ".",
        each.kind or "?",
        step,
        f"{state.epoch:.6g}" if state.epoch is not None else "?",
        losses or "?",
        render.size(entry.nbytes) if entry.time else "?",
        entry.ranks if entry.ranks is not None else "?",
        age(time.time() - entry.time / 1e9) if entry.time else "?",
        ", ".join("<- latest" if mark == "latest" else mark for mark in each.marks),
    )


def age(seconds: float) -> str:
    """For people: 3 d, 5 h, 12 min, 7 s."""
    if seconds < 0:
        return "in the future"
    return next(f"{seconds / unit:.0f} {name}" for least, unit, name in _AGES if seconds >= least)
