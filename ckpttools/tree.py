"""Plain values as a checkpoint holds them, without loss: what every format reads into and writes from.

A `Value` is None, bool, int, float, str, bytes, a tuple, a list, a dict (OrderedDict, Counter) with str
and int keys, a `TensorRef` for a tensor, or `Opaque` for anything else. Tuples stay tuples, a tensor of one
element stays a tensor (with its dtype), and an object of an unknown class is carried for the format that can
write it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from ckpttools.tensors import TensorRef

Key = str | int
Path = tuple[Key, ...]
Value = Any  # the union above: recursive unions cost more in casts than they catch
MAX_DEPTH = 64


class Opaque(Struct, frozen=True, eq=False):
    """A saved object that is no plain value: `node` is the container's own, `shown` names it for people.

    It is known by its identity, never looked into, and written back only by a format of the same container.
    """

    node: object
    shown: str = "an object"

    def __deepcopy__(self, memo: object) -> Opaque:
        """Itself: a node is never changed."""
        return self

    def __str__(self) -> str:
        return self.shown


class At(int):
    """A place in a list, as a key of a path: equal to its number, and no key of a dict."""

    def empty(self) -> list[Value] | tuple[Value, ...]:
        return []


class AtTuple(At):
    """The same in a tuple."""

    def empty(self) -> list[Value] | tuple[Value, ...]:
        return ()


def same(a: Value, b: Value, depth: int = MAX_DEPTH) -> bool:
    """Whether two values are equal in type and content: 1 is not True nor 1.0, NaN equals NaN.

    Tensors are equal where they are the same bytes of the same files, opaque objects where they are the very
    same node. Mappings are compared in order.
    """
    if a is b:
        return True
    if depth < 0 or type(a) is not type(b):
        return False
    match a:
        case float():
            return bool(a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
        case Opaque():
            return a.node is b.node
        case Mapping():
            return list(a) == list(b) and all(
                type(x) is type(y) and same(a[x], b[y], depth - 1) for x, y in zip(a, b, strict=True)
            )
        case list() | tuple():
            return len(a) == len(b) and all(same(x, y, depth - 1) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def at(value: Value, *path: Key) -> Value:
    """What the keys and indices lead to, None where there is nothing."""
    for key in path:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and isinstance(key, int):
            value = value[key] if -len(value) <= key < len(value) else None
        else:
            return None
    return value


def put(value: Value, path: Path, new: Value) -> Value:
    """A copy in which `path` leads to `new`; what is not there yet is made on the way: lists and tuples where
    the path comes from `leaves` of one, else dicts.
    """
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(key, At) and value is None:
        value = key.empty()
    if isinstance(value, list | tuple) and isinstance(key, int):
        made = [*value, *[None] * (key + 1 - len(value))]
        made[key] = put(made[key], rest, new)
        return type(value)(made)
    pairs = dict(value) if isinstance(value, Mapping) else {}
    pairs[key] = put(pairs.get(key), rest, new)
    return pairs if not isinstance(value, Mapping) else type(value)(pairs)  # type: ignore[call-arg]


def leaves(value: Value, path: Path = (), depth: int = MAX_DEPTH) -> Iterator[tuple[Path, Value]]:
    """Every value that is no container, with the path that leads to it; empty containers are leaves."""
    if depth > 0 and isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key), depth - 1)
    elif depth > 0 and isinstance(value, list | tuple) and value:
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, AtTuple(i) if isinstance(value, tuple) else At(i)), depth - 1)
    else:
        yield path, value


def tensors(value: Value) -> Iterator[tuple[Path, TensorRef]]:
    """Every tensor inside a value."""
    return ((path, leaf) for path, leaf in leaves(value) if isinstance(leaf, TensorRef))


def dotted(path: Path) -> str:
    """A path for people: `state[0].exp_avg`."""
    shown = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return shown.removeprefix(".")


def plain(value: Value, depth: int = 12) -> object:
    """The value as JSON-ready data, for people."""
    if depth <= 0:
        return "…"
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): plain(inner, depth - 1) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner, depth - 1) for inner in value]
        case bytes() | bytearray():
            return f"<{len(value)} bytes>"
        case TensorRef():
            return f"<tensor {value.dtype.name} {list(value.shape)}>"
    return f"<{value}>"
