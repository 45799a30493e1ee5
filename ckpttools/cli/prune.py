"""ckpt prune: remove old checkpoints, after the plan was shown and confirmed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpttools.cli import render
from ckpttools.cli.options import PATH, shown
from ckpttools.errors import UsageError, counted, escape
from ckpttools.stores.files import local

if TYPE_CHECKING:
    from ckpttools.operations.prune import Pruning
    from ckpttools.runs.retain import Decision

_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _within(context: click.Context, param: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r} is no span of time: write 7d, 12h, 90m or 2w", context, param)
    return float(match[1]) * _SECONDS[match[2]]


class _Prune(click.Command):
    """As click has it, but for a metric that may be left out: the word after it may have been DIR."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter:
            metric = ctx.params.get("keep_best")
            if not metric:
                raise
            raise UsageError(
                "bad-usage",
                f"--keep-best took {escape(metric)} for the metric, and DIR is missing",
                where=ctx.command_path,
                why="what follows --keep-best is its metric, unless it begins with -",
                hint="name DIR first: ckpt prune DIR --keep-best",
            ) from None


@click.command("prune", cls=_Prune)
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="The newest N good ones.")
@click.option("--per-kind", is_flag=True, help="Count step and epoch checkpoints apart.")
@click.option(
    "--keep-best",
    is_flag=False,
    flag_value="",
    metavar="[METRIC]",
    help="The best by METRIC (accuracy:max, loss:min), else by the validation loss.",
)
@click.option(
    "--keep-every", type=click.IntRange(min=1), metavar="K", help="Those whose step is a multiple of K."
)
@click.option(
    "--keep-within", callback=_within, metavar="7d", help="Those written in the last 7d, 12h, 90m, 2w."
)
@click.option("--slim", is_flag=True, help="Keep the weights of what goes, in weights-of-NAME beside it.")
@click.option("--verified", is_flag=True, help="Read every byte of what stays, not only headers.")
@click.option("--dry-run", is_flag=True, help="Show the plan, and remove nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@shown
def command(
    folder: Path,
    keep_last: int | None,
    per_kind: bool,
    keep_best: str | None,
    keep_every: int | None,
    keep_within: float | None,
    slim: bool,
    verified: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    quiet: bool,
    workers: int,
    no_progress: bool,
) -> int:
    """Remove the old checkpoints of every run below DIR, after showing which and asking.

    Of what stays the headers are checked first, with --verified every byte; a damaged checkpoint does not
    count. The newest good one, the one written last, the best, pinned ones, what `latest` or
    `last_checkpoint` name and what others need stay always; nothing that is no checkpoint is touched.
    """
    from ckpttools.operations.prune import carry_out, plan_of
    from ckpttools.runs.retain import Policy

    policy = Policy(last=keep_last, per_kind=per_kind, best=keep_best, every=keep_every, within=keep_within)
    bar = render.bars(enabled=not (no_progress or quiet))
    plan = plan_of(folder, policy, slim=slim, verified=verified, workers=workers, bar=bar)
    code = 1 if plan.notes else 0
    work = bool(plan.removed or plan.left)
    if not as_json and not (quiet and yes):
        click.echo("\n".join(_text(plan)))
    if work and not dry_run:
        if not yes and (as_json or sys.stdin is None or not sys.stdin.isatty()):
            raise UsageError(
                "prune-unconfirmed",
                "nothing was removed: nobody is there to say yes",
                where=folder,
                why="what is removed is gone for good, so ckpt asks first, and here is no terminal to ask at",
                hint="look at the plan with --dry-run; -y removes without asking",
            )
        if not yes and not click.confirm(f"remove these {len(plan.removed)}?", err=True):
            render.say("nothing was removed", quiet=quiet)
            return code
        carry_out(plan, workers=workers, bar=bar)
        render.say(
            f"removed {counted(len(plan.removed), 'checkpoint')}, {render.size(plan.nbytes)}",
            quiet=quiet or as_json,
        )
    if as_json:
        render.document(_json(plan, dry_run))
    return code


def _text(plan: Pruning) -> Iterator[str]:
    for run, decisions in plan.runs:
        yield escape(run, 4000)
        rows = [
            (
                "keep" if not d.goes else "slim" if d.entry.path in plan.slimmed else "remove",
                d.entry.path.name if d.entry.path != run else ".",
                d.entry.at or "?",
                render.size(d.entry.nbytes),
                _why(d, plan),
            )
            for d in decisions
        ]
        yield from (f"  {line}" for line in render.table(rows).splitlines())
    yield from (f"  remove  {escape(path, 4000)}  left by an interrupted prune" for path in plan.left)
    yield from render.notes_text(plan.notes)
    if plan.removed or plan.left:
        total = len(plan.removed) + len(plan.kept)
        yield f"{len(plan.removed)} of {total} go, {render.size(plan.nbytes)} are freed"
        if not plan.verified:
            yield "of what stays, headers only were checked; --verified reads every byte"
    else:
        yield "nothing to remove"


def _why(decision: Decision, plan: Pruning) -> str:
    kept = plan.slimmed.get(local(decision.entry.path))
    if kept is not None:
        return f"its weights stay in {kept.destination.name}"
    return "; ".join(decision.reasons) + (" (damaged)" if decision.good is False else "")


def _json(plan: Pruning, dry_run: bool) -> dict[str, object]:
    return {
        "ok": not plan.notes,
        "dry_run": dry_run,
        "path": str(plan.folder),
        "nbytes": plan.nbytes,
        "removed": [{"path": str(entry.path), "nbytes": entry.nbytes} for entry in plan.removed],
        "kept": [{"path": str(d.entry.path), "good": d.good, "reasons": list(d.reasons)} for d in plan.kept],
        "slimmed": [
            {"path": str(path), "destination": str(kept.destination), "nbytes": kept.nbytes}
            for path, kept in plan.slimmed.items()
        ],
        "left": [str(path) for path in plan.left],
        "notes": list(plan.notes),
    }
