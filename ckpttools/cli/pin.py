"""ckpt pin, ckpt unpin: a note beside a checkpoint that no clean-up removes it."""

from __future__ import annotations

from pathlib import Path

import click

from ckpttools.cli import render
from ckpttools.cli.options import JSON, PATH, QUIET
from ckpttools.errors import escape


@click.command("pin")
@click.argument("path", metavar="PATH", type=PATH)
@click.option("-m", "reason", metavar="REASON", help="Why it is kept.")
@JSON
@QUIET
def command(path: Path, reason: str | None, as_json: bool, quiet: bool) -> None:
    """Keep the checkpoint at PATH: ckpt prune leaves it. A hidden file beside it says who, when and why."""
    from ckpttools.operations.pin import pin

    made = pin(path, reason)
    if as_json:
        render.document(
            {"ok": True, "path": str(path), "who": made.who, "when": made.when, "reason": made.reason}
        )
        return
    render.say(escape(made, 1000), quiet=quiet)
    click.echo(escape(path, 4000))


@click.command("unpin")
@click.argument("path", metavar="PATH", type=PATH)
@JSON
@QUIET
def unpin_command(path: Path, as_json: bool, quiet: bool) -> None:
    """Take back the pin on the checkpoint at PATH."""
    from ckpttools.operations.pin import unpin

    was = unpin(path)
    if as_json:
        render.document(
            {"ok": True, "path": str(path), "who": was.who, "when": was.when, "reason": was.reason}
        )
        return
    render.say(f"was {escape(was, 1000)}", quiet=quiet)
    click.echo(escape(path, 4000))
