"""`ckpt train`: the reference trainer, launched under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLDER, JSON, PATH, QUIET
from ckpttools.errors import escape


@click.command("train")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--nproc", type=click.IntRange(min=1), help="Ranks. Default: one per GPU, or 2 on a CPU.")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint of the experiment.")
@click.option(
    "--resume-from",
    type=PATH,
    help="With --resume: continue from this checkpoint. Alone: load its weights only.",
)
@click.option("--reset-optimizer", is_flag=True, help="Keep weights and position alone.")
@click.option("--extra-tag", help="Of save.layout: experiment. The same tag goes on, a new one starts anew.")
@click.option(
    "--evaluate",
    type=click.Path(exists=True, path_type=Path),
    help="Train nothing: the held-out loss of a checkpoint, or of all of a run.",
)
@click.option(
    "--verify-saves",
    type=click.Choice(["quick", "full", "off"]),
    default="quick",
    show_default=True,
    help="Check each save before it gets its name: headers, every byte, or nothing.",
)
@click.option(
    "--work-dir",
    type=FOLDER,
    help="The run folder. Default: work_dirs/EXPERIMENT/TIMESTAMP.",
)
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop at this step; the schedule is unchanged.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: zero.stage=1."
)
@click.option("--full-log", is_flag=True, help="Show everything that DeepSpeed and the ranks print.")
@JSON
@QUIET
def command(config: Path, nproc: int | None, as_json: bool, quiet: bool, **asked: Any) -> int:
    """Train a small model with DeepSpeed ZeRO, or with plain torch (zero.stage: 0), as CONFIG (YAML) says.

    Checkpoints go to the run folder: iter_000100.pth every save.save_steps updates and epoch_001.pth at the
    end of each epoch; save.layout has three other layouts. `--resume` alone goes on in the run folder where
    it finds the newest checkpoint; with --resume-from a new run folder is made, unless --work-dir names one.

    SIGTERM and SIGUSR1 save and stop: exit code 143 or 138, and --resume goes on from there.

    On several nodes start the ranks yourself, with the same options:
    torchrun ... -m ckpttools.trainer CONFIG
    """
    from ckpttools.trainer.options import Options

    options = Options(config=config, **asked)
    if "RANK" in os.environ:  # torchrun already started the ranks
        from ckpttools.trainer.worker import main

        main(options.arguments())
    from ckpttools.trainer.launch import launch

    # stdout is the document's: the ranks speak on stderr
    console = subprocess.DEVNULL if quiet else sys.stderr.fileno() if as_json else None
    try:
        code, run = launch(options, nproc, console=console)
        if as_json:
            run_folder = None if run is None else str(run)
            render.document({"ok": code == 0, "exit_code": code, "run": run_folder})
        elif quiet and run is not None:
            click.echo(escape(run, 4000))
        return code
    except KeyboardInterrupt:
        click.echo("interrupted: the checkpoints saved so far are complete and can be resumed from", err=True)
        return 130
