"""What an optimizer keeps for a flat group, however deeply it is nested: each value partitioned or
replicated.

DeepSpeed's own rule decides: a flat tensor as long as the partition is cut over the ranks, all else is
carried by each rank for itself. bitsandbytes nests its moments one level deeper, other optimizers keep
lists. A value that is neither partitioned on all ranks nor the same on all ranks belongs to its rank
(block-wise 8-bit scales, Muon's momentum of whole parameters): it can be carried, not cut, and `unaccounted`
names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from ckpttools.containers.nodes import decode
from ckpttools.formats.cutting import equal
from ckpttools.formats.zero.decode import Rank
from ckpttools.formats.zero.flat import FlatGroup
from ckpttools.tensors import TensorRef
from ckpttools.tree import Path, Value, dotted, leaves


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value inside the state of a flat parameter, and the keys that lead to it."""

    path: Path
    value: Value

    @property
    def ref(self) -> TensorRef | None:
        return self.value if isinstance(self.value, TensorRef) else None


State = Mapping[str, Leaf]  # by kind: the keys joined by dots


@dataclass(frozen=True, slots=True)
class Unaccounted:
    """A kind of state of a group that cannot be cut for other ranks, and why; `rank` shows it."""

    group: int
    kind: str
    rank: int
    problem: str


def state_of(rank: Rank, g: int) -> State:
    """Everything that a rank keeps for its partition of group `g`, by kind."""
    found = (
        Leaf((key, *path), value)
        for key, node in rank.moments[g].items()
        for path, value in leaves(decode(rank.file, node))
    )
    return {dotted(leaf.path): leaf for leaf in found}


def partitioned(ranks: Sequence[Rank], states: Sequence[State], g: int, group: FlatGroup) -> tuple[str, ...]:
    """The kinds that are cut over the ranks: on every one a flat tensor as long as its partition."""

    def cut(i: int, rank: Rank, kind: str) -> bool:
        leaf = states[i].get(kind)
        ref = leaf.ref if leaf is not None else None
        lean = group.part - group.padding(i)
        lengths = {group.part, lean, rank.fp32[g].shape[0]}
        return ref is not None and len(ref.shape) == 1 and ref.shape[0] in lengths

    if not group.part:
        return ()
    return tuple(kind for kind in states[0] if all(cut(i, rank, kind) for i, rank in enumerate(ranks)))


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
