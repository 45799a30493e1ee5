"""The arithmetic of ZeRO's flat groups: order, alignment, partitions, paddings, slice mappings.

All numbers count elements. Verified against DeepSpeed's own re-saves by the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatGroup:
    """One group's flat vector over `ranks` partitions.

    `names` are in flat order, `numels` their sizes and `gaps` the alignment zeros after each of them.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    gaps: tuple[int, ...]
    ranks: int
    alignment: int  # the flat vector's size is a multiple of this: 2 * ranks since DeepSpeed 0.5.2

    @property
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

    def mapping(
        self, rank: int, starts: Mapping[str, int], order: Sequence[str]
    ) -> dict[str, tuple[int, int]]:
        """name -> (numel, start) of the fragments within one rank's partition, in `order`."""
        low, high = rank * self.part, (rank + 1) * self.part
        numels = dict(zip(self.names, self.numels, strict=True))
        out: dict[str, tuple[int, int]] = {}
        for name in order:
            first, last = max(low, starts[name]), min(high, starts[name] + numels[name])
            if first < last:
                out[name] = (last - first, first - low)
        return out


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
