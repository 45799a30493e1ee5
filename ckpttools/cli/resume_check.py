"""ckpt resume-check: will it resume under the new settings, where does it go on, and what has changed?"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ckpttools.cli import render
from ckpttools.cli.options import FOLLOW, PATH, SRC, STATS, TAG, number, shown
from ckpttools.cli.resume_report import document, show
from ckpttools.errors import CkptError, UsageError
from ckpttools.location import Location
from ckpttools.stores.files import is_file, is_folder


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
def command(
    src: Path,
    config: Path | None,
    world_size: int | None,
    model: Path | None,
    groups: int | None,
    freeze: tuple[str, ...],
    buffer: tuple[str, ...],
    scheduler: str | None,
    optimizer: str | None,
    no_strict: bool,
    full: bool,
    tag: str | None,
    as_json: bool,
    quiet: bool,
    workers: int,
    no_progress: bool,
) -> int:
    """Foretell what happens when SRC is resumed: with which step and learning rate, or with which error.

    Whatever is not given is taken as unchanged. Each difference is safe, careful (it loads, but does not
    go on as before) or impossible (it does not load, or loads something wrong). Headers are read, nothing
    is launched; the errors are those of DeepSpeed 0.19.8. In a run folder, SRC is the checkpoint that
    auto-resume takes.

    Exit code 0: it will resume. 1: it will not, or the checkpoint is damaged. 2: it could not be told.
    """
    from ckpttools import resume
    from ckpttools.schedules.lengths import check_sizes

    check_sizes({"--world-size": world_size, "--groups": groups}, most=1 << 20)
    ours = config is not None and _is_trainers(config)
    run = resume.NewRun() if config is None or ours else resume.read_config(config)
    if model is not None:
        run = replace(run, model=resume.read_model(model))
    run = replace(
        run,
        world_size=world_size,
        groups=groups,
        freeze=freeze or None,
        buffers=buffer,
        scheduler=scheduler,
        optimizer=optimizer,
        strict=not no_strict,
        versions=_installed(),
    )
    try:
        target = resume.Target.find(src, tag)
        if config is not None and ours:
            from ckpttools.trainer.compared import read_new_run

            run = read_new_run(config, target, run)
        found = resume.foretell(target, run)
    except CkptError as error:
        if error.exit_code != 1:
            raise
        found = resume.unreadable(src, error)
    else:
        own = _auto_resume(src)
        found = replace(found, auto_resume=(*found.auto_resume, *own))
        found = _verified(found, target, tag, full, workers, quiet=quiet or no_progress)
    if as_json:
        render.document(document(found))
    else:
        show(found, quiet=quiet)
    return 0 if found.resumes else 1


def _is_trainers(config: Path) -> bool:
    """Whether a YAML file is `ckpt train`'s: all its names are."""
    from ckpttools.resume import read_yaml
    from ckpttools.trainer import SETTINGS

    if config.suffix not in (".yaml", ".yml") or not is_file(config):
        return False
    return set(read_yaml(config)) <= set(SETTINGS)


def _installed() -> dict[str, str]:
    """Versions from package metadata: nothing is imported."""
    found = {}
    for name in ("deepspeed", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _auto_resume(src: Location) -> Iterator[Any]:
    """The rule of `ckpt train --resume`, which runs where its checkpoints are."""
    from ckpttools.frameworks.rules import AutoResume

    try:
        from ckpttools.trainer import folders, search
    except UsageError:  # the extra of `ckpt train` is not installed: nobody resumes by its rule here
        return
    if isinstance(src, Path) and is_folder(src) and (found := folders.tags(src)):
        taken = next(iter(search.newest_first(src)), None)
        pointer = is_file(src / folders.POINTER)
        yield AutoResume(
            framework="ckpt train --resume",
            path=taken,
            why="what last_checkpoint names, else the newest"
            if pointer
            else "the newest: no last_checkpoint",
            found=tuple(path.name for path in found[-12:]),
        )


def _verified(found: Any, target: Any, tag: str | None, full: bool, workers: int, *, quiet: bool) -> Any:
    from ckpttools.checks import verify
    from ckpttools.errors import Unsupported
    from ckpttools.findings import ERROR, raised
    from ckpttools.resume import with_verdict

    try:
        verdict = verify(
            target.one,
            tag,
            quick=not full,
            glancing=True,
            workers=workers,
            bar=lambda n: render.bars(enabled=not quiet)(n, "verify"),
        )
    except Unsupported as reason:
        return with_verdict(found, None, f"not checked: {reason.message}")
    if verdict.exit_code == 2:  # what may not be read is no damage, and no forecast either
        raise raised(next(f for f in verdict.findings if f.severity == ERROR))
    read = "every byte was read" if full else "headers and files against each other; --full reads every byte"
    return with_verdict(found, verdict, read)
