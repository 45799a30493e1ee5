"""The weights of a checkpoint that is going to be removed: written beside it, and read back, before it goes.

`weights-of-NAME` is a name that no framework takes for one of its own. Whatever ends the program in between
leaves the checkpoint, the weights, or both; the next run takes weights that are there and good as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpttools import checks
from ckpttools.errors import CkptError, UsageError
from ckpttools.operations.extract import extract
from ckpttools.operations.writing import Bar, Writing
from ckpttools.siblings import default_dst
from ckpttools.stores.files import exists


@dataclass(frozen=True, slots=True, kw_only=True)
class Slim:
    """Where the weights go, and the bytes that they take anew: 0 where they are there already."""

    destination: Path
    nbytes: int


def planned(path: Path) -> Slim:
    """What keeps a checkpoint's weights. Raises CkptError where they cannot be, or the place is taken."""
    dst = default_dst(path, "weights", "")
    if exists(dst):
        if not checks.verify(dst, quick=True).ok:
            raise UsageError(
                "destination-exists",
                f"{dst.name} is there, and is no good copy of its weights",
                where=dst,
                hint="move it away",
            )
        return Slim(destination=dst, nbytes=0)
    made = extract(path, dst, how=Writing(dry_run=True))
    return Slim(destination=dst, nbytes=made.plan.nbytes)


def carry_out(path: Path, kept: Slim, *, workers: int = 0, bar: Bar | None = None) -> None:
    """Write the weights, unless they are there, and read every byte of them. Raises CkptError where they are
    not what was written: the checkpoint must stay then.
    """
    if not exists(kept.destination):
        extract(path, kept.destination, how=Writing(workers=workers, bar=bar))
    verdict = checks.verify(kept.destination, workers=workers)
    if not verdict.ok:
        raise CkptError(
            "slim-unverified",
            f"the copy of its weights is {verdict.words}",
            where=kept.destination,
            why="the checkpoint itself was left as it is",
            hint="ckpt verify says more; remove the copy, and run ckpt prune again",
        )
