"""Nodes as opcodes: a pickle that loads to what the nodes stand for."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from ckpttools.containers.pickles.nodes import MISSING, Dict, Global, Node, Object, Persistent, Reject, Set
from ckpttools.containers.pickles.read import MAX_BYTES


def dumps(value: Node, persistent_id: Callable[[Node], Node] | None = None) -> bytes:
    """Write nodes as a pickle of protocol 2, as torch does, or higher where a node needs it.

    Nodes that occur twice are written once and referred to. `persistent_id` gives the persistent id of a
    node that this module does not know, or None. Raises Reject for a value that has no pickled form, or
    for a tuple that contains itself.
    """
    return _Writer(persistent_id).run(value)


_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
_LEAVES = {str, int, bool, type(None), Global}
_PLAIN = {*_LEAVES, tuple, list, Object, Dict, Set, Persistent, bytes, bytearray, float}
_WIDE, _DEEP = 8, 4  # items of a tuple, and tuples and calls within each other, that are written at once
_SUMMED = 1000  # pieces that are written between two looks at how much it is: each takes 40 bytes in memory
_GETS = tuple(b"h" + bytes([i]) for i in range(256))
_PUTS = tuple(b"q" + bytes([i]) for i in range(256))
_numbered = struct.Struct("<cI").pack


class _Raw:
    """Bytes still to be written, after which `put` is memoized."""

    __slots__ = ("data", "put")

    def __init__(self, data: bytes, put: Node = MISSING) -> None:  # hundreds of thousands are made
        self.data, self.put = data, put


class _Writer:
    def __init__(self, persistent_id: Callable[[Node], Node] | None) -> None:
        self.persistent_id = persistent_id
        self.out: list[bytes] = []
        self.memo: dict[int, int] = {}  # id of a node -> memo number
        self.texts: dict[str, int] = {}
        self.names: dict[Global, int] = {}
        self.count = 0
        self.kept: list[Node] = []
        self.open: set[int] = set()  # ids of tuples being written
        self.protocol = 2

    def run(self, value: Node) -> bytes:
        todo: list[Node] = [value]
        done = bytearray()
        while todo:
            if len(self.out) >= _SUMMED:
                done += b"".join(self.out)
                self.out.clear()
                # values that a pickle shares without a memo entry, such as long ints, can multiply
                if len(done) > MAX_BYTES:
                    raise Reject(f"the pickle to write is over the limit of {MAX_BYTES} bytes")
            node = todo.pop()
            if isinstance(node, _Raw):
                self.out.append(node.data)
                if node.put is not MISSING:
                    self.open.discard(id(node.put))
                    self.memo[id(node.put)] = self.put()
            else:
                self.write(node, todo)
        return b"".join((b"\x80", bytes([self.protocol]), done, *self.out, b"."))

    def put(self) -> int:
        i = self.count
        self.count += 1
        self.out.append(_PUTS[i] if i < 256 else _numbered(b"r", i))
        return i

    def get(self, i: int) -> None:
        self.out.append(_GETS[i] if i < 256 else _numbered(b"j", i))

    def need(self, protocol: int) -> None:
        self.protocol = max(self.protocol, protocol)

    def write(self, node: Node, todo: list[Node]) -> None:
        if (known := self.memo.get(id(node))) is not None:
            self.get(known)
            return
        match node:  # what there is most of, first
            case str():
                self.write_string(node)
            case bool():
                self.out.append(b"\x88" if node else b"\x89")
            case int():
                self.out.append(_int(node))
            case Object() if self.write_tensor(node) or self.write_numbers(node):
                pass
            case tuple() | Object() if self.is_short(node, _DEEP):
                self.write_short(node)
            case tuple():
                self.write_tuple(node, todo)
            case Object():
                self.write_object(node, todo)
            case None:
                self.out.append(b"N")
            case float():
                self.out.append(b"G" + struct.pack(">d", node))
            case bytes():
                self.need(3)
                self.out.append(b"B" + struct.pack("<I", len(node)) + node)
                self.memo[id(node)] = self.put()
            case bytearray():
                self.need(5)
                self.out.append(b"\x96" + struct.pack("<Q", len(node)) + bytes(node))
                self.memo[id(node)] = self.put()
            case Global():
                self.write_name(node)
            case list():
                self.out.append(b"]")
                self.memo[id(node)] = self.put()
                if len(node) > 1 and set(map(type, node)) == {int}:  # one for each parameter, on each rank
                    self.out += [b"(", _integers(node), b"e"]
                else:
                    _items(node, todo, b"e")
            case Dict():
                self.out.append(b"}")
                self.memo[id(node)] = self.put()
                _items([x for pair in node.pairs for x in pair], todo, b"u")
            case Set():
                self.need(4)
                if node.frozen:
                    todo.append(_Raw(b"\x91", node))
                    todo.extend(reversed(node.members))
                    self.out.append(b"(")
                else:
                    self.out.append(b"\x8f")
                    self.memo[id(node)] = self.put()
                    _items(node.members, todo, b"\x90")
            case Persistent():
                todo += [_Raw(b"Q", node), node.pid]
            case _:
                pid = self.persistent_id(node) if self.persistent_id else None
                if pid is None:
                    raise Reject(f"a {type(node).__name__} has no pickled form here")
                self.kept.append(pid)  # memo entries go by identity: nothing may be freed meanwhile
                todo += [_Raw(b"Q", node), pid]

    def write_tensor(self, node: Object) -> bool:
        """Write what most of a checkpoint is, a call as torch makes it for a tensor, in the order that `todo`
        would give: of a name, with a storage, a number, two tuples of numbers, a bool, and an empty call.
        False for all else.
        """
        args, memo = node.args, self.memo
        if len(args) != 6 or not _is_call(node) or id(args) in memo or id(args) in self.open:
            return False
        storage, offset, shape, strides, flag, hooks = args
        if type(offset) is not int or type(flag) is not bool or type(shape) is not tuple:
            return False
        if type(strides) is not tuple or not {int}.issuperset(map(type, (*shape, *strides))):
            return False
        if not isinstance(hooks, Object) or hooks.args or not _is_call(hooks) or id(hooks) in memo:
            return False
        if self.persistent_id is None or type(storage) in _PLAIN:
            return False
        pid = self.persistent_id(storage)
        if type(pid) is not tuple or len(pid) <= 3 or not _LEAVES.issuperset(map(type, pid)):
            return False
        out = self.out
        self.write_short(node.cls)
        out.append(b"(")
        if (known := memo.get(id(storage))) is not None:
            self.get(known)
        else:
            self.kept.append(pid)
            out.append(b"(")
            for part in pid:
                self.write_short(part)
            out.append(b"t")
            memo[id(pid)] = self.put()
            out.append(b"Q")
            memo[id(storage)] = self.put()
        out.append(_int(offset))
        for numbers in (shape, strides):
            if numbers and id(numbers) not in memo:
                out.append((b"(" if len(numbers) > 3 else b"") + b"".join(map(_int, numbers)))
                out.append(_TUPLES.get(len(numbers), b"t"))
                memo[id(numbers)] = self.put()
            else:
                self.write_short(numbers)
        out.append(b"\x88" if flag else b"\x89")
        self.write_short(hooks.cls)
        out.append(b")R")
        memo[id(hooks)] = self.put()
        out.append(b"t")
        memo[id(args)] = self.put()
        out.append(b"R")
        memo[id(node)] = self.put()
        return True

    def write_numbers(self, node: Object) -> bool:
        """Write an object without arguments whose state are integers by name, in the order that `todo` would
        give: DeepSpeed keeps an address for each parameter. False for all else.
        """
        state = node.state
        if node.how != "newobj" or node.args or node.pairs or node.items or type(node.cls) is not Global:
            return False
        if type(state) is not Dict or not state.pairs or id(state) in self.memo:
            return False
        if not all(type(key) is str and type(value) is int for key, value in state.pairs):
            return False
        self.write_name(node.cls)
        self.out.append(b")\x81")
        self.memo[id(node)] = self.put()
        self.out.append(b"}")
        self.memo[id(state)] = self.put()
        self.out.append(b"(")
        for key, value in state.pairs:
            self.write_short(key)
            self.write_short(value)
        self.out.append(b"ub")
        return True

    def is_short(self, node: Node, depth: int) -> bool:
        """Whether it is a tensor, or of the kind: calls of a few names and numbers, and storages."""
        kind = type(node)
        if kind in _LEAVES or id(node) in self.memo:
            return True
        if not depth or id(node) in self.open:  # what is an argument of itself is refused by the long way
            return False
        if kind is tuple:
            parts: tuple[Node, ...] = node  # type: ignore[assignment]
            if len(parts) > _WIDE:
                return False
        elif isinstance(node, Object):
            if node.how != "reduce" or node.pairs or node.items or node.has_state:
                return False
            parts = (node.cls, node.args)
        elif self.persistent_id is None or kind in (list, Dict, Set, Persistent, bytes, bytearray, float):
            return False
        else:
            parts = (self.persistent_id(node) or [],)
        for part in parts:  # noqa: SIM110  called for every tensor of a file
            if type(part) not in _LEAVES and not self.is_short(part, depth - 1):
                return False
        return True

    def write_short(self, node: Node) -> None:
        """What `is_short` at once, in the order that `todo` would give."""
        out = self.out
        if isinstance(node, str):
            self.write_string(node)
        elif node is None or isinstance(node, bool):
            out.append(b"N" if node is None else b"\x88" if node else b"\x89")
        elif isinstance(node, int):
            out.append(_int(node))
        elif isinstance(node, Global):
            self.write_name(node)
        elif (known := self.memo.get(id(node))) is not None:
            self.get(known)
        elif node == ():
            out.append(b")")
        else:
            if isinstance(node, tuple):
                if len(node) > 3:
                    out.append(b"(")
                for part in node:
                    self.write_short(part)
                out.append(_TUPLES.get(len(node), b"t"))
            elif isinstance(node, Object):
                self.write_short(node.cls)
                self.write_short(node.args)
                out.append(b"R")
            else:
                assert self.persistent_id is not None
                pid = self.persistent_id(node)
                self.kept.append(pid)
                self.write_short(pid)
                out.append(b"Q")
            self.memo[id(node)] = self.put()

    def write_string(self, text: str) -> None:
        if (known := self.texts.get(text)) is not None:
            self.get(known)
            return
        raw = text.encode("utf-8", "surrogatepass")
        self.out.append(b"X" + struct.pack("<I", len(raw)) + raw)
        self.texts[text] = self.put()

    def write_name(self, name: Global) -> None:
        if (known := self.names.get(name)) is not None:
            self.get(known)
            return
        if "\n" in name.module + name.name:
            raise Reject("the name of a class holds a line end")
        if "." in name.name:  # Python looks up names within a class only from protocol 4 on
            self.need(4)
        self.out.append(b"c" + f"{name.module}\n{name.name}\n".encode())
        self.names[name] = self.put()

    def write_tuple(self, node: tuple[Node, ...], todo: list[Node]) -> None:
        if not node:
            self.out.append(b")")
            return
        if id(node) in self.open:
            raise Reject("a tuple contains itself")
        self.open.add(id(node))
        n = len(node)
        todo.append(_Raw(_TUPLES.get(n, b"t"), node))
        todo.extend(reversed(node))
        if n > 3:
            self.out.append(b"(")

    def write_object(self, node: Object, todo: list[Node]) -> None:
        if id(node) in self.open:
            raise Reject("an object is an argument of its own constructor")
        self.open.add(id(node))
        if node.has_state:
            todo += [_Raw(b"b"), node.state]
        if node.pairs:
            _items([x for pair in node.pairs for x in pair], todo, b"u")
        if node.items:
            _items(node.items, todo, b"e")
        match node.how:
            case "reduce":
                todo += [_Raw(b"R", node), node.args, node.cls]
            case "newobj":
                todo += [_Raw(b"\x81", node), node.args, node.cls]
            case "newobj_ex":
                self.need(4)
                todo += [_Raw(b"\x92", node), node.kwargs, node.args, node.cls]
            case _:  # OBJ and INST differ only in how they name the class
                todo.append(_Raw(b"o", node))
                todo.extend(reversed(node.args))
                todo.append(node.cls)
                todo.append(_Raw(b"("))


def _is_call(node: Object) -> bool:
    """Of a name, and nothing is set afterwards."""
    plain = node.how == "reduce" and type(node.cls) is Global
    return plain and not (node.pairs or node.items or node.has_state)


def _items(values: Sequence[Node], todo: list[Node], end: bytes) -> None:
    if values:
        todo.append(_Raw(end))
        todo.extend(reversed(values))
        todo.append(_Raw(b"("))


def _integers(values: list[Any]) -> bytes:
    try:
        small = bytes(values)
    except ValueError:
        return b"".join(map(_int, values))
    both = bytearray(b"K\0") * len(small)
    both[1::2] = small
    return bytes(both)


def _int(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(raw) < 256:
        return b"\x8a" + bytes([len(raw)]) + raw
    return b"\x8b" + struct.pack("<i", len(raw)) + raw
