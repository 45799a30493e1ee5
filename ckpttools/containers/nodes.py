"""Between the nodes of a torch file's pickle and plain values: both ways, without loss.

A node that no plain value can stand for (an unknown class, a set, a dict with other keys) becomes `Opaque`
and is written back as it was read.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

from ckpttools.containers.pickles import Dict, Global, Node, Object, Persistent, as_mapping, walk
from ckpttools.containers.torch_file import Storage, TorchFile, new_storage, tensor_node
from ckpttools.tensors import TensorRef, join_chunks
from ckpttools.tree import MAX_DEPTH, At, AtTuple, Key, Opaque, Value, same

ORDERED, COUNTER = Global("collections", "OrderedDict"), Global("collections", "Counter")


def ordered(pairs: Iterable[tuple[Node, Node]]) -> Object:
    """An OrderedDict: what torch makes of a state dict, and DeepSpeed of shapes."""
    node = Object("reduce", ORDERED, ())
    node.pairs = list(pairs)
    return node


class StateDict(OrderedDict[Node, Value]):
    """An OrderedDict that has attributes, as module.state_dict() has `_metadata`: they stay a node."""

    attributes: Node


def decode(file: TorchFile, node: Node) -> Value:
    """A node as a plain value; tensors as `TensorRef`, unread. A node that occurs twice is decoded once."""
    return _Decoder(file).value(node, MAX_DEPTH)


_PLAIN, _CONTAINERS = (str, int, float, bytes, type(None)), (list, tuple, dict)
_UNFOLDED, _FOLDS = 100_000, 16  # items of a value in which nothing is shared, and times each may be reached


class _Decoder:
    """Nobody who walks a value asks what it has seen, so what is shared may not unfold to more than a small
    multiple of what was read: forty lists that each hold the next one twice are 10^12 items.
    """

    def __init__(self, file: TorchFile) -> None:
        self.file = file
        self.known: dict[int, Value] = {}
        self.unfolded: dict[int, int] = {}  # of a list, tuple or dict: items that a walk meets
        self.read = 0  # items of all of them, each once

    def value(self, node: Node, depth: int) -> Value:
        if isinstance(node, _PLAIN):
            return node
        key = id(node)
        if key not in self.known:
            self.known[key] = Opaque(node, "a value that holds itself")
            made = self.made(node, depth - 1)
            if isinstance(made, _CONTAINERS) and self.unfolds(made):
                made = Opaque(node, "a value that holds the same parts too often")
            self.known[key] = made
        return self.known[key]

    def unfolds(self, made: list[Value] | tuple[Value, ...] | dict[Key, Value]) -> bool:
        """Whether a walk meets far more items in it than were read."""
        items = made.values() if isinstance(made, dict) else made
        self.read += len(made)
        self.unfolded[id(made)] = n = 1 + sum(self.unfolded.get(id(item), 1) for item in items)
        return n > max(_UNFOLDED, _FOLDS * self.read)

    def made(self, node: Node, depth: int) -> Value:
        if depth < 0:
            return Opaque(node, "a value that is nested too deeply")
        if type(node) is list:
            return [self.value(item, depth) for item in node]
        if type(node) is tuple:
            return tuple(self.value(item, depth) for item in node)
        if isinstance(node, Dict) and keyed(node):
            return {key: self.value(inner, depth) for key, inner in node.pairs}
        if isinstance(node, Object):
            view = self.file.view(node)
            if view is not None:
                return view.ref
            if node.cls == ORDERED and not (node.args or node.items) and keyed(node):
                pairs = [(key, self.value(inner, depth)) for key, inner in node.pairs]
                if not node.has_state:
                    return OrderedDict(pairs)
                if not any(isinstance(each, Persistent) for each in walk(node.state)):
                    held = StateDict(pairs)
                    held.attributes = node.state
                    return held
            if node.cls == COUNTER and not (node.pairs or node.items or node.has_state):
                (of,) = node.args if len(node.args) == 1 else (None,)
                if isinstance(of, Dict) and keyed(of) and all(type(n) is int for _, n in of.pairs):
                    return Counter(dict(of.pairs))
            return Opaque(node, str(node.cls) if isinstance(node.cls, Global) else "an object")
        return Opaque(node, str(node) if isinstance(node, Global) else f"a {type(node).__name__.lower()}")


def keyed(node: Dict | Object) -> bool:
    """Whether a plain dict can stand for a mapping: str and int keys, none of them twice."""
    keys = [key for key, _ in node.pairs]
    return all(type(key) in (str, int) for key in keys) and len(set(keys)) == len(keys)


def encode(value: Value, storages: dict[object, Storage] | None = None) -> Node:
    """The node that is written for a value. Tensors of the same bytes share a storage within `storages`."""
    storages = {} if storages is None else storages
    match value:
        case TensorRef():
            return encode_tensor(value, storages)
        case OrderedDict():
            node = Object("reduce", ORDERED, ())
            node.pairs = [(key, encode(inner, storages)) for key, inner in value.items()]
            if isinstance(value, StateDict):
                node.state = value.attributes
            return node
        case Counter():
            return Object("reduce", COUNTER, (Dict.of(value.items()),))
        case Mapping():
            return Dict.of((key, encode(inner, storages)) for key, inner in value.items())
        case list():
            return [encode(inner, storages) for inner in value]
        case tuple():
            return tuple(encode(inner, storages) for inner in value)
        case Opaque():
            return value.node
    return value


def encode_tensor(ref: TensorRef, storages: dict[object, Storage]) -> Object:
    """A tensor's node; one that has the chunks of an earlier one is a view of the same storage."""
    key = (ref.dtype.name, join_chunks(ref.chunks)) if ref.numel else object()
    if key not in storages:
        storages[key] = new_storage(ref.dtype, ref.numel, ref.chunks)
    return tensor_node(TensorRef(ref.dtype, ref.shape, ()), storages[key])


def kept(file: TorchFile, old: Node, value: Value, storages: dict[object, Storage] | None = None) -> Node:
    """The node for a value that was read from `old` of `file` and may have changed: what has not stays as it
    was.

    Mappings and lists of the same length are compared item by item, so that one changed value leaves the
    classes, orders and objects around it alone.
    """
    if same(decode(file, old), value):
        return old
    pairs = as_mapping(old)
    if isinstance(pairs, Dict | Object) and isinstance(value, Mapping) and keyed(pairs):
        before = {key: node for key, node in pairs.pairs if isinstance(key, str | int)}
        return _with_pairs(
            pairs,
            [
                (key, kept(file, before[key], new, storages) if key in before else encode(new, storages))
                for key, new in value.items()
            ],
        )
    if isinstance(old, list | tuple) and type(old) is type(value) and len(old) == len(value):
        return type(old)(kept(file, a, b, storages) for a, b in zip(old, value, strict=True))
    return encode(value, storages)


def put_node(node: Node, path: tuple[Key, ...], new: Node) -> Node:
    """A copy of the node in which `path` leads to `new`; what is not there yet is made, as tree.put does."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(key, At) and node is None:
        node = () if isinstance(key, AtTuple) else []
    if isinstance(node, list | tuple) and isinstance(key, int):
        made = [*node, *[None] * (key + 1 - len(node))]
        made[key] = put_node(made[key], rest, new)
        return type(node)(made)
    old = as_mapping(node)
    if not isinstance(old, Dict | Object):
        return Dict.of([(key, put_node(None, rest, new))])
    if key in old:
        return _with_pairs(old, [(k, put_node(v, rest, new) if k == key else v) for k, v in old.pairs])
    return _with_pairs(old, [*old.pairs, (key, put_node(None, rest, new))])


def _with_pairs(old: Dict | Object, pairs: list[tuple[Node, Node]]) -> Dict | Object:
    if isinstance(old, Dict):
        return Dict.of(pairs)
    made = Object(old.how, old.cls, old.args, old.kwargs)
    made.items, made.state, made.pairs = old.items, old.state, pairs
    return made
