"""The mean of the weights of several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from ckpttools import runs
from ckpttools.checks import check_before_use
from ckpttools.errors import UsageError, escape
from ckpttools.operations.extract import Form, form_of, write
from ckpttools.operations.source import find, tags_for
from ckpttools.operations.writing import Writing, Written
from ckpttools.runs.kinds import series
from ckpttools.stores.files import local
from ckpttools.stores.links import resolved
from ckpttools.transforms.average import average as mean_of
from ckpttools.transforms.cast import cast, dtype_named


def average(
    *paths: str | Path,
    dst: str | Path,
    weights: Sequence[float] = (),
    last: int | None = None,
    dtype: str | None = None,
    form: Form | None = None,
    max_shard_size: int = 5_000_000_000,
    tags: Sequence[str] = (),
    how: Writing | None = None,
) -> Written:
    """Write the mean of the weights of several checkpoints of one model, whatever their layouts.

    `last` takes the newest so many of the one run that `paths` names. `weights` are how much each counts, in
    the order of the paths. Sums are in float64; what is not a floating point number, counters and
    configuration are the last one's. `dst` is a folder that transformers loads, or one file. Raises CkptError
    where names or shapes differ.

    >>> made = average("fixtures/hf-trainer/plain", last=2, dst=out / "mean.safetensors")
    >>> made.destination.name, made.notes[0]
    ('mean.safetensors', 'the mean of 2 checkpoints: sums in float64, rounded once')
    """
    dst = Path(dst)
    form = form_of(form, dst)
    target = dtype_named(dtype)
    given = [Path(path) for path in paths]
    chosen, told = (given, []) if last is None else _newest(given, last)
    sources = [find(path, tag) for path, tag in zip(chosen, tags_for(chosen, tags), strict=True)]
    if len({resolved(source.target) for source in sources}) < len(sources):
        raise UsageError(
            "bad-usage",
            "the same checkpoint is named twice",
            where=", ".join(map(str, paths)),
            why="its weights would count twice",
            hint="give it more weight with --weights, in place of naming it again",
        )
    read = [check_before_use(source) for source in sources]
    made = mean_of(read, weights)
    if target is not None:
        made = cast(made, target)
    made = replace(made, notes=(*(note for note in made.notes if note not in read[-1].notes), *told))
    return write(made, chosen[-1], sources[-1], dst, form, max_shard_size, None, how, "average")


def _newest(paths: Sequence[Path], count: int) -> tuple[list[Path], list[str]]:
    """The newest checkpoints of one run that can be read and are of the newest one's series, oldest first;
    and what to tell of them.
    """
    if len(paths) != 1:
        raise UsageError(
            "bad-usage",
            "--last takes one run's folder",
            where="--last",
            why="which checkpoints are the last is a matter of one run",
            hint="name the run, or leave out --last",
        )
    found = runs.runs(paths[0])
    if len(found) > 1:
        names = ", ".join(escape(run[0].run) for run in found[:5])
        raise UsageError(
            "several-runs",
            f"{len(found)} runs are below the folder",
            where=paths[0],
            why=f"the mean of checkpoints of several runs is asked for by naming them: {names}",
            hint="name one run's folder",
        )
    listed = found[0] if found else []
    entries = [entry for entry in listed if entry.problem is None]
    stems = {entry.path: stem for entry in entries if (stem := series(entry)) is not None}
    alike = [local(path) for path, stem in stems.items() if stem == next(iter(stems.values()))]
    if len(alike) < count:
        raise UsageError(
            "too-few",
            f"{len(alike)} checkpoints of one series are here, {count} are asked for",
            where=paths[0],
            why="a mean of fewer would be another one than was asked for",
            hint="ckpt ls shows them",
        )
    notes = [f"the mean of {', '.join(escape(path.name) for path in alike[:count])}"]
    for entry in listed:
        if entry.path == alike[count - 1]:
            break
        if entry.problem is not None:
            notes.append(f"passed over: {escape(entry.path.name)}: {escape(entry.problem.message, 300)}")
    return alike[count - 1 :: -1], notes
