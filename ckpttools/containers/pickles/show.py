"""Nodes as values for people: classes as text, nothing built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from ckpttools.containers.pickles.nodes import Global, Node, Object, Persistent, Set, as_mapping

T = TypeVar("T")


def plain(node: Node, depth: int = 12, limit: int = 100_000) -> object:
    """The node as JSON-ready values, for people: classes shown as text, never built.

    Past `depth` levels or `limit` values, "…": shared nodes are repeated, so a small file can be huge here.
    """
    return _plain(node, depth, [limit])


def _plain(node: Node, depth: int, left: list[int]) -> object:
    left[0] -= 1
    if depth <= 0 or left[0] < 0:
        return "…"
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, bytes | bytearray):
        return f"<{len(node)} bytes>"
    if (pairs := as_mapping(node)) is not None:
        return {
            k if isinstance(k, str) else str(_plain(k, min(depth - 1, 2), left)): _plain(v, depth - 1, left)
            for k, v in _some(pairs.pairs, left)
        }
    match node:
        case list() | tuple():
            return [_plain(x, depth - 1, left) for x in _some(node, left)]
        case Set():
            return [_plain(x, depth - 1, left) for x in _some(node.members, left)]
        case Global():
            return str(node)
        case Persistent():
            return "<storage>"
        case Object():
            shown: dict[str, object] = {"$class": _plain(node.cls, min(depth - 1, 2), left)}
            if node.args:
                shown["args"] = _plain(node.args, depth - 1, left)
            if node.items:
                shown["items"] = _plain(node.items, depth - 1, left)
            if node.has_state:
                shown["state"] = _plain(node.state, depth - 1, left)
            return shown
    return f"<{type(node).__name__}>"


def _some(values: Iterable[T], left: list[int]) -> Iterator[T]:
    for value in values:
        if left[0] < 0:
            return
        yield value
