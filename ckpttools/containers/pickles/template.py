"""A pickle as a template: bytes that are the same in every save of a run, and the numbers between them."""

from __future__ import annotations

import struct
from collections.abc import Set as Keys

from msgspec import Struct

from ckpttools.containers.pickles.cursor import unpack_u16
from ckpttools.containers.pickles.machine import Machine
from ckpttools.containers.pickles.nodes import Dict, Node, Object, Pairs, Persistent, Reject, Set
from ckpttools.containers.pickles.opcodes import STOP, TABLE

_NUMBERS = b"KMJG\x8a"  # BININT1, BININT2, BININT, BINFLOAT, LONG1
_KEEPS = b"qrp\x942"  # the value before these is used again elsewhere
_WIDEST = 8  # bytes of a LONG1
_unpack_i32 = struct.Struct("<i").unpack_from
_unpack_f64 = struct.Struct(">d").unpack_from

# where numbers lie in a value: the place in a list, tuple or the pairs of a dict (None: an object's state),
# then deeper, or the number's place among all
Trail = dict[int | None, "Trail | int"]


class Template(Struct, frozen=True):
    """`literals` surround the numbers, in file order; `trail` says where in the value they lie."""

    literals: tuple[bytes, ...]
    trail: Trail

    @classmethod
    def of(cls, data: bytes, counts: Keys[str]) -> Template:
        """The template of a pickle that was read before: every float that is an item or a value is a number
        of it, of the integers those under the keys `counts`. None of them is where a shape or a name of
        something could depend on it, or in a list or dict that is in several places.
        """
        found: list[tuple[_Spot, list[int | None]]] = []
        value = _spotted(data)
        _find(value, [], found, counts, _shared(value))
        found = [each for each in found if data[each[0].end] not in _KEEPS]
        found.sort(key=lambda each: each[0].at)
        trail: Trail = {}
        literals, before = [], 0
        for i, (spot, steps) in enumerate(found):
            literals.append(data[before : spot.at])
            before = spot.end
            inner = trail
            for step in steps[:-1]:
                deeper = inner.setdefault(step, {})
                assert isinstance(deeper, dict)
                inner = deeper
            inner[steps[-1]] = i
        return cls((*literals, data[before:]), trail)

    def numbers(self, data: bytes) -> list[Node] | None:
        """The numbers of another pickle that is this one otherwise; None where it is not."""
        out: list[Node] = []
        pos = 0
        try:
            for literal in self.literals[:-1]:
                if not data.startswith(literal, pos):
                    return None
                number = _number(data, pos + len(literal))
                if number is None:
                    return None
                value, pos = number
                out.append(value)
        except (IndexError, struct.error):
            return None
        last = self.literals[-1]
        return out if len(data) - pos == len(last) and data.startswith(last, pos) else None

    def filled(self, value: Node, numbers: list[Node]) -> Node:
        """A copy of the template's own value with other numbers; all else in it is shared."""
        return _filled(value, self.trail, numbers)


class _Spot(Struct, frozen=True, eq=False):
    """Stands for a number: from its opcode to the byte after it."""

    at: int
    end: int
    whole: bool


def _spotted(data: bytes) -> Node:
    """The value, with a spot in place of every number."""
    machine = Machine(data, 0, Persistent, 1)
    while True:
        at = machine.pos
        operation = TABLE[data[at]]
        if operation is None:
            raise Reject("an opcode is not allowed", at)
        machine.pos, machine.frame_end = at + 1, 0
        if operation(machine) is STOP:
            return machine.result().value
        if data[at] in _NUMBERS:
            machine.stack[-1] = _Spot(at, machine.pos, data[at] != 0x47)


def _shared(value: Node) -> set[int]:
    """The identities of the nodes that lie in several places: a new number must be in all of them."""
    seen: set[int] = set()
    shared: set[int] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, list | tuple | Pairs | Persistent | Set):
            continue
        if id(node) in seen:
            shared.add(id(node))
            continue
        seen.add(id(node))
        match node:
            case Persistent():
                waiting.append(node.pid)
            case Set():
                waiting += node.members
            case Pairs():
                waiting += (each for pair in node.pairs for each in pair)
                if isinstance(node, Object):
                    waiting += (*node.args, node.kwargs, *node.items, node.state)
            case _:
                waiting += node
    return shared


def _find(
    node: Node,
    steps: list[int | None],
    out: list[tuple[_Spot, list[int | None]]],
    counts: Keys[str],
    shared: set[int],
) -> None:
    """Depth first; arguments of calls, keys, what is `shared` or lies too deep: they must not differ."""
    if id(node) in shared or len(steps) > 40:
        return
    items: list[tuple[int | None, Node, bool]] = []
    if isinstance(node, list | tuple):
        items = [(i, item, False) for i, item in enumerate(node)]
    elif isinstance(node, Pairs):
        items = [
            (i, item, isinstance(key, str) and key in counts) for i, (key, item) in enumerate(node.pairs)
        ]
        if isinstance(node, Object) and node.has_state:
            items.append((None, node.state, False))
    for step, item, counted in items:
        if not isinstance(item, _Spot):
            _find(item, [*steps, step], out, counts, shared)
        elif counted or not item.whole:
            out.append((item, [*steps, step]))


def _number(data: bytes, at: int) -> tuple[Node, int] | None:
    """The number whose opcode is here, and where the next one is."""
    match data[at]:
        case 0x4B:
            return data[at + 1], at + 2
        case 0x4D:
            return unpack_u16(data, at + 1)[0], at + 3
        case 0x4A:
            return _unpack_i32(data, at + 1)[0], at + 5
        case 0x47:
            return _unpack_f64(data, at + 1)[0], at + 9
        case 0x8A if (n := data[at + 1]) <= _WIDEST and at + 2 + n <= len(data):
            return int.from_bytes(data[at + 2 : at + 2 + n], "little", signed=True), at + 2 + n
    return None


def _filled(node: Node, trail: Trail, numbers: list[Node]) -> Node:
    into = {i: value for i, value in trail.items() if i is not None}
    out: Node
    if isinstance(node, list | tuple):
        items = list(node)
        for i, inner in into.items():
            items[i] = numbers[inner] if isinstance(inner, int) else _filled(items[i], inner, numbers)
        out = items if isinstance(node, list) else tuple(items)
    else:
        assert isinstance(node, Dict | Object)
        if isinstance(node, Object):
            out = copy = Object(node.how, node.cls, node.args, node.kwargs)
            copy.items, copy.state = node.items, node.state
            state = trail.get(None)
            if isinstance(state, dict):
                copy.state = _filled(node.state, state, numbers)
        else:
            out = Dict()
        assert isinstance(out, Pairs)
        pairs = list(node.pairs)
        for i, inner in into.items():
            key, value = pairs[i]
            pairs[i] = (key, numbers[inner] if isinstance(inner, int) else _filled(value, inner, numbers))
        out.pairs = pairs
    return out
