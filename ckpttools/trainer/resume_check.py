"""What `ckpt resume-check` asks of this trainer: which configurations are its, what they say of a run, and
which checkpoint `--resume` takes. What needs the packages of training is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckpttools.errors import UsageError
from ckpttools.frameworks.rules import AutoResume
from ckpttools.location import Location
from ckpttools.operations.resume_check import Trainer
from ckpttools.resume import NewRun, Target, read_yaml
from ckpttools.stores.files import is_file, is_folder
from ckpttools.trainer import SETTINGS


def _owns(config: Path) -> bool:
    """Whether a YAML file is `ckpt train`'s: all its names are."""
    if config.suffix not in (".yaml", ".yml") or not is_file(config):
        return False
    return set(read_yaml(config)) <= set(SETTINGS)


def _read(config: Path, target: Target, run: NewRun) -> NewRun:
    from ckpttools.trainer.compared import read_new_run  # msgspec

    return read_new_run(config, target, run)


def _auto_resume(src: Location) -> Iterator[AutoResume]:
    """The rule of `--resume`, which runs where its checkpoints are."""
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


TRAINER = Trainer(owns=_owns, read=_read, auto_resume=_auto_resume)
