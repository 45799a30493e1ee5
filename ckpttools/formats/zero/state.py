"""What an optimizer keeps for a flat group, however deeply it is nested: each value partitioned or
replicated.

DeepSpeed's own rule decides: a flat tensor as long as the partition is cut over the ranks, all else is
carried by each rank for itself. bitsandbytes nests its moments one level deeper, other optimizers keep
lists. A value that is neither partitioned on all ranks nor the same on all ranks belongs to its rank
(block-wise 8-bit scales, Muon's momentum of whole parameters): it can be carried, not cut, and `unaccounted`
names it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckpttools.containers.nodes import decode
from ckpttools.formats.rank_local import Leaf, State
from ckpttools.formats.zero.decode import Rank
from ckpttools.formats.zero.flat import FlatGroup
from ckpttools.tree import dotted, leaves


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
