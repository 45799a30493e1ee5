"""ckpt report: one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, FORCE, PATH, ask, number, shown
from ckpttools.errors import escape


@click.command("report")
@click.argument("paths", metavar="RUN|RUNS|A B", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", "dst", type=PATH, metavar="FILE.html", required=True, help="The page.")
@click.option(
    "--keep-last",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Mark what ckpt prune --keep-last N would remove.",
)
@number("--new-bs", help="Draw the learning rate after a rebase to this batch, too.")
@click.option("--verify", is_flag=True, help="Read every byte of each checkpoint, as ckpt verify does.")
@FORCE
@FOLLOW
@shown
def command(paths: tuple[Path, ...], **options: Any) -> int:
    """Write one HTML file about a run, runs side by side, or two checkpoints, to send to a colleague.

    Checkpoints on a line of samples with their state, loss and learning rate, sizes, settings that differ,
    findings with what they mean; of two checkpoints how far apart each layer is. The page needs no network
    and no script. Nothing but the page is written. Exit code 1: a damaged checkpoint is in it.

        ckpt report run -o run.html
    """
    from ckpttools.operations.report import report

    made, quiet = ask(report, *paths, **options), options["quiet"]
    if options["as_json"]:
        about = {"ok": not made.damaged, "destination": str(made.destination), "nbytes": made.nbytes}
        render.document(about | {"damaged": made.damaged})
    else:
        render.say(f"{render.size(made.nbytes)}; {made.damaged} damaged checkpoints are in it", quiet=quiet)
        click.echo(escape(made.destination, 4000))
    return 1 if made.damaged else 0
