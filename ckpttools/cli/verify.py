"""ckpt verify: every check, on one or many checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, JSON, NO_PROGRESS, PATH, QUIET, TAG, WORKERS
from ckpttools.errors import CkptError, escape

MARK = {"error": "ERROR", "warning": "warning", "info": "note"}


@click.command("verify")
@click.argument("src", nargs=-1, required=True, type=PATH)
@click.option("--quick", is_flag=True, help="Headers and the files against each other; no tensor is read.")
@click.option(
    "--write-manifest",
    is_flag=True,
    help="Also write ckpt-manifest.json beside the files of each good checkpoint.",
)
@FOLLOW
@TAG
@JSON
@QUIET
@WORKERS
@NO_PROGRESS
def command(
    src: tuple[Path, ...],
    quick: bool,
    write_manifest: bool,
    tag: str | None,
    as_json: bool,
    quiet: bool,
    workers: int,
    no_progress: bool,
) -> int:
    """Check that SRC is whole: structure, checksums, completeness, and that its files belong together.

    Reads every byte once; --quick reads headers only. For ZeRO, the fp32 master weights are compared with the
    16-bit weights bit for bit, which proves that the shards belong to the model file. Exit code 0: clean,
    1: a problem was found, 2: a path is not a checkpoint or cannot be read.

    A ckpt-manifest.json in the folder, or NAME.ckpt-manifest.json beside a single file, is always checked: it
    finds every changed byte in any format. --write-manifest writes it, or writes it anew, when nothing is
    wrong.
    """
    from ckpttools.checks import Verdict, verify

    verdicts: list[Verdict] = []
    refused: list[tuple[Path, CkptError]] = []
    for path in src:
        try:
            verdict = verify(
                path,
                tag,
                quick=quick,
                describe=write_manifest,
                workers=workers,
                bar=lambda n: render.bar(n, "verify", enabled=not (no_progress or quiet)),
            )
        except CkptError as error:
            if len(src) == 1:
                raise
            refused.append((path, error))
            continue
        verdicts.append(verdict)
        if verdict.manifest is not None and verdict.ok:
            _write_manifest(*verdict.manifest, quiet=quiet)
        if not as_json:
            _show(verdict, quick=quick, quiet=quiet, brief=len(src) > 1)
    ok = all(verdict.ok for verdict in verdicts) and not refused
    if as_json:
        render.document({"ok": ok, "checkpoints": [*map(_json, verdicts), *map(_refused_json, refused)]})
    elif len(src) > 1:
        for path, problem in refused:
            click.echo(f"{escape(path)}: could not check: {escape(problem.message)} [{problem.id}]")
        good = sum(verdict.ok for verdict in verdicts)
        click.echo(f"{good} of {len(src)} checkpoints are good")
    if any(not verdict.ok for verdict in verdicts) or any(problem.exit_code == 1 for _, problem in refused):
        return 1
    return 2 if refused else 0


def _write_manifest(place: Path, contents: bytes, *, quiet: bool) -> None:
    """Write the manifest atomically. The folder keeps its times: some frameworks choose by them."""
    from ckpttools.execute import execute
    from ckpttools.plan import Literal, OutputFile, Plan

    times = place.parent.stat()
    plan = Plan(files=(OutputFile(path="", segments=(Literal(contents),)),))
    execute(plan, place, force=True)
    with contextlib.suppress(OSError):  # in a folder of somebody else
        os.utime(place.parent, ns=(times.st_atime_ns, times.st_mtime_ns))
    render.say(f"wrote {escape(place)}", quiet=quiet)


def _show(verdict: Any, *, quick: bool, quiet: bool, brief: bool) -> None:
    errors = [f for f in verdict.findings if f.severity == "error"]
    warnings = [f for f in verdict.findings if f.severity == "warning"]
    shown = errors + warnings if brief or quiet else list(verdict.findings)
    state = "".join(f", {name} {_number(value)}" for name, value in _progress(verdict) if value is not None)
    if verdict.ok:
        read = "headers only" if quick else f"{render.size(verdict.nbytes_read)} of data read"
        word = "good" if not warnings else f"good, with {len(warnings)} warnings"
        line = f"{escape(verdict.path)}: {word} ({verdict.format}{state}; {read})"
    else:
        line = f"{escape(verdict.path)}: BAD: {len(errors)} errors ({verdict.format or 'unreadable'}{state})"
    if not (quiet and verdict.ok):
        click.echo(line)
    hints: dict[str, None] = {}
    for finding in shown:
        file = escape(_short(finding.file, verdict.path), 400)
        place = " ".join(part for part in (file, escape(finding.where, 300)) if part)
        message = escape(finding.text, 1000)
        click.echo(f"  {MARK[finding.severity]}[{finding.id}] {place}{': ' if place else ''}{message}")
        if finding.severity != "info" and finding.hint:
            hints.setdefault(finding.hint)
    for hint in hints:
        click.echo(f"  hint: {escape(hint, 500)}")


def _progress(verdict: Any) -> Iterator[tuple[str, int | float | None]]:
    """Where training stood, as far as the checkpoint says: what both outputs show."""
    state = verdict.state
    yield "step", state.step
    yield "epoch", state.epoch
    yield "train_loss", state.train_loss
    yield "val_loss", state.val_loss


def _number(value: int | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(file: str, path: Path) -> str:
    """The file below the checkpoint's own path; nothing where they are the same."""
    try:
        relative = Path(file).relative_to(path)
    except ValueError:
        return file
    return "" if relative == Path() else str(relative)


def _json(verdict: Any) -> dict[str, object]:
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


def _refused_json(item: tuple[Path, CkptError]) -> dict[str, object]:
    path, error = item
    finding = {
        "id": error.id,
        "severity": "error",
        "file": error.where,
        "where": "",
        "message": error.message,
        "hint": error.hint,
    }
    return {
        "path": str(path),
        "format": None,
        "ok": False,
        "step": None,
        "epoch": None,
        "train_loss": None,
        "val_loss": None,
        "findings": [finding],
    }
