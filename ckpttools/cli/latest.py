"""ckpt latest: the checkpoint that a resume would take, and why."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, PLACE, STATS, ask, shown
from ckpttools.errors import escape
from ckpttools.location import Location


@click.command("latest")
@click.argument("folder", metavar="DIR", type=PLACE)
@click.option("--verified", is_flag=True, help="The newest that passes every check of ckpt verify.")
@FOLLOW
@STATS
@shown
def command(folder: Location, **options: Any) -> None:
    """Print the path of the checkpoint in DIR that auto-resume would take; the reason goes to stderr.

    `last_checkpoint` and `latest` are followed; without them the newest by the step inside is taken. With
    --verified each one is checked, newest first, until one is whole; those passed over are named.
    """
    from ckpttools.operations.latest import latest

    choice, quiet = ask(latest, folder, **options), options["quiet"]
    if options["as_json"]:
        passed = [{"path": str(path), "reason": reason} for path, reason in choice.passed_over]
        document = {"path": str(choice.path), "why": choice.why, "passed_over": passed}
        render.document(document | {"notes": list(choice.notes)})
        return
    for path, reason in choice.passed_over:
        render.say(f"passed over {escape(path)}: {escape(reason, 1000)}", quiet=quiet)
    render.say(escape(choice.why, 1000), quiet=quiet)
    for note in render.notes_text(choice.notes):
        render.say(note, quiet=quiet)
    name, shown = str(choice.path), escape(choice.path, 4000)
    # a script opens what it reads: only a terminal must not be told what to do by a name
    to_script = name != shown and sys.stdout is not None and not sys.stdout.isatty()
    click.echo(os.fsencode(name) if to_script else shown)
