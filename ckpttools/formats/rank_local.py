"""Optimizer state of single ranks of a ZeRO folder: neither cut over all of them nor the same on all.

Block-wise 8-bit scales, Muon's momentum of whole parameters, what an optimizer measures for itself. It can be
resumed on as many ranks; no other partitions and no other format have a place for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from msgspec import Struct

from ckpttools.containers.nodes import decode
from ckpttools.containers.pickles import Node
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import Unsupported, escape
from ckpttools.findings import INFO, WARNING, Finding
from ckpttools.formats.cutting import equal
from ckpttools.formats.found import ONE_SAVE, found
from ckpttools.location import Location
from ckpttools.tensors import TensorRef
from ckpttools.tree import Path, Value, dotted, leaves


class Leaf(Struct, frozen=True):
    """A value inside the state of a flat parameter, and the keys that lead to it."""

    path: Path
    value: Value

    @property
    def ref(self) -> TensorRef | None:
        return self.value if isinstance(self.value, TensorRef) else None


State = Mapping[str, Leaf]  # by kind: the keys joined by dots


def state_of(file: TorchFile, kept: Iterable[tuple[str, Node]]) -> State:
    """What an optimizer keeps for a flat parameter, however deeply it is nested: bitsandbytes has its moments
    one level deeper, other optimizers keep lists.
    """
    found = (Leaf((key, *path), value) for key, node in kept for path, value in leaves(decode(file, node)))
    return {dotted(leaf.path): leaf for leaf in found}


class Unaccounted(Struct, frozen=True):
    """A kind of state of a group that cannot be cut for other ranks, and why; `rank` shows it."""

    group: int
    kind: str
    rank: int
    problem: str


def unaccounted(
    g: int, states: Sequence[State], cut: Sequence[str], whole: Sequence[str] = ()
) -> Iterator[Unaccounted]:
    """What no other number of ranks can be given: reads the bytes of replicated tensors.

    `whole` names kinds that span whole parameters, whatever their length.
    """
    for kind in dict.fromkeys(chain.from_iterable(states)):
        lacking = next((i for i, state in enumerate(states) if kind not in state), None)
        if lacking is not None:
            yield Unaccounted(g, kind, lacking, "exists on some ranks only")
            continue
        found = [state[kind] for state in states]
        first = found[0]
        if kind in whole:
            yield Unaccounted(g, kind, 0, "spans the whole parameters that touch a rank's partition")
            continue
        if kind in cut:
            if first.ref is not None and not first.ref.dtype.is_float:
                yield Unaccounted(g, kind, 0, f"is quantised ({first.ref.dtype.short}): blocks are not cut")
            other = next((i for i, leaf in enumerate(found) if leaf.path != first.path), None)
            if other is not None:
                yield Unaccounted(g, kind, other, "is nested differently on the ranks")
            continue
        other = next((i for i, leaf in enumerate(found) if not equal(first.value, leaf.value)), None)
        if other is not None:
            yield Unaccounted(
                g, kind, other, "differs between the ranks and is not cut like their partitions"
            )


def refuse(local: Iterable[Unaccounted], files: Sequence[Location], unit: str) -> None:
    """Raise Unsupported where there is any: refused by name, never taken from one rank. `files` are the
    ranks', a `unit` is what a number of `Unaccounted.group` stands for.
    """
    every = list(local)
    if every:
        first = every[0]
        more = f" (and {len(every) - 1} more)" if len(every) > 1 else ""
        raise Unsupported(
            "rank-local-state",
            f"optimizer state '{escape(first.kind)}' of {unit} {first.group} {first.problem}{more}",
            where=files[first.rank],
            why="it belongs to one rank's partition: on other partitions it would be another rank's state",
            hint="resume on the same number of ranks; the weights alone: ckpt extract --weights-only",
        )


def finding(each: Unaccounted, leaf: Leaf, file: Location, unit: str) -> Finding:
    """A rank may measure for itself, but all of them count alike."""
    counts = isinstance(leaf.value, int)
    return found(
        "rank-local-state",
        file,
        f"{unit} {each.group} {each.kind}",
        each.problem,
        severity=WARNING if counts else INFO,
        hint=ONE_SAVE if counts else "resume it on the same number of ranks: it cannot be resharded",
    )
