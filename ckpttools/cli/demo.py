"""`ckpt demo`: the whole story on two CPU cores, each command printed before it runs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from itertools import pairwise
from pathlib import Path

import click
from msgspec import Struct

from ckpttools.cli import render
from ckpttools.cli.options import FOLDER, JSON, QUIET
from ckpttools.errors import CkptError, UsageError, escape

SAVED = "iter_000012.pth"  # demo.yaml saves every 12 updates; an epoch is 23
CONFIG = "demo.yaml"

COMMANDS = (
    f"train {CONFIG} --nproc 2 --work-dir run",
    f"inspect run/{SAVED}",
    f"verify run/{SAVED}",
    f"extract run/{SAVED} weights --weights-only --hf-config run/hf_config",
    f"reshard run/{SAVED} run/ws4-of-{SAVED} --world-size 4",
    f"verify run/ws4-of-{SAVED}",
    f"train {CONFIG} --nproc 4 --resume --resume-from run/ws4-of-{SAVED} --work-dir resumed",
    f"rebase-schedule run/{SAVED} run/bs16-of-{SAVED} --old-bs 32 --new-bs 16",
    # half the batch, and the warmup that the command above says: 4 updates of 32 samples are 8 of 16
    f"train {CONFIG} --nproc 2 --resume --resume-from run/bs16-of-{SAVED} --work-dir rebased"
    " --set batch.global_batch_size=16 --set schedule.warmup_steps=8",
)

# Weights, optimizer state and samples are the same, so the first resumed loss is equal to the bit. From then
# on four ranks sum the same micro-batch gradients as two, but in another order and in bf16 (8 significant
# bits), and the rounding spreads. Measured with this config over the 11 updates after the checkpoint:
# at most 1.1e-4 for a right reshard, 2e-3 when the fp32 masters are lost (rebuilt from the bf16 weights),
# 7e-2 when the momentum is lost.
TOLERANCE = 5e-4


@click.command("demo")
@click.argument("folder", metavar="[DIR]", required=False, type=FOLDER)
@click.option("--keep", is_flag=True, help="Keep the temporary folder; a DIR that you name is always kept.")
@JSON
@QUIET
def command(folder: Path | None, keep: bool, as_json: bool, quiet: bool) -> int:
    """Train on two ranks, verify, extract, reshard to four, resume there; halve the batch, resume again.

    Losses and learning rates are compared with those of the run that was never interrupted.

    Everything happens in DIR (new or empty), or in a temporary folder. Takes a few minutes on two CPU cores.
    """
    with _speaking(as_json=as_json, quiet=quiet), _place(folder, keep) as place:
        config = resources.files("ckpttools.trainer").joinpath(CONFIG).read_text("utf-8")
        (place / CONFIG).write_text(config, "utf-8")
        click.echo(f"$ cd {shlex.quote(str(place))}")
        for line in COMMANDS:
            _run(line, place, quiet=quiet)
        compared = [_compare_losses(place), _compare_rates(place)]
    ok, kept = all(each.ok for each in compared), folder is not None or keep
    if as_json:
        shown = {each.of: {"ok": each.ok, "apart": each.apart, "most": each.most} for each in compared}
        document = {"ok": ok, "folder": str(place) if kept else None, "commands": list(COMMANDS)}
        render.document(document | shown)
    elif quiet:
        for each in compared:
            if not each.ok:
                click.echo(str(each), err=True)
        if kept:
            click.echo(escape(place, 4000))
    return 0 if ok else 1


class Compared(Struct, frozen=True, kw_only=True):
    """How far a resumed run is from the one that was never interrupted, and how far it may be."""

    of: str
    apart: float
    most: float
    words: tuple[str, str]  # where it is not farther, and where it is

    @property
    def ok(self) -> bool:
        return self.apart <= self.most

    def __str__(self) -> str:
        return self.words[0] if self.ok else self.words[1]


@contextlib.contextmanager
def _speaking(*, as_json: bool, quiet: bool) -> Iterator[None]:
    """stdout may be the document's alone: what is shown then goes to stderr, or nowhere."""
    with contextlib.ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        elif as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


@contextlib.contextmanager
def _place(folder: Path | None, keep: bool) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(
                "destination-exists",
                "the folder is not empty",
                where=folder,
                why="the demo would mix its files with those that are there",
                hint="name a new folder, or leave it out to use a temporary one",
            )
        yield folder.absolute()
        return
    temporary = Path(tempfile.mkdtemp(prefix="ckpt-demo-"))
    try:
        yield temporary
    finally:
        if keep:
            click.echo(f"kept: {temporary}")
        else:
            shutil.rmtree(temporary, ignore_errors=True)


def _run(line: str, place: Path, *, quiet: bool) -> None:
    """`quiet`: of what the command prints, only its errors."""
    click.secho(f"\n$ ckpt {line}", bold=True)
    sys.stdout.flush()
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(place / "extensions")),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpttools.cli", *shlex.split(line), *(["-q"] if quiet else [])],
        cwd=place,
        env=environment,
        stdout=sys.stdout.fileno(),
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached it too, and a trainer first ends its ranks
        raise
    if code != 0:
        raise CkptError(
            "demo-failed",
            f"`ckpt {line}` ended with exit code {code}",
            where=place,
            why="the steps after it need its result",
            hint="its own message is above; use `ckpt demo DIR` to keep the files",
        )


def _compare_losses(place: Path) -> Compared:
    """Print the losses of both runs side by side."""
    whole, resumed = (_logged(place / run, "step", "loss") for run in ("run", "resumed"))
    rows = [(step, whole[step], loss, abs(loss - whole[step])) for step, loss in resumed.items()]
    click.echo("\nloss of each update after the checkpoint:\n")
    headers = ("step", "2 ranks, never interrupted", "resharded, resumed on 4", "difference")
    shown = [(step, f"{old:.6f}", f"{new:.6f}", f"{apart:.1e}") for step, old, new, apart in rows]
    click.echo(render.table(shown, headers))
    words = ("equal within rounding", "NOT the same training")
    found = Compared(of="loss", apart=max(row[3] for row in rows), most=TOLERANCE, words=words)
    click.echo(f"\nmax difference {found.apart:.1e}, tolerance {found.most:.0e}: {found}")
    return found


def _compare_rates(place: Path) -> Compared:
    """The learning rate over samples of the run and of the one that went on with half the batch.

    The schedule's steps are half as long there: the two may be apart by what one step of it changes.
    """
    whole, rebased = (_logged(place / run, "samples_seen", "lr") for run in ("run", "rebased"))
    # a line of the log counts the samples of its own update: the rate held for those before
    before, after = (
        {seen - size: lr for seen, lr in log.items()} for log, size in ((whole, 32), (rebased, 16))
    )
    rows = [(seen, lr, after[seen], abs(after[seen] - lr)) for seen, lr in before.items() if seen in after]
    click.echo("\nlearning rate over samples, from the checkpoint on:\n")
    headers = ("samples", "batch 32, never interrupted", "rebased to 16, resumed", "difference")
    shown = [(seen, f"{old:.6e}", f"{new:.6e}", f"{apart:.1e}") for seen, old, new, apart in rows]
    click.echo(render.table(shown, headers))
    step = max(abs(a - b) for a, b in pairwise(before.values()))
    words = ("the same schedule", "NOT the same schedule")
    found = Compared(of="rate", apart=max(row[3] for row in rows), most=step, words=words)
    click.echo(f"\nmax difference {found.apart:.1e}, one step changes up to {step:.1e}: {found}")
    return found


def _logged(run: Path, key: str, value: str) -> dict[int, float]:
    """One value of each update by another one; a resumed run's later line for a step counts."""
    lines = (run / "train_log.jsonl").read_text("utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    return {record[key]: record[value] for record in records}
