"""The weights of a checkpoint that is going to be removed: written beside it, and read back, before it goes.

`weights-of-NAME` is a name that no framework takes for one of its own. Whatever ends the program in between
leaves the checkpoint, the weights, or both; the next run takes weights that are there as they are, if every
byte of them is what the checkpoint holds: a name says nothing of what was written under it.
"""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from ckpttools import checks
from ckpttools.checks import check_before_use
from ckpttools.compare.content import WEIGHT
from ckpttools.compare.digests import digests
from ckpttools.errors import CkptError, UsageError, some
from ckpttools.formats import read
from ckpttools.operations.destination import default_dst
from ckpttools.operations.digest import Digested, compare
from ckpttools.operations.extract import extract
from ckpttools.operations.source import find
from ckpttools.operations.writing import Bar, Writing
from ckpttools.stores.files import exists
from ckpttools.stores.links import within
from ckpttools.tensors import TensorRef
from ckpttools.transforms.select import weights_only
from ckpttools.tree import Key, tensors


class Slim(Struct, frozen=True, kw_only=True):
    """Where the weights go, and the bytes that they take anew: 0 where they are there already."""

    destination: Path
    nbytes: int


def planned(path: Path) -> Slim:
    """What keeps a checkpoint's weights. Raises CkptError where they cannot be, or the place is taken."""
    dst = default_dst(path, "weights", "")
    _refuse_more(path)
    if exists(dst):
        _refuse_other(path, dst)
        return Slim(destination=dst, nbytes=0)
    made = extract(path, dst, how=Writing(dry_run=True))
    return Slim(destination=dst, nbytes=made.plan.nbytes)


def carry_out(path: Path, kept: Slim, *, workers: int = 0, bar: Bar | None = None) -> None:
    """Write the weights, unless they are there, and read every byte of them. Raises CkptError where they are
    not the checkpoint's: it must stay then.
    """
    if exists(kept.destination):
        _refuse_other(path, kept.destination, workers)
    else:
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


def _refuse_more(path: Path) -> None:
    """Raises CkptError where a checkpoint has other weights than those that are kept: an average of them, a
    second network."""
    source = find(path)
    with within(source.root):
        checkpoint = read(source)
    others = [key for key, value in checkpoint.client.items() if any(map(_is_weight, tensors(value)))]
    if others := [*others, *checkpoint.below, *checkpoint.unread]:
        raise UsageError(
            "slim-partial",
            f"it has other weights as well: {some(others)}",
            where=path,
            why="what is written beside it holds the model's alone, and the others would be gone",
            hint="prune without --slim, or pin it: ckpt pin",
        )


def _is_weight(found: tuple[tuple[Key, ...], TensorRef]) -> bool:
    path, _ = found
    return bool(path) and str(path[-1]).rpartition(".")[2] in ("weight", "bias")


def _refuse_other(path: Path, dst: Path, workers: int = 0) -> None:
    """Raises CkptError unless `dst` is good and holds all weights of the checkpoint, and nothing else."""
    if (
        not checks.verify(dst, quick=True).ok
        or not compare(_weights(path, workers), _weights(dst, workers), (WEIGHT,)).same
    ):
        raise UsageError(
            "destination-exists",
            f"{dst.name} is there, and is no good copy of its weights",
            where=dst,
            why="it holds fewer weights, others, or those of another training",
            hint="move it away",
        )


def _weights(path: Path, workers: int) -> Digested:
    """The best copy of each weight, by its digest; every byte of them is read."""
    source = find(path)
    found = weights_only(check_before_use(source), None)
    with within(source.root):
        return Digested(path=path, source=source, checkpoint=found, digests=digests(found, workers=workers))
