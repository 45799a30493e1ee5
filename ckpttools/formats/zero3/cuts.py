"""The arithmetic of ZeRO-3: parts of parameters, and which of them share a sub-group. All numbers count
elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def part_of(numel: int, ranks: int) -> int:
    """What each rank holds of a parameter, padding included (Init.partition_numel)."""
    return -(-numel // ranks)


def held(numel: int, ranks: int, rank: int) -> int:
    """How many of a rank's elements are the parameter's own; the others are padding."""
    part = part_of(numel, ranks)
    return max(0, min(part, numel - rank * part))


def sub_groups(numels: Mapping[str, int], ranks: int, limit: int) -> list[list[str]]:
    """A parameter group in sub-groups: each is closed as soon as its parts reach `limit`. A group without
    trained parameters has none.

    Source: DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups.
    """
    names = list(numels)
    if not names:
        return []
    if limit >= sum(part_of(numel, ranks) for numel in numels.values()):
        return [names]
    made: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if filled >= limit:
            made.append([])
            filled = 0
        made[-1].append(name)
        filled += part_of(numels[name], ranks)
    return made


def starts(numels: Sequence[int], ranks: int) -> list[int]:
    """Where each parameter's part begins in a rank's flat vector, and where the vector ends."""
    out = [0]
    for numel in numels:
        out.append(out[-1] + part_of(numel, ranks))
    return out
