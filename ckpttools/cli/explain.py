"""ckpt explain: what an error or a check means."""

from __future__ import annotations

import click

from ckpttools.cli import render
from ckpttools.cli.options import JSON
from ckpttools.errors import UsageError, escape
from ckpttools.explain import EXPLANATIONS, MEND
from ckpttools.suggest import did_you_mean


@click.command("explain")
@click.argument("id", required=False)
@JSON
def command(id: str | None, as_json: bool) -> None:
    """What ID means (an error or a finding of verify) and how to mend it; without ID, a line for each."""
    if id is None and as_json:
        render.document({"ok": True, "problems": [_json(name) for name in sorted(EXPLANATIONS)]})
        return
    if id is None:
        rows = ((name, found.kind, found.line) for name, found in sorted(EXPLANATIONS.items()))
        click.echo(render.table(rows, ("id", "about", "meaning")))
        return
    id = id.strip().removeprefix("error").strip("[]:")
    found = EXPLANATIONS.get(id)
    if found is None:
        raise UsageError(
            "bad-usage",
            f"there is no check or error named '{escape(id)}'",
            where="ckpt explain",
            why="an ID stands in brackets after error, warning or note",
            hint=did_you_mean(id, EXPLANATIONS) or "ckpt explain lists them all",
        )
    if as_json:
        render.document({"ok": True, "problems": [_json(id)]})
        return
    click.echo(f"{id} ({found.kind})\n")
    click.echo(click.wrap_text(found.meaning, 96))
    click.echo()
    click.echo(click.wrap_text(MEND + found.mend, 96))


def _json(id: str) -> dict[str, str]:
    found = EXPLANATIONS[id]
    return {"id": id, "kind": found.kind, "meaning": found.meaning, "mend": found.mend}
