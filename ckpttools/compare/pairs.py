"""What of two checkpoints is the same thing, though one may keep it otherwise than the other.

A checkpoint that keeps one fp32 copy of a weight (`.pt`, distributed, extracted weights) holds the master by
it, and the 16-bit weight as its rounding: it is compared with both of a ZeRO folder. One that keeps only the
16-bit weight holds no master: that is named, and is not called equal. A tied name that one side leaves out,
as safetensors folders do, is held by the name that it is tied to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from ckpttools.compare.content import MASTER, WEIGHT, Content, Held
from ckpttools.tensors import TensorRef
from ckpttools.tree import Value

# where a side has it: under the same kind, as its one fp32 copy, or as the rounding of that copy; or nowhere
As = Literal["own", "single", "rounded", "absent"]


class Pair(NamedTuple):
    """One for each tensor: hundreds of thousands are made."""

    kind: str
    name: str
    left: As = "own"
    right: As = "own"

    @property
    def is_whole(self) -> bool:
        """Whether both sides have it."""
        return self.left != "absent" and self.right != "absent"


def pairs(a: Content, b: Content) -> Iterator[Pair]:
    """Everything that either holds, by kind and name."""
    kinds = sorted(a.held.keys() | b.held.keys(), key=lambda kind: (kind != WEIGHT, kind != MASTER, kind))
    aliases = left_out(a, b) | left_out(b, a)
    for kind in kinds:
        left, right = a.held.get(kind, {}), b.held.get(kind, {})
        names = left.keys() | right.keys()
        if kind in (WEIGHT, MASTER):
            names -= aliases
        for name in sorted(names):
            pair = Pair(kind=kind, name=name, left=_as(kind, name, a, b), right=_as(kind, name, b, a))
            if pair.left != "absent" or pair.right != "absent":
                yield pair


def value(held: Held, pair: Pair, side: As, other: TensorRef | Value) -> TensorRef | Value:
    """What one side has, unread; `other` is what the other side has under the pair's own kind."""
    match side:
        case "own":
            return held[pair.kind][pair.name]
        case "single":
            return held[WEIGHT][pair.name]
        case "rounded":
            single = held[WEIGHT][pair.name]
            assert isinstance(single, TensorRef) and isinstance(other, TensorRef)
            return single.cast(other.dtype)
    return None


def _as(kind: str, name: str, side: Content, other: Content) -> As:
    if kind in (WEIGHT, MASTER) and _keeps_one(name, side, other):
        weight, theirs = side.held[WEIGHT][name], other.held.get(WEIGHT, {}).get(name)
        if kind == MASTER:
            return "single"
        if not isinstance(theirs, TensorRef):
            return "absent"  # the master says it all
        if _type(theirs) != _type(weight):
            return "rounded"
    return "own" if name in side.held.get(kind, {}) else "absent"


def _keeps_one(name: str, side: Content, other: Content) -> bool:
    """Whether a side's weight is of the type of the other's master, and it has no master itself."""
    weight, master = side.held.get(WEIGHT, {}).get(name), other.held.get(MASTER, {}).get(name)
    if name in side.held.get(MASTER, {}) or not isinstance(weight, TensorRef):
        return False
    return isinstance(master, TensorRef) and weight.dtype is master.dtype


def _type(value: TensorRef | Value) -> str:
    return value.dtype.name if isinstance(value, TensorRef) else ""


def left_out(side: Content, other: Content) -> set[str]:
    """Names of a tied set that the other side lacks while it has another name of the set."""
    sets: dict[str, set[str]] = {}
    for alias, owner in side.tied.items():
        sets.setdefault(owner, {owner}).add(alias)
    theirs = other.held.get(WEIGHT, {})
    return {name for tied in sets.values() if tied & theirs.keys() for name in tied - theirs.keys()}
