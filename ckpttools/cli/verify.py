"""ckpt verify: every check, on one or many checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, PLACE, SPREAD, STATS, TAG, reading
from ckpttools.errors import escape
from ckpttools.location import Location

if TYPE_CHECKING:
    from ckpttools.checks import Verdict

MARK = {"error": "ERROR", "warning": "warning", "info": "note"}
IN_THE_LINE = {"training-lacks"}  # notes that a checkpoint's own line says
AT_THE_END = {"rescue"}


@click.command("verify")
@click.argument("src", nargs=-1, required=True, type=PLACE)
@click.option("--quick", is_flag=True, help="Headers and the files against each other; no tensor is read.")
@click.option("--newest", is_flag=True, help="Of a run, only the checkpoint that a resume would take.")
@click.option(
    "--require",
    metavar="KEYS",
    default="",
    help="What must be there: optimizer, scheduler, step, epoch, train_loss, val_loss.",
)
@click.option(
    "--subset",
    metavar="PART",
    help="Read only a part of the bytes: 5% of them at random, or 2/7, the second of seven parts.",
)
@click.option(
    "--write-manifest",
    is_flag=True,
    help="Also write ckpt-manifest.json beside the files of each good checkpoint.",
)
@FOLLOW
@STATS
@TAG
@reading
@SPREAD
def command(
    src: tuple[Location, ...],
    quick: bool,
    newest: bool,
    require: str,
    subset: str | None,
    as_json: bool,
    quiet: bool,
    spread: bool,
    no_progress: bool,
    **options: Any,
) -> int:
    """Check that SRC is whole: structure, checksums, completeness, and that its files belong together.

    Reads every byte once; --quick reads headers only. For ZeRO, the fp32 master weights are compared with the
    16-bit weights bit for bit, which proves that the shards belong to the model file. A run or a tree of runs
    means every checkpoint in it, newest first; --newest takes one. Exit code 0: clean, 1: a problem was
    found, 2: a path is not a checkpoint or cannot be read.

    A ckpt-manifest.json in the folder, or NAME.ckpt-manifest.json beside a single file, is always checked: it
    finds every changed byte in any format. --write-manifest writes it, or writes it anew, when nothing is
    wrong. With --spread, processes that torchrun or srun started share the bytes; the first says the result.
    """
    from ckpttools.operations.verify import older, shared, verify_each

    passing = shared(quick=quick, subset=subset) if spread else None
    silent = passing is not None and passing.worker.rank > 0  # worker 0 says what all have found
    verdicts: list[Verdict] = []
    for verdict in verify_each(
        src,
        newest=newest,
        quick=quick,
        require=[key.strip() for key in require.replace("-", "_").split(",") if key.strip()],
        subset=subset,
        bar=render.bars(enabled=not (no_progress or quiet or silent)),
        passing=passing,
        **options,
    ):
        verdicts.append(verdict)
        if silent:
            continue
        if verdict.manifest is not None and verdict.ok:
            render.say(f"wrote {escape(verdict.manifest[0])}", quiet=quiet)
        if not as_json:
            brief = len(src) > 1 or len(verdicts) > 1 or verdict.path != src[0]
            _show(verdict, quick=quick, subset=subset, quiet=quiet, brief=brief and not newest)
    if silent:
        return 0
    if as_json:
        ok = all(verdict.ok for verdict in verdicts)
        render.document({"ok": ok, "checkpoints": list(map(_json, verdicts))})
    elif len(verdicts) > 1:
        click.echo(_totals(verdicts))
        good = next((verdict.path for verdict in verdicts if verdict.ok), None)
        if good is not None and good != verdicts[0].path and len(src) == 1:
            click.echo(f"good and older: {escape(good, 1000)}")
    elif verdicts[0].exit_code == 1 and (before := older(verdicts[0].path)) is not None:
        click.echo(f"  older, and its headers are good: {escape(before, 1000)}")
    return min((verdict.exit_code for verdict in verdicts if not verdict.ok), default=0)


def _show(verdict: Verdict, *, quick: bool, subset: str | None, quiet: bool, brief: bool) -> None:
    """One line, and the findings below it; of several checkpoints, without the notes."""
    told = ["unreadable"] if verdict.format is None and verdict.exit_code == 1 else []
    told += [verdict.format] if verdict.format is not None else []
    for name, value in _progress(verdict):
        # epoch 0 is what a run that counts iterations says to its end
        if value is not None and not (name == "epoch" and value == 0 and verdict.step):
            told.append(f"{name} {_number(value)}")
    line = f"{escape(verdict.path)}: {verdict.words} ({', '.join(told)}"
    if verdict.ok:
        line += f"; no {', no '.join(verdict.lacks)}" if verdict.lacks else ""
        line += "; headers only" if quick else f"; {render.size(verdict.nbytes_read)} of data read"
        line += f", the part {subset}" if subset else ""
    if not (quiet and verdict.ok):
        click.echo(f"{line})".removesuffix(" ()"))
    hints: dict[str, None] = {}
    for finding in verdict.findings:
        if finding.severity == "info" and (brief or quiet or finding.id in IN_THE_LINE | AT_THE_END):
            continue
        file = escape(_short(finding.file, verdict.path), 400)
        place = " ".join(part for part in (file, escape(finding.where, 300)) if part)
        message = escape(finding.text, 1000)
        click.echo(f"  {MARK[finding.severity]}[{finding.id}] {place}{': ' if place else ''}{message}")
        if finding.severity != "info" and finding.hint:
            hints.setdefault(finding.hint)
    for hint in hints:
        click.echo(f"  hint: {escape(hint, 500)}")
    for finding in verdict.findings:
        if finding.id in AT_THE_END:
            click.echo(f"  {escape(finding.text, 1000)}")


def _totals(verdicts: list[Verdict]) -> str:
    good = sum(verdict.ok for verdict in verdicts)
    unread = sum(verdict.exit_code == 2 for verdict in verdicts)
    rest = f"; {unread} could not be checked" if unread else ""
    return f"{good} of {len(verdicts)} checkpoints are good{rest}"


def _progress(verdict: Verdict) -> Iterator[tuple[str, int | float | None]]:
    """Where training stood, as far as the checkpoint says: what both outputs show."""
    state = verdict.state
    yield "step", state.step
    yield "epoch", state.epoch
    yield "train_loss", state.train_loss
    yield "val_loss", state.val_loss


def _number(value: int | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(file: str, path: Location) -> str:
    """The file below the checkpoint's own path; nothing where they are the same."""
    return "" if file == str(path) else file.removeprefix(f"{path}/")


def _json(verdict: Verdict) -> dict[str, object]:
    return {
        "path": str(verdict.path),
        "format": verdict.format,
        "ok": verdict.ok,
        **dict(_progress(verdict)),
        "findings": [
            {
                "id": f.id,
                "severity": f.severity,
                "file": f.file,
                "where": f.where,
                "message": f.text,
                "hint": f.hint,
            }
            for f in verdict.findings
        ],
    }
