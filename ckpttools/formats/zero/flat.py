"""The arithmetic of ZeRO's flat groups: order, alignment, partitions, paddings, slice mappings.

All numbers count elements. Verified against DeepSpeed's own re-saves by the tests.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate

from msgspec import Struct

from ckpttools.formats.deepspeed import original


class Slices:
    """Which parameters lie in a stretch of a flat vector, found without looking at the others."""

    def __init__(self, order: Sequence[str], starts: Mapping[str, int], numels: Mapping[str, int]) -> None:
        places = sorted((starts[name], place, name) for place, name in enumerate(order))
        self._places = places
        self._starts = [start for start, _, _ in places]
        self._numels = numels
        # one that begins earlier may end later, where round-robin starts are those of another order
        self._ends = list(accumulate((start + numels[name] for start, _, name in places), max))

    def between(self, low: int, high: int) -> dict[str, tuple[int, int]]:
        """name -> (numel, start from `low`) of the fragments, in the order given."""
        found: list[tuple[int, str, int, int]] = []
        for start, place, name in self._places[
            bisect_right(self._ends, low) : bisect_left(self._starts, high)
        ]:
            first, last = max(low, start), min(high, start + self._numels[name])
            if first < last:
                found.append((place, name, last - first, first - low))
        return {name: (numel, start) for _, name, numel, start in sorted(found)}


class FlatGroup(Struct, frozen=True, kw_only=True, dict=True):
    """One group's flat vector over `ranks` partitions.

    `names` are in flat order, `numels` their sizes and `gaps` the alignment zeros after each of them.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    gaps: tuple[int, ...]
    ranks: int
    alignment: int  # the flat vector's size is a multiple of this: 2 * ranks since DeepSpeed 0.5.2

    @cached_property
    def used(self) -> int:
        """Elements up to the end of the last parameter."""
        return sum(self.numels) + sum(self.gaps)

    @property
    def total(self) -> int:
        return -(-self.used // self.alignment) * self.alignment

    @property
    def part(self) -> int:
        """Elements of each rank's partition, padding included."""
        return self.total // self.ranks

    def padding(self, rank: int) -> int:
        """Padding elements within one rank's partition."""
        return min(self.part, max(0, (rank + 1) * self.part - self.used))

    def starts(self) -> dict[str, int]:
        """Where each parameter begins in the flat vector."""
        out: dict[str, int] = {}
        at = 0
        for name, numel, gap in zip(self.names, self.numels, self.gaps, strict=True):
            out[name] = at
            at += numel + gap
        return out

    def mapping(self, rank: int, slices: Slices) -> dict[str, tuple[int, int]]:
        """name -> (numel, start) of the fragments within one rank's partition."""
        return slices.between(rank * self.part, (rank + 1) * self.part)

    def slices(self, order: Sequence[str]) -> Slices:
        """What DeepSpeed makes its `param_slice_mappings` from, of parameters in the optimizer's order."""
        numels = dict(zip(self.names, self.numels, strict=True))
        return Slices(order, mapping_starts(order, self), numels)

    @cached_property
    def in_order(self) -> Slices:
        return self.slices(self.names)

    @cached_property
    def in_turns(self) -> Slices:
        """With round-robin."""
        return self.slices(original(self.names, self.ranks))


def alignment_gaps(numels: Sequence[int], boundary: int) -> tuple[int, ...]:
    """Zeros after each parameter but the last, so that each one starts on a multiple of `boundary`."""
    gaps: list[int] = []
    at = 0
    for i, numel in enumerate(numels):
        at += numel
        gap = 0 if i == len(numels) - 1 else -at % boundary
        gaps.append(gap)
        at += gap
    return tuple(gaps)


def mapping_starts(names: Sequence[str], group: FlatGroup) -> dict[str, int]:
    """The starts that DeepSpeed computes its `param_slice_mappings` from.

    It walks the parameters in the optimizer's order even where round-robin has moved them, unless the group
    has alignment gaps (`_link_all_hp_params` passes `param_offsets` only then). With round-robin the saved
    mappings are therefore wrong, and harmless: only ds_to_universal reads them.
    """
    if any(group.gaps):
        return group.starts()
    numels = dict(zip(group.names, group.numels, strict=True))
    out: dict[str, int] = {}
    at = 0
    for name in names:
        out[name] = at
        at += numels[name]
    return out
