"""The stack machine: opcodes of protocols 0 to 5 to nodes. Nothing is looked up, imported or called.

The opcodes are those of CPython's `pickletools`. Refused, since no checkpoint needs them and they cannot
be data: PERSID, EXT1/2/4, NEXT_BUFFER, READONLY_BUFFER.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from ckpttools.containers.pickles.cursor import Cursor, old_string, unpack_u32
from ckpttools.containers.pickles.known import ARGUMENTS_DECIDE
from ckpttools.containers.pickles.nodes import (
    NO_KEYWORDS,
    Dict,
    Global,
    Node,
    Object,
    Pairs,
    Persistent,
    Pickle,
    Reject,
    Set,
)

MAX_BYTES = 256 << 20
MAX_MEMO = 5_000_000
MAX_STACK = 2_000_000
MAX_MARKS = 10_000
MAX_NAME = 512
# 400,000 tensors or 20 million logged numbers: the rest of the work is bounded with them
MAX_OPCODES = 20_000_000
MAX_CALLS = 3_000_000  # with the names of classes, which cost most


def loads(
    data: bytes,
    *,
    start: int = 0,
    exact: bool = True,
    persistent: Callable[[Node], Node] | None = None,
    limits: int = 1,
) -> Pickle:
    """Read one pickle that begins at `start`. With `exact`, STOP must be the last byte.

    `persistent` turns a persistent id into the node that stands for it (a Persistent by default). `limits`
    multiplies what a pickle may memoize, call and do, for one that is large by its nature.
    Raises Reject for anything that is not a well-formed pickle of data.
    """
    if len(data) > MAX_BYTES:
        raise Reject(f"a pickle of {len(data)} bytes is over the limit of {MAX_BYTES}")
    machine = _Machine(data, start, persistent or Persistent, limits)
    result = machine.run()
    if exact and result.end != len(data):
        raise Reject(f"{len(data) - result.end} bytes follow the end of the pickle", result.end)
    return result


_FREQUENT = b"rhK)\x89j"
_STOP = object()  # what the last opcode gives


class _Machine(Cursor):
    """Stack, marks and memo over the bytes."""

    def __init__(self, data: bytes, start: int, persistent: Callable[[Node], Node], limits: int) -> None:
        super().__init__(data, start)
        self.persistent = persistent
        self.limits = limits
        self.stack: list[Node] = []
        self.marks: list[list[Node]] = []
        self.memo: list[Node] = []  # picklers number from 0
        self.far: dict[int, Node] = {}  # and the others, for picklers that do not
        self.globals: dict[tuple[str, str], Global] = {}
        self.protocol = 0
        self.frame_end = 0
        self.calls: list[Object] = []
        self.called: set[int] = set()  # of names whose first call tells all
        self.ncalls = 0
        self.changed: list[Object] = []
        self.thrown_away = 0  # values popped

    def run(self) -> Pickle:
        try:
            self.work()
        except (IndexError, struct.error):
            raise Reject("an opcode finds too little on the stack or in the file", self.pos) from None
        if self.marks or len(self.stack) != 1:
            raise Reject("the pickle does not leave exactly one value", self.pos)
        return Pickle(
            value=self.stack[0],
            end=self.pos,
            protocol=self.protocol,
            calls=self.calls,
            names=list(self.globals.values()),
            changed=self.changed,
        )

    def work(self) -> None:
        """Every opcode up to STOP. Those that make up two thirds of a checkpoint's pickle are carried out
        here while they are ordinary; all others, and all limits, in the table.
        """
        data, end, table = self.data, self.end, _TABLE
        memo, far, memo_limit = self.memo, self.far, self.limits * MAX_MEMO
        pos, before, frame_end, stack = self.pos, self.pos, self.frame_end, self.stack
        for _ in range(self.limits * MAX_OPCODES):
            if frame_end and pos >= frame_end:
                self.end_frame(pos, before)
                frame_end = 0
            if pos >= end:
                raise Reject("the pickle ends before STOP", pos)
            before, opcode = pos, data[pos]
            if opcode in _FREQUENT and len(stack) < MAX_STACK:
                if opcode == 0x72:  # LONG_BINPUT
                    i = len(memo)
                    if i < memo_limit and not far and stack and unpack_u32(data, pos + 1)[0] == i:
                        memo.append(stack[-1])
                        pos += 5
                        continue
                elif opcode == 0x68:  # BINGET
                    i = data[pos + 1]
                    if i < len(memo):
                        stack.append(memo[i])
                        pos += 2
                        continue
                elif opcode == 0x4B:  # BININT1
                    stack.append(data[pos + 1])
                    pos += 2
                    continue
                elif opcode == 0x29:  # EMPTY_TUPLE
                    stack.append(())
                    pos += 1
                    continue
                elif opcode == 0x89:  # NEWFALSE
                    stack.append(False)
                    pos += 1
                    continue
                elif opcode == 0x6A:  # LONG_BINGET
                    i = unpack_u32(data, pos + 1)[0]
                    if i < len(memo):
                        stack.append(memo[i])
                        pos += 5
                        continue
            operation = table[opcode]
            if operation is None:
                raise Reject(f"opcode 0x{opcode:02x} is unknown or not allowed", pos)
            self.pos = pos + 1
            if operation(self) is _STOP:
                return
            pos, frame_end, stack = self.pos, self.frame_end, self.stack
        raise Reject(f"more than {MAX_OPCODES} opcodes", pos)

    def push(self, value: Node) -> None:
        if len(self.stack) >= MAX_STACK:
            raise Reject("the stack is over its limit", self.pos)
        self.stack.append(value)

    def pop_mark(self) -> list[Node]:
        if not self.marks:
            raise Reject("an opcode needs a MARK that is not there", self.pos)
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # opcodes: frame and stack

    def proto(self) -> None:
        at = self.pos - 1
        version = self.u8()
        if at != self.start or version > 5:
            raise Reject(f"PROTO {version} is misplaced or unknown", at)
        self.protocol = version

    def frame(self) -> None:
        n = self.u64()
        if self.frame_end or n > self.end - self.pos:
            raise Reject("a frame is nested or longer than the file", self.pos)
        self.frame_end = self.pos + n if n else 0

    def end_frame(self, pos: int, before: int) -> None:
        if pos > self.frame_end:
            raise Reject("an opcode crosses the end of its frame", before)
        self.frame_end = 0

    def mark(self) -> None:
        if len(self.marks) >= MAX_MARKS:
            raise Reject("MARKs are nested too deep", self.pos)
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        self.throw_away(1)
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def throw_away(self, n: int) -> None:
        # a pickler throws away only the beginnings of tuples and objects that contain themselves
        self.thrown_away += n
        if self.thrown_away > 10_000 + (self.pos - self.start) // 16:
            raise Reject("it throws away most of what it makes", self.pos)

    # opcodes: memo

    def remember(self, i: int) -> None:
        value, known = self.stack[-1], len(self.memo)
        if not 0 <= i < 2**32 or known + len(self.far) >= self.limits * MAX_MEMO:
            raise Reject("the memo is over its limit", self.pos)
        if i == known and i not in self.far:
            self.memo.append(value)
        elif i < known:
            self.memo[i] = value
        else:
            self.far[i] = value

    def recall(self, i: int) -> None:
        try:
            self.push(self.memo[i] if 0 <= i < len(self.memo) else self.far[i])
        except KeyError:
            raise Reject(f"memo entry {i} was never stored", self.pos) from None

    def persid(self) -> None:
        self.stack[-1] = self.persistent(self.stack[-1])

    # opcodes: containers

    def tuple_of(self, n: int) -> None:
        if n > len(self.stack):
            raise IndexError
        self.stack[-n:] = [tuple(self.stack[-n:])]

    def additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, Set) or target.frozen:
            raise Reject("ADDITEMS on something that is not a set", self.pos)
        target.members.extend(items)

    def paired(self, items: list[Node]) -> list[tuple[Node, Node]]:
        if len(items) % 2:
            raise Reject("a dict has a key without a value", self.pos)
        return list(zip(items[::2], items[1::2], strict=True))

    def extend(self, items: list[Node]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Object):
            self.change(target)
            target.items.extend(items)
        else:
            raise Reject("APPEND on something that is not a list", self.pos)

    def change(self, target: Object) -> None:
        # no pickler writes items after the state, and a state can name any function as `append`
        if target.has_state:
            raise Reject("items or a state are given to an object after its state", self.pos)
        if not target.items and not target.pairs:
            self.changed.append(target)

    def set_pairs(self, items: list[Node]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Pairs):
            raise Reject("SETITEM on something that is not a dict", self.pos)
        if isinstance(target, Object):
            self.change(target)
        target.extend(self.paired(items))

    def setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pairs([key, value])

    # opcodes: names and calls, all inert

    def intern(self, module: Node, name: Node) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Reject("the name of a class is not text", self.pos)
        if not module or not name or len(module) > MAX_NAME or len(name) > MAX_NAME:
            raise Reject("the name of a class is empty or too long", self.pos)
        self.count_call()
        key = (module, name)
        if key not in self.globals:
            self.globals[key] = Global(module, name)
        return self.globals[key]

    def global_text(self) -> Global:
        try:
            return self.intern(self.line(MAX_NAME * 4).decode(), self.line(MAX_NAME * 4).decode())
        except UnicodeDecodeError:
            raise Reject("the name of a class is not UTF-8", self.pos) from None

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(self.intern(module, name))

    def count_call(self) -> None:
        self.ncalls += 1
        if self.ncalls > self.limits * MAX_CALLS:
            raise Reject(f"more than {MAX_CALLS} calls and names", self.pos)

    def call(self, how: str, cls: Node, args: Node, kwargs: Node = NO_KEYWORDS) -> None:
        if not isinstance(args, tuple):
            raise Reject("the arguments of a call are not a tuple", self.pos)
        if not isinstance(kwargs, Dict):
            raise Reject("the keyword arguments of a call are not a dict", self.pos)
        self.count_call()
        made = Object(how, cls, args, kwargs)
        if id(cls) not in self.called:
            if isinstance(cls, Global) and cls.name not in ARGUMENTS_DECIDE:
                self.called.add(id(cls))  # which `globals` keeps alive
            self.calls.append(made)
        self.push(made)

    def reduce(self, how: str) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.call(how, cls, args)

    def newobj_ex(self) -> None:
        kwargs, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call("newobj_ex", cls, args, kwargs)

    def obj(self) -> None:
        items = self.pop_mark()
        if not items:
            raise Reject("OBJ without a class", self.pos)
        self.call("obj", items[0], tuple(items[1:]))

    def inst(self) -> None:
        cls = self.global_text()
        self.call("inst", cls, tuple(self.pop_mark()))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Object):
            raise Reject("BUILD on something that is not an object", self.pos)
        self.change(target)
        target.state = state


_OPCODES: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": _Machine.proto,
    b"\x95": _Machine.frame,
    b".": lambda _: _STOP,
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": lambda m: m.throw_away(1 + len(m.pop_mark())),
    b"2": lambda m: m.push(m.stack[-1]),
    b"q": lambda m: m.remember(m.u8()),
    b"r": lambda m: m.remember(m.u32()),
    b"p": lambda m: m.remember(m.decimal()),
    b"\x94": lambda m: m.remember(len(m.memo) + len(m.far)),
    b"h": lambda m: m.recall(m.u8()),
    b"j": lambda m: m.recall(m.u32()),
    b"g": lambda m: m.recall(m.decimal()),
    b"Q": _Machine.persid,
    # plain values
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.i32()),
    b"K": lambda m: m.push(m.u8()),
    b"M": lambda m: m.push(m.u16()),
    b"I": lambda m: m.push(m.decimal_or_bool()),
    b"L": lambda m: m.push(m.decimal(b"L")),
    b"\x8a": lambda m: m.push(m.integer(m.u8())),
    b"\x8b": lambda m: m.push(m.integer(m.i32())),
    b"G": lambda m: m.push(m.f64()),
    b"F": lambda m: m.push(m.float_text()),
    b"\x8c": lambda m: m.push(m.text(m.u8())),
    b"X": lambda m: m.push(m.text(m.u32())),
    b"\x8d": lambda m: m.push(m.text(m.u64())),
    b"V": lambda m: m.push(m.unicode_line()),
    b"U": lambda m: m.push(old_string(m.take(m.u8()))),
    b"T": lambda m: m.push(old_string(m.take(m.i32()))),
    b"S": lambda m: m.push(m.quoted()),
    b"C": lambda m: m.push(m.take(m.u8())),
    b"B": lambda m: m.push(m.take(m.u32())),
    b"\x8e": lambda m: m.push(m.take(m.u64())),
    b"\x96": lambda m: m.push(bytearray(m.take(m.u64()))),
    # containers
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_mark()),
    b"}": lambda m: m.push(Dict()),
    b"d": lambda m: m.push(Dict.of(m.paired(m.pop_mark()))),
    b"\x8f": lambda m: m.push(Set([], frozen=False)),
    b"\x91": lambda m: m.push(Set(m.pop_mark(), frozen=True)),
    b"\x90": _Machine.additems,
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.pop_mark()),
    b"s": _Machine.setitem,
    b"u": lambda m: m.set_pairs(m.pop_mark()),
    # names and calls
    b"c": lambda m: m.push(m.global_text()),
    b"\x93": _Machine.stack_global,
    b"R": lambda m: m.reduce("reduce"),
    b"\x81": lambda m: m.reduce("newobj"),
    b"\x92": _Machine.newobj_ex,
    b"o": _Machine.obj,
    b"i": _Machine.inst,
    b"b": _Machine.build,
}
_TABLE: list[Callable[[_Machine], object] | None] = [_OPCODES.get(bytes([i])) for i in range(256)]
