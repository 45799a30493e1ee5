"""Taking values out of a pickle's tree, with the path into the data in every error."""

from __future__ import annotations

from ckpttools.containers.pickles import Dict, Node, Object
from ckpttools.containers.pickles import as_mapping as _as_mapping
from ckpttools.errors import CkptError, escape
from ckpttools.location import Location

Mapping = Dict | Object  # a dict, an OrderedDict ...: what pickles.as_mapping gives


MAX_RANKS = 65_536
LARGEST = 10**300


def bad_field(path: Location, field: str, problem: str) -> CkptError:
    return CkptError(
        "field-damaged",
        f"{escape(field)} {problem}",
        where=path,
        why="the file does not have the contents that its format requires",
        hint="the file is damaged, or a tool other than the framework wrote it: use another copy",
    )


def as_mapping(node: Node) -> Mapping | None:
    """The node if it is a dict, an OrderedDict ..., else None."""
    pairs = _as_mapping(node)
    assert pairs is None or isinstance(pairs, (Dict, Object))
    return pairs


def mapping(path: Location, node: Node, field: str) -> Mapping:
    """The node as a mapping; `field` is its path into the data."""
    pairs = as_mapping(node)
    if pairs is None:
        raise bad_field(path, field, "is missing" if node is None else "is not a dict")
    return pairs


def sequence(path: Location, node: Node, field: str) -> list[Node]:
    if not isinstance(node, list | tuple):
        raise bad_field(path, field, "is missing" if node is None else "is not a list")
    return list(node)


def integer(node: Node) -> int | None:
    """A plain int, or None for anything else (a bool is not an int here)."""
    return node if isinstance(node, int) and not isinstance(node, bool) else None


def number(node: Node) -> float | int | None:
    """A finite or non-finite float or int; numpy scalars are not looked into."""
    return bounded(node) if isinstance(node, float | int) and not isinstance(node, bool) else None


def bounded(value: float | int) -> float | int:
    """A number as it is; an int that no float can be made of, as the largest power of ten that one can."""
    return max(-LARGEST, min(value, LARGEST)) if isinstance(value, int) else value


def count(path: Location, node: Node, field: str, limit: int = 1 << 20) -> int:
    """A small non-negative int."""
    value = integer(node)
    if value is None or not 0 <= value <= limit:
        raise bad_field(path, field, "is missing" if node is None else "is not a plausible count")
    return value


def ranks(path: Location, node: Node, field: str) -> int | None:
    """A number of ranks, None where none is stated. Raises CkptError for more than any job has: the files
    that are looked for grow with it.
    """
    stated = integer(node)
    if stated is not None and not 1 <= stated <= MAX_RANKS:
        raise bad_field(path, field, f"is {stated}, which is no number of ranks")
    return stated


def counts(path: Location, node: Node, field: str) -> tuple[int, ...]:
    """A list of such numbers, of which every rank may have one for each parameter."""
    numbers = sequence(path, node, field)
    if set(map(type, numbers)) == {int}:
        plain = tuple(x for x in numbers if isinstance(x, int)) if any(numbers) else (0,) * len(numbers)
        if min(plain) >= 0 and max(plain) <= 1 << 20:
            return plain
    return tuple(count(path, x, field) for x in numbers)


def text(path: Location, node: Node, field: str) -> str:
    if not isinstance(node, str):
        raise bad_field(path, field, "is missing" if node is None else "is not text")
    return node
