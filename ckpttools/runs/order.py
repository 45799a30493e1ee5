"""What newer means among checkpoints, and among runs.

Steps and iterations are different units (with accumulation an update takes several iterations): two
checkpoints are compared by a counter that both state. One that states none takes its place by the numbers in
its name where another is named alike, else by its time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence, Set
from typing import TypeVar

from ckpttools.numbered import numbers, shape

T = TypeVar("T", bound=Hashable)


def newest_first(
    items: Sequence[T],
    *,
    count: Callable[[T], tuple[float, ...] | None],
    name: Callable[[T], str],
    time: Callable[[T], int],
) -> list[T]:
    """The items by `count`, at one count by name or time; those without one between them, as well."""
    counts = {item: count(item) for item in items}
    told: dict[tuple[float, ...], list[T]] = {}
    for item in items:
        if (at := counts[item]) is not None:
            told.setdefault(at, []).append(item)
    out = [item for at in sorted(told, reverse=True) for item in _level(told[at], name, time)]
    rest = [item for item in items if counts[item] is None]
    kinds = Counter(shape(name(item)) for item in rest)
    # the most common kind of name first: the others find their place among them
    rest.sort(
        key=lambda item: (-kinds[shape(name(item))], shape(name(item)), numbers(name(item)), time(item))
    )
    counted = set(out)
    for item in rest:
        out.insert(_place(item, out, counted, name, time), item)
    return out


def _level(items: list[T], name: Callable[[T], str], time: Callable[[T], int]) -> list[T]:
    """Those with one count: by the numbers in their names where these are alike, else by time."""
    alike = len({shape(name(item)) for item in items}) == 1
    return sorted(items, key=lambda item: (numbers(name(item)) if alike else [], time(item)), reverse=True)


def _place(item: T, out: list[T], counted: Set[T], name: Callable[[T], str], time: Callable[[T], int]) -> int:
    """Where an item without a count belongs: by its number among those named alike, else by time among those
    with a count. Others have been placed by their names and say nothing about time.
    """
    own = name(item)
    alike = [at for at, other in enumerate(out) if shape(name(other)) == shape(own) and name(other) != own]
    if alike:
        older = (at for at in alike if numbers(name(out[at])) < numbers(own))
        return next(older, alike[-1] + 1)
    older = (at for at, other in enumerate(out) if time(other) < time(item))
    return next((at for at in older if not counted or out[at] in counted), len(out))
