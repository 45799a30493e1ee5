"""ckpt resume-check: will it resume under the new settings, where does it go on, and what has changed?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, PATH, SRC, STATS, TAG, ask, number, shown
from ckpttools.cli.resume_report import document, show


@click.command("resume-check")
@SRC
@click.option(
    "--config",
    type=PATH,
    help="The new run's: ds_config or TrainingArguments (.json), MMEngine's (.py), OpenPCDet's, ckpt "
    "train's or any YAML.",
)
@number("--world-size", help="Ranks of the new run.")
@click.option(
    "--model", type=PATH, help="The new model: a folder or file with its tensors, or its config.json."
)
@number("--groups", help="Parameter groups of the new optimizer.")
@click.option("--freeze", multiple=True, metavar="GLOB", help="Parameters that the new run does not train.")
@click.option("--buffer", multiple=True, metavar="GLOB", help="Tensors of the new model that are buffers.")
@click.option("--scheduler", metavar="CLASS", help="A scheduler that the code passes: LambdaLR ..., or none.")
@click.option("--optimizer", metavar="CLASS", help="An optimizer that the code passes: AdamW ...")
@click.option("--no-strict", is_flag=True, help="The code loads with load_module_strict=False.")
@click.option("--full", is_flag=True, help="Also read every byte, as ckpt verify does.")
@FOLLOW
@STATS
@TAG
@shown
def command(src: Path, no_strict: bool, **options: Any) -> int:
    """Foretell what happens when SRC is resumed: with which step and learning rate, or with which error.

    Whatever is not given is taken as unchanged. Each difference is safe, careful (it loads, but does not
    go on as before) or impossible (it does not load, or loads something wrong). Headers are read, nothing
    is launched; the errors are those of DeepSpeed 0.19.8. In a run folder, SRC is the checkpoint that
    auto-resume takes.

    Exit code 0: it will resume. 1: it will not, or the checkpoint is damaged. 2: it could not be told.
    """
    from ckpttools.operations.resume_check import resume_check
    from ckpttools.trainer.resume_check import TRAINER

    found = ask(resume_check, src, strict=not no_strict, trainer=TRAINER, **options)
    if options["as_json"]:
        render.document(document(found))
    else:
        show(found, quiet=options["quiet"])
    return 0 if found.resumes else 1
