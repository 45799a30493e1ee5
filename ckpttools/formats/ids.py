"""Which parameters the ids of a torch optimizer are: by their names, else by order and shape, never by guess.

An optimizer numbers its parameters in the order in which it was given them. A group built from
`model.parameters()` follows the model's order, which is the state dict's; where parameters were left out or
spread over groups, shapes decide, and only where they leave one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from msgspec import Struct

from ckpttools.errors import some

Shape = tuple[int, ...]


class Ids(Struct, frozen=True):
    """The names of each group's ids, or why they are not known."""

    names: tuple[tuple[str, ...], ...] = ()
    problem: str | None = None


def by_shape(groups: Sequence[Sequence[Shape | None]], model: Mapping[str, Shape]) -> Ids:
    """Names for ids of which only the shapes are known, None where not even that.

    `model` are the parameters that there are, in the model's order.
    """
    return _one_group(groups[0], model) if len(groups) == 1 else _several(groups, model)


def _one_group(ids: Sequence[Shape | None], model: Mapping[str, Shape]) -> Ids:
    """The ids are some of the model's parameters, in its order: known if that can be in one way only."""
    names, shapes = list(model), list(model.values())
    first = _leftmost(ids, shapes)
    if first is None:
        return Ids(problem=f"its {len(ids)} parameters are not those of the model, in the model's order")
    backwards = _leftmost(ids[::-1], shapes[::-1])
    assert backwards is not None  # what fits from the left fits from the right
    last = [len(shapes) - 1 - at for at in reversed(backwards)]
    # every way lies between the leftmost and the rightmost one
    open_ids = [i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b]
    if open_ids:
        unclear = dict.fromkeys(shapes[first[i]] for i in open_ids)
        return Ids(problem=f"parameters of the shape {_shown(unclear)} fit in more than one way")
    return Ids(names=(tuple(names[at] for at in first),))


def _leftmost(ids: Sequence[Shape | None], shapes: Sequence[Shape]) -> list[int] | None:
    """The first places, in order, whose shapes are those of the ids; None where there are none."""
    found: list[int] = []
    at = 0
    for shape in ids:
        while at < len(shapes) and shape is not None and shapes[at] != shape:
            at += 1
        if at == len(shapes):
            return None
        found.append(at)
        at += 1
    return found


def _several(groups: Sequence[Sequence[Shape | None]], model: Mapping[str, Shape]) -> Ids:
    """A shape is known where one group has all parameters of it; they are in the model's order there."""
    if any(shape is None for group in groups for shape in group):
        return Ids(problem="parameters have no state of their shape, and there are several groups")
    named: dict[Shape | None, list[str]] = {}
    for name, shape in model.items():
        named.setdefault(shape, []).append(name)
    unclear: dict[Shape, None] = {}
    for shape in dict.fromkeys(shape for group in groups for shape in group if shape is not None):
        counts = [sum(each == shape for each in group) for group in groups]
        if sum(counts) != len(named.get(shape, [])) or sum(map(bool, counts)) != 1:
            unclear[shape] = None
    if unclear:
        return Ids(problem=f"parameters of the shape {_shown(unclear)} fit in more than one way")
    rest = {shape: iter(names) for shape, names in named.items()}
    found = tuple(tuple(next(rest[shape]) for shape in group) for group in groups)
    place = {name: at for at, name in enumerate(model)}
    for names in found:
        if any(place[a] > place[b] for a, b in pairwise(names)):
            repeated = {model[name]: None for name in names if len(named[model[name]]) > 1}
            if repeated:
                return Ids(problem=f"a group is not in the model's order: {_shown(repeated)} may be any")
    return Ids(names=found)


def _shown(shapes: Mapping[Shape, None]) -> str:
    return some([list(shape) for shape in shapes])
