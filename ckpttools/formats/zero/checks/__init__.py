"""Checks on the headers of a ZeRO-1/2 folder: does each file fit its name, and do all fit together?

Each check takes the decoded folder and yields findings. Nothing but a few scalars is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ckpttools.findings import Finding
from ckpttools.formats.zero.checks import model, ranks, training
from ckpttools.formats.zero.checks.ranks import archive_roots
from ckpttools.formats.zero.join import ZeroFolder

__all__ = ["archive_roots", "check_folder"]

CHECKS: tuple[Callable[[ZeroFolder], Iterator[Finding]], ...] = (
    ranks.slice_mappings,
    ranks.paddings,
    ranks.moments,
    ranks.second_moment,
    ranks.of_single_ranks,
    ranks.state_kept,
    ranks.same_on_all_ranks,
    training.counters,
    training.scheduler,
    model.shapes,
    model.frozen_shapes,
    model.dtypes,
    model.required_fields,
    training.plausible_settings,
    model.module_names,
    model.tied_weights,
    model.strays,
)


def check_folder(folder: ZeroFolder) -> Iterator[Finding]:
    """Every header check, in the order of CHECKS."""
    for check in CHECKS:
        yield from check(folder)
