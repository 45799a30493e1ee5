"""ckpt explain: what an error or a check means."""

from __future__ import annotations

import click

from ckpttools.cli import render
from ckpttools.errors import UsageError, escape
from ckpttools.explain import EXPLANATIONS


@click.command("explain")
@click.argument("id", required=False)
def command(id: str | None) -> None:
    """What ID means (an error or a finding of verify) and how to mend it; without ID, the list of all."""
    if id is None:
        click.echo(
            render.table(((name, e.kind) for name, e in sorted(EXPLANATIONS.items())), ("id", "about"))
        )
        return
    explanation = EXPLANATIONS.get(id)
    if explanation is None:
        near = [name for name in EXPLANATIONS if id in name or name in id]
        raise UsageError(
            "bad-usage",
            f"there is no check or error named '{escape(id)}'",
            hint=f"did you mean {', '.join(near)}?" if near else "ckpt explain lists them all",
        )
    click.echo(f"{id} ({explanation.kind})\n")
    click.echo(click.wrap_text(explanation.meaning, 96))
    click.echo()
    click.echo(click.wrap_text("What to do: " + explanation.mend, 96))
