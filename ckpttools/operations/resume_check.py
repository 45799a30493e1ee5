"""Will a checkpoint resume under the settings of a new run, where does it go on, and what has changed?"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ckpttools import resume
from ckpttools.checks import verify
from ckpttools.checks.changing import CHANGING
from ckpttools.errors import CkptError, Unsupported
from ckpttools.findings import ERROR, raised
from ckpttools.frameworks.rules import AutoResume
from ckpttools.location import Location
from ckpttools.operations.writing import Bar
from ckpttools.progress import progress_bar
from ckpttools.resume import Forecast, NewRun, Target
from ckpttools.schedules.lengths import check_sizes
from ckpttools.stores.files import named


class Trainer(Struct, frozen=True, kw_only=True):
    """A trainer above this library, with a configuration and a rule of its own: `ckpt train`."""

    owns: Callable[[Path], bool]  # whether a configuration file is its
    read: Callable[[Path, Target, NewRun], NewRun]  # what that says of a run which goes on from a checkpoint
    auto_resume: Callable[[Location], Iterable[AutoResume]]  # what it would take in a folder


def resume_check(
    src: str | Location,
    *,
    config: Path | None = None,
    world_size: int | None = None,
    model: Path | None = None,
    groups: int | None = None,
    freeze: Sequence[str] = (),
    buffer: Sequence[str] = (),
    scheduler: str | None = None,
    optimizer: str | None = None,
    strict: bool = True,
    full: bool = False,
    tag: str | None = None,
    workers: int = 0,
    bar: Bar | None = None,
    trainer: Trainer | None = None,
) -> Forecast:
    """Foretell what happens when a checkpoint is resumed; what is not given is taken as unchanged.

    `config` and `model` are files, the rest is what only the new run's code says (resume.NewRun). `full`
    reads every byte, as `verify` does. A damaged checkpoint is a forecast too, of one that does not resume.
    Raises UsageError or Unsupported where nothing can be told.

    >>> found = resume_check("fixtures/trainer/z2_bf16_2", world_size=4)
    >>> found.step, found.resumes, found.refusal.error
    (3, False, 'ZeRORuntimeException')
    """
    src = named(src)
    check_sizes({"--world-size": world_size, "--groups": groups}, most=1 << 20)
    ours = trainer if trainer is not None and config is not None and trainer.owns(config) else None
    run = replace(
        NewRun() if config is None or ours is not None else resume.read_config(config),
        world_size=world_size,
        model=None if model is None else resume.read_model(model),
        groups=groups,
        freeze=tuple(freeze) or None,
        buffers=tuple(buffer),
        scheduler=scheduler,
        optimizer=optimizer,
        strict=strict,
        versions=_installed(),
    )

    def foretold() -> tuple[Target, Forecast]:
        target = Target.find(src, tag)
        wanted = run if config is None or ours is None else ours.read(config, target, run)
        return target, resume.foretell(target, wanted)

    try:
        target, found = foretold()
    except CkptError as error:
        if error.exit_code != 1:
            raise
        if not _is_whole(src, tag):
            return resume.unreadable(src, error)
        target, found = foretold()  # a save has ended meanwhile
    own = () if trainer is None else trainer.auto_resume(src)
    found = replace(found, auto_resume=(*found.auto_resume, *own))
    return _verified(found, target, tag, full, workers, bar or partial(progress_bar, enabled=False))


def _is_whole(src: Location, tag: str | None) -> bool:
    """Whether nothing is wrong with what could not be read. Raises UsageError where it is being written."""
    try:
        return verify(src, tag, quick=True).ok
    except CkptError as reason:
        if reason.id == CHANGING:
            raise
        return False


def _installed() -> dict[str, str]:
    """Versions from package metadata: nothing is imported."""
    found = {}
    for name in ("deepspeed", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _verified(
    found: Forecast, target: Target, tag: str | None, full: bool, workers: int, bar: Bar
) -> Forecast:
    """The forecast with what `verify` says of the files."""
    try:
        verdict = verify(
            target.one, tag, quick=not full, glancing=True, workers=workers, bar=lambda n: bar(n, "verify")
        )
    except Unsupported as reason:
        return resume.with_verdict(found, None, f"not checked: {reason.message}")
    if verdict.exit_code == 2:  # what may not be read is no damage, and no forecast either
        raise raised(next(f for f in verdict.findings if f.severity == ERROR))
    read = "every byte was read" if full else "headers and files against each other; --full reads every byte"
    return resume.with_verdict(found, verdict, read)
