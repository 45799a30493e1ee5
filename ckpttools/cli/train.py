"""`ckpt train`: the reference trainer, launched under torchrun."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command("train")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--nproc", type=click.IntRange(min=1), help="Ranks. Default: one per GPU, or 2 on a CPU.")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint of the experiment.")
@click.option(
    "--resume-from",
    type=click.Path(path_type=Path),
    help="With --resume: continue from this checkpoint. Alone: load its weights only.",
)
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="The run folder. Default: work_dirs/EXPERIMENT/TIMESTAMP.",
)
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop at this step; the schedule is unchanged.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: zero.stage=1."
)
@click.option("--full-log", is_flag=True, help="Show everything that DeepSpeed and the ranks print.")
def command(
    config: Path,
    nproc: int | None,
    resume: bool,
    resume_from: Path | None,
    work_dir: Path | None,
    max_steps: int | None,
    overrides: tuple[str, ...],
    full_log: bool,
) -> int:
    """Train a small language model with DeepSpeed ZeRO-2, as CONFIG (YAML) says.

    Checkpoints go to the run folder: iter_000100.pth every save.save_steps updates and epoch_001.pth at the
    end of each epoch. `--resume` alone goes on in the run folder where it finds the newest checkpoint;
    with --resume-from a new run folder is made, unless --work-dir names one.

    On several nodes start the ranks yourself, with the same options:
    torchrun ... -m ckpttools.trainer CONFIG
    """
    from ckpttools.trainer.options import Options

    options = Options(
        config=config,
        resume=resume,
        resume_from=resume_from,
        work_dir=work_dir,
        max_steps=max_steps,
        overrides=overrides,
        full_log=full_log,
    )
    if "RANK" in os.environ:  # torchrun already started the ranks
        from ckpttools.trainer.worker import main

        main(options.arguments())
    from ckpttools.trainer.launch import launch

    try:
        launch(options, nproc)
    except KeyboardInterrupt:
        click.echo("interrupted: the checkpoints saved so far are complete and can be resumed from", err=True)
        return 130
    return 0
