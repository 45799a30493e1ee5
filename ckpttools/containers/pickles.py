"""Pickles as data: read without importing or calling anything, and written back.

`loads` interprets the opcodes of protocols 0 to 5 and builds plain values and inert nodes. A name such
as `torch._utils._rebuild_tensor_v2` becomes a `Global`, a call of it an `Object`: nothing is looked up.
`dumps` writes nodes as opcodes again, so that the library that owns a class gets its object back.

Why no byte of a file can do harm here: this module imports only `re`, `struct` and the standard
dataclass machinery; every length is compared with the bytes that are left before anything is allocated;
nothing from the file is hashed but strings and memo numbers; walks over the result are iterative.

The opcodes are those of CPython's `pickletools`. Refused, since no checkpoint needs them and they cannot
be data: PERSID, EXT1/2/4, NEXT_BUFFER, READONLY_BUFFER.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from ckpttools.errors import CkptError

MAX_BYTES = 256 << 20
MAX_MEMO = 5_000_000
MAX_STACK = 2_000_000
MAX_MARKS = 10_000
MAX_INT_BYTES = 512
MAX_NAME = 512
# callables whose arguments decide what a call of them does: every call is kept, not only the first
ARGUMENTS_DECIDE = {
    "getattr",
    "encode",
    "bytes",
    "bytearray",
    "type",
    "iter",
    "defaultdict",
    "partial",
    "getLogger",
    "ZoneInfo._unpickle",
    "__newobj__",
    "__newobj_ex__",
    "_reconstructor",
    "_rebuild_from_type",
    "_rebuild_from_type_v2",
    "__bit_generator_ctor",
    "__generator_ctor",
    "__randomstate_ctor",
}


T = TypeVar("T")


class Reject(CkptError):
    """The bytes are not a pickle that this reader accepts."""

    def __init__(self, message: str, at: int | None = None) -> None:
        super().__init__(
            "pickle-damaged",
            message + (f" at byte {at}" if at is not None else ""),
            why="the values that this pickle describes cannot be trusted",
            hint="the file is damaged or not written by torch.save: fetch it again from where it was saved",
        )


# --- nodes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Global:
    """A name in the file: `module.name`. Never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Pairs:
    """Key and value pairs in file order. Only strings and ints can be looked up: the rest is carried.

    A dict in a pickle may repeat a key: as in Python, the last value counts.
    """

    __slots__ = ("_index", "pairs")

    def __init__(self) -> None:
        self.pairs: list[tuple[Node, Node]] = []
        self._index: dict[str, Node] | None = None

    def get(self, key: str | int, default: Node = None) -> Node:
        if self._index is None:
            # ints are indexed by their text: Python hashes text with a secret, ints without one
            self._index = {
                ("s" + k if isinstance(k, str) else f"i{k}"): v
                for k, v in self.pairs
                if isinstance(k, str | int) and not isinstance(k, bool)
            }
        return self._index.get("s" + key if isinstance(key, str) else f"i{key}", default)

    def __contains__(self, key: str | int) -> bool:
        return self.get(key, _MISSING) is not _MISSING

    def names(self) -> list[str]:
        """The keys that are strings, in file order, each once."""
        return list(dict.fromkeys(k for k, _ in self.pairs if isinstance(k, str)))

    def named(self) -> Iterator[tuple[str, Node]]:
        """The pairs whose key is a string."""
        return ((name, self.get(name)) for name in self.names())

    def with_values(self, values: dict[str, Node], drop: Iterable[str] = ()) -> list[tuple[Node, Node]]:
        """The pairs with some string keys' values replaced in place, new keys appended, others dropped."""
        gone = set(drop)
        left = dict(values)
        out: list[tuple[Node, Node]] = []
        for k, v in self.pairs:
            if isinstance(k, str) and k in gone:
                continue
            if isinstance(k, str) and k in values:
                if k in left:
                    out.append((k, left.pop(k)))
                continue
            out.append((k, v))
        return out + list(left.items())


class Dict(_Pairs):
    """A dict."""

    __slots__ = ()

    @classmethod
    def of(cls, pairs: Iterable[tuple[Node, Node]]) -> Dict:
        node = cls()
        node.pairs.extend(pairs)
        return node

    def replace(self, values: dict[str, Node], drop: Iterable[str] = ()) -> Dict:
        """A copy with some values replaced, added or dropped."""
        return Dict.of(self.with_values(values, drop))


class Object(_Pairs):
    """What a call in the pickle would have made: constructor, arguments, then items, pairs and state."""

    __slots__ = ("args", "cls", "how", "items", "kwargs", "state")

    def __init__(self, how: str, cls: Node, args: tuple[Node, ...], kwargs: Dict | None = None) -> None:
        super().__init__()
        self.how = how  # "reduce", "newobj", "newobj_ex", "obj" or "inst"
        self.cls = cls
        self.args = args
        self.kwargs = Dict() if kwargs is None else kwargs
        self.items: list[Node] = []
        self.state: Node = _MISSING

    @property
    def has_state(self) -> bool:
        return self.state is not _MISSING

    def is_a(self, module: str, name: str) -> bool:
        return isinstance(self.cls, Global) and self.cls.module == module and self.cls.name == name

    def replace(self, values: dict[str, Node], drop: Iterable[str] = ()) -> Object:
        """A copy with some string-keyed pairs replaced, added or dropped."""
        node = Object(self.how, self.cls, self.args, self.kwargs)
        node.items, node.state = self.items, self.state
        node.pairs = self.with_values(values, drop)
        return node


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A persistent id: torch uses one per storage."""

    pid: Node


@dataclass(frozen=True, slots=True, eq=False)
class Set:
    """A set or frozenset literal of protocol 4."""

    members: list[Node]
    frozen: bool


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


_MISSING = _Missing()

# The values of a pickle: plain ones, lists, tuples, and the nodes above.
Node = object


@dataclass(frozen=True, slots=True, kw_only=True)
class Pickle:
    """One pickle: its value, where it ended, and every callable that loading it would have called."""

    value: Node
    end: int  # bytes consumed
    protocol: int
    # the first call of each callable; every call of those in ARGUMENTS_DECIDE and of computed ones
    calls: list[Object] = field(repr=False)


# --- reading ------------------------------------------------------------------------------------------


def loads(
    data: bytes, *, start: int = 0, exact: bool = True, persistent: Callable[[Node], Node] | None = None
) -> Pickle:
    """Read one pickle that begins at `start`. With `exact`, STOP must be the last byte.

    `persistent` turns a persistent id into the node that stands for it (a Persistent by default).
    Raises Reject for anything that is not a well-formed pickle of data.
    """
    if len(data) > MAX_BYTES:
        raise Reject(f"a pickle of {len(data)} bytes is over the limit of {MAX_BYTES}")
    machine = _Machine(data, start, persistent or Persistent)
    result = machine.run()
    if exact and result.end != len(data):
        raise Reject(f"{len(data) - result.end} bytes follow the end of the pickle", result.end)
    return result


class _Stop(Exception):
    pass


_DECIMAL = re.compile(rb"[+-]?[0-9]{1,1240}")
_FLOAT = re.compile(rb"[+-]?(?:[0-9.eE+-]{1,64}|inf|nan)")
_unpack_u16 = struct.Struct("<H").unpack_from
_unpack_i32 = struct.Struct("<i").unpack_from
_unpack_u32 = struct.Struct("<I").unpack_from
_unpack_u64 = struct.Struct("<Q").unpack_from
_unpack_f64 = struct.Struct(">d").unpack_from


class _Machine:
    """The stack machine. `pos` is the offset of the next unread byte."""

    def __init__(self, data: bytes, start: int, persistent: Callable[[Node], Node]) -> None:
        self.data = data
        self.start = self.pos = start
        self.persistent = persistent
        self.end = len(data)
        self.stack: list[Node] = []
        self.marks: list[list[Node]] = []
        self.memo: dict[int, Node] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.protocol = 0
        self.frame_end = 0
        self.calls: list[Object] = []
        self.called: set[Global] = set()

    def run(self) -> Pickle:
        data, end, table = self.data, self.end, _TABLE
        try:
            while True:
                pos = self.pos
                if pos >= end:
                    raise Reject("the pickle ends before STOP", pos)
                self.pos = pos + 1
                operation = table[data[pos]]
                if operation is None:
                    raise Reject(f"opcode 0x{data[pos]:02x} is unknown or not allowed", pos)
                operation(self)
                if self.frame_end and self.pos >= self.frame_end:
                    if self.pos > self.frame_end:
                        raise Reject("an opcode crosses the end of its frame", pos)
                    self.frame_end = 0
        except _Stop:
            pass
        except (IndexError, struct.error):
            raise Reject("an opcode finds too little on the stack or in the file", self.pos) from None
        if self.marks or len(self.stack) != 1:
            raise Reject("the pickle does not leave exactly one value", self.pos)
        return Pickle(value=self.stack[0], end=self.pos, protocol=self.protocol, calls=self.calls)

    # reading the file

    def take(self, n: int) -> bytes:
        pos = self.pos
        if n < 0 or n > self.end - pos:
            raise Reject(f"a length of {n} bytes is longer than the file", pos)
        self.pos = pos + n
        return self.data[pos : pos + n]

    def line(self, limit: int) -> bytes:
        pos = self.pos
        stop = self.data.find(b"\n", pos, pos + limit + 1)
        if stop < 0:
            raise Reject("a text argument does not end", pos)
        self.pos = stop + 1
        return self.data[pos:stop]

    def u8(self) -> int:
        self.pos += 1
        return self.data[self.pos - 1]

    def u16(self) -> int:
        self.pos += 2
        (value,) = _unpack_u16(self.data, self.pos - 2)
        return int(value)

    def i32(self) -> int:
        self.pos += 4
        (value,) = _unpack_i32(self.data, self.pos - 4)
        return int(value)

    def u32(self) -> int:
        self.pos += 4
        (value,) = _unpack_u32(self.data, self.pos - 4)
        return int(value)

    def u64(self) -> int:
        self.pos += 8
        (value,) = _unpack_u64(self.data, self.pos - 8)
        return int(value)

    def text(self, n: int) -> str:
        raw = self.take(n)
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise Reject("a string is not UTF-8", self.pos - n) from None

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

    def stop(self) -> None:
        raise _Stop

    def mark(self) -> None:
        if len(self.marks) >= MAX_MARKS:
            raise Reject("MARKs are nested too deep", self.pos)
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def dup(self) -> None:
        self.push(self.stack[-1])

    # opcodes: memo

    def remember(self, i: int) -> None:
        if not 0 <= i < 2**32 or len(self.memo) >= MAX_MEMO:
            raise Reject("the memo is over its limit", self.pos)
        self.memo[i] = self.stack[-1]

    def recall(self, i: int) -> None:
        try:
            value = self.memo[i]
        except KeyError:
            raise Reject(f"memo entry {i} was never stored", self.pos) from None
        self.push(value)

    def binput(self) -> None:
        self.remember(self.u8())

    def long_binput(self) -> None:
        self.remember(self.u32())

    def put(self) -> None:
        self.remember(self.decimal())

    def memoize(self) -> None:
        self.remember(len(self.memo))

    def binget(self) -> None:
        self.recall(self.u8())

    def long_binget(self) -> None:
        self.recall(self.u32())

    def get(self) -> None:
        self.recall(self.decimal())

    # opcodes: scalars

    def none(self) -> None:
        self.push(None)

    def true(self) -> None:
        self.push(True)

    def false(self) -> None:
        self.push(False)

    def binint(self) -> None:
        self.push(self.i32())

    def binint1(self) -> None:
        self.push(self.u8())

    def binint2(self) -> None:
        self.push(self.u16())

    def decimal(self) -> int:
        text = self.line(1300)
        if not _DECIMAL.fullmatch(text):
            raise Reject("an integer is not decimal", self.pos)
        return int(text)

    def int_text(self) -> None:
        if self.data[self.pos : self.pos + 3] in (b"00\n", b"01\n"):
            self.push(self.line(2) == b"01")
        else:
            self.push(self.decimal())

    def long_text(self) -> None:
        text = self.line(1300).removesuffix(b"L")
        if not _DECIMAL.fullmatch(text):
            raise Reject("an integer is not decimal", self.pos)
        self.push(int(text))

    def long_of(self, n: int) -> None:
        if n > MAX_INT_BYTES:
            raise Reject(f"an integer of {n} bytes is over the limit of {MAX_INT_BYTES}", self.pos)
        self.push(int.from_bytes(self.take(n), "little", signed=True))

    def long1(self) -> None:
        self.long_of(self.u8())

    def long4(self) -> None:
        self.long_of(self.i32())

    def binfloat(self) -> None:
        self.pos += 8
        self.push(_unpack_f64(self.data, self.pos - 8)[0])

    def float_text(self) -> None:
        text = self.line(80)
        if not _FLOAT.fullmatch(text):
            raise Reject("a float is not a number", self.pos)
        try:
            self.push(float(text))
        except ValueError:
            raise Reject("a float is not a number", self.pos) from None

    # opcodes: strings and bytes

    def short_binunicode(self) -> None:
        self.push(self.text(self.u8()))

    def binunicode(self) -> None:
        self.push(self.text(self.u32()))

    def binunicode8(self) -> None:
        self.push(self.text(self.u64()))

    def unicode_text(self) -> None:
        raw = self.line(1 << 20)
        try:
            self.push(raw.decode("raw-unicode-escape"))
        except UnicodeDecodeError:
            raise Reject("a string is not raw-unicode-escape", self.pos) from None

    def old_string(self, raw: bytes) -> None:
        # Python 2 did not tell text from bytes: torch decodes UTF-8; numpy's raw data stays bytes
        try:
            self.push(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self.push(raw)

    def short_binstring(self) -> None:
        self.old_string(self.take(self.u8()))

    def binstring(self) -> None:
        self.old_string(self.take(self.i32()))

    def string_text(self) -> None:
        raw = self.line(1 << 20)
        if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"') or b"\\" in raw:
            raise Reject("a quoted string is malformed or escaped", self.pos)
        self.old_string(raw[1:-1])

    def short_binbytes(self) -> None:
        self.push(self.take(self.u8()))

    def binbytes(self) -> None:
        self.push(self.take(self.u32()))

    def binbytes8(self) -> None:
        self.push(self.take(self.u64()))

    def bytearray8(self) -> None:
        self.push(bytearray(self.take(self.u64())))

    # opcodes: containers

    def empty_tuple(self) -> None:
        self.push(())

    def tuple1(self) -> None:
        self.stack[-1] = (self.stack[-1],)

    def tuple2(self) -> None:
        b = self.stack.pop()
        self.stack[-1] = (self.stack[-1], b)

    def tuple3(self) -> None:
        c, b = self.stack.pop(), self.stack.pop()
        self.stack[-1] = (self.stack[-1], b, c)

    def tuple_mark(self) -> None:
        items = self.pop_mark()
        self.push(tuple(items))

    def empty_list(self) -> None:
        self.push([])

    def list_mark(self) -> None:
        items = self.pop_mark()
        self.push(items)

    def empty_dict(self) -> None:
        self.push(Dict())

    def dict_mark(self) -> None:
        items = self.pop_mark()
        self.push(Dict.of(self.paired(items)))

    def empty_set(self) -> None:
        self.push(Set([], frozen=False))

    def frozenset_mark(self) -> None:
        items = self.pop_mark()
        self.push(Set(items, frozen=True))

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
            self.no_state(target)
            target.items.extend(items)
        else:
            raise Reject("APPEND on something that is not a list", self.pos)

    def no_state(self, target: Object) -> None:
        # no pickler writes items after the state, and a state can name any function as `append`
        if target.has_state:
            raise Reject("items are added to an object after its state was set", self.pos)

    def append(self) -> None:
        value = self.stack.pop()
        self.extend([value])

    def appends(self) -> None:
        self.extend(self.pop_mark())

    def set_pairs(self, items: list[Node]) -> None:
        target = self.stack[-1]
        if not isinstance(target, _Pairs):
            raise Reject("SETITEM on something that is not a dict", self.pos)
        if isinstance(target, Object):
            self.no_state(target)
        target.pairs.extend(self.paired(items))
        target._index = None

    def setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pairs([key, value])

    def setitems(self) -> None:
        self.set_pairs(self.pop_mark())

    # opcodes: names and calls, all inert

    def intern(self, module: Node, name: Node) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Reject("the name of a class is not text", self.pos)
        if not module or not name or len(module) > MAX_NAME or len(name) > MAX_NAME:
            raise Reject("the name of a class is empty or too long", self.pos)
        key = (module, name)
        if key not in self.globals:
            self.globals[key] = Global(module, name)
        self.push(self.globals[key])

    def global_text(self) -> None:
        try:
            module, name = self.line(MAX_NAME * 4).decode(), self.line(MAX_NAME * 4).decode()
        except UnicodeDecodeError:
            raise Reject("the name of a class is not UTF-8", self.pos) from None
        self.intern(module, name)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.intern(module, name)

    def call(self, how: str, cls: Node, args: Node, kwargs: Node = _MISSING) -> None:
        if not isinstance(args, tuple):
            raise Reject("the arguments of a call are not a tuple", self.pos)
        if kwargs is _MISSING:
            kwargs = Dict()
        if not isinstance(kwargs, Dict):
            raise Reject("the keyword arguments of a call are not a dict", self.pos)
        made = Object(how, cls, args, kwargs)
        if not isinstance(cls, Global) or cls.name in ARGUMENTS_DECIDE:
            self.calls.append(made)
        elif cls not in self.called:
            self.called.add(cls)
            self.calls.append(made)
        self.push(made)

    def reduce(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.call("reduce", cls, args)

    def newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.call("newobj", cls, args)

    def newobj_ex(self) -> None:
        kwargs, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call("newobj_ex", cls, args, kwargs)

    def obj(self) -> None:
        items = self.pop_mark()
        if not items:
            raise Reject("OBJ without a class", self.pos)
        self.call("obj", items[0], tuple(items[1:]))

    def inst(self) -> None:
        self.global_text()
        cls = self.stack.pop()
        self.call("inst", cls, tuple(self.pop_mark()))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Object) or target.has_state:
            raise Reject("BUILD on something that is not a new object", self.pos)
        target.state = state

    def binpersid(self) -> None:
        self.stack[-1] = self.persistent(self.stack[-1])


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.proto,
    b"\x95": _Machine.frame,
    b".": _Machine.stop,
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": _Machine.pop_mark,  # type: ignore[dict-item]  # POP_MARK: what it returns is dropped
    b"2": _Machine.dup,
    b"q": _Machine.binput,
    b"r": _Machine.long_binput,
    b"p": _Machine.put,
    b"\x94": _Machine.memoize,
    b"h": _Machine.binget,
    b"j": _Machine.long_binget,
    b"g": _Machine.get,
    b"N": _Machine.none,
    b"\x88": _Machine.true,
    b"\x89": _Machine.false,
    b"J": _Machine.binint,
    b"K": _Machine.binint1,
    b"M": _Machine.binint2,
    b"I": _Machine.int_text,
    b"L": _Machine.long_text,
    b"\x8a": _Machine.long1,
    b"\x8b": _Machine.long4,
    b"G": _Machine.binfloat,
    b"F": _Machine.float_text,
    b"\x8c": _Machine.short_binunicode,
    b"X": _Machine.binunicode,
    b"\x8d": _Machine.binunicode8,
    b"V": _Machine.unicode_text,
    b"U": _Machine.short_binstring,
    b"T": _Machine.binstring,
    b"S": _Machine.string_text,
    b"C": _Machine.short_binbytes,
    b"B": _Machine.binbytes,
    b"\x8e": _Machine.binbytes8,
    b"\x96": _Machine.bytearray8,
    b")": _Machine.empty_tuple,
    b"\x85": _Machine.tuple1,
    b"\x86": _Machine.tuple2,
    b"\x87": _Machine.tuple3,
    b"t": _Machine.tuple_mark,
    b"]": _Machine.empty_list,
    b"l": _Machine.list_mark,
    b"}": _Machine.empty_dict,
    b"d": _Machine.dict_mark,
    b"\x8f": _Machine.empty_set,
    b"\x91": _Machine.frozenset_mark,
    b"\x90": _Machine.additems,
    b"a": _Machine.append,
    b"e": _Machine.appends,
    b"s": _Machine.setitem,
    b"u": _Machine.setitems,
    b"c": _Machine.global_text,
    b"\x93": _Machine.stack_global,
    b"R": _Machine.reduce,
    b"\x81": _Machine.newobj,
    b"\x92": _Machine.newobj_ex,
    b"o": _Machine.obj,
    b"i": _Machine.inst,
    b"b": _Machine.build,
    b"Q": _Machine.binpersid,
}
_TABLE: list[Callable[[_Machine], None] | None] = [_OPCODES.get(bytes([i])) for i in range(256)]


# --- writing ------------------------------------------------------------------------------------------


def dumps(value: Node, persistent_id: Callable[[Node], Node] | None = None) -> bytes:
    """Write nodes as a pickle of protocol 2, as torch does, or higher where a node needs it.

    Nodes that occur twice are written once and referred to. `persistent_id` gives the persistent id of a
    node that this module does not know, or None. Raises Reject for a value that has no pickled form, or
    for a tuple that contains itself.
    """
    return _Writer(persistent_id).run(value)


@dataclass(frozen=True, slots=True, eq=False)
class _Raw:
    """Bytes still to be written, after which `put` is memoized."""

    data: bytes
    put: Node = _MISSING


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
        summed = nbytes = 0
        while todo:
            # values that a pickle shares without a memo entry, such as long ints, can multiply
            while summed < len(self.out):
                nbytes += len(self.out[summed])
                summed += 1
            if nbytes > MAX_BYTES:
                raise Reject(f"the pickle to write is over the limit of {MAX_BYTES} bytes")
            node = todo.pop()
            if isinstance(node, _Raw):
                self.out.append(node.data)
                if node.put is not _MISSING:
                    self.open.discard(id(node.put))
                    self.memo[id(node.put)] = self.put()
            else:
                self.write(node, todo)
        return b"\x80" + bytes([self.protocol]) + b"".join(self.out) + b"."

    def put(self) -> int:
        i = self.count
        self.count += 1
        self.out.append(b"q" + bytes([i]) if i < 256 else b"r" + struct.pack("<I", i))
        return i

    def get(self, i: int) -> None:
        self.out.append(b"h" + bytes([i]) if i < 256 else b"j" + struct.pack("<I", i))

    def need(self, protocol: int) -> None:
        self.protocol = max(self.protocol, protocol)

    def write(self, node: Node, todo: list[Node]) -> None:
        if (known := self.memo.get(id(node))) is not None:
            self.get(known)
            return
        match node:
            case None:
                self.out.append(b"N")
            case bool():
                self.out.append(b"\x88" if node else b"\x89")
            case int():
                self.out.append(_int(node))
            case float():
                self.out.append(b"G" + struct.pack(">d", node))
            case str():
                self.write_text(node)
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
            case tuple():
                self.write_tuple(node, todo)
            case list():
                self.out.append(b"]")
                self.memo[id(node)] = self.put()
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
            case Object():
                self.write_object(node, todo)
            case _:
                pid = self.persistent_id(node) if self.persistent_id else None
                if pid is None:
                    raise Reject(f"a {type(node).__name__} has no pickled form here")
                self.kept.append(pid)  # memo entries go by identity: nothing may be freed meanwhile
                todo += [_Raw(b"Q", node), pid]

    def write_text(self, text: str) -> None:
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
        todo.append(_Raw({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(n, b"t"), node))
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


def _items(values: list[Node], todo: list[Node], end: bytes) -> None:
    if values:
        todo.append(_Raw(end))
        todo.extend(reversed(values))
        todo.append(_Raw(b"("))


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


# --- looking into nodes -------------------------------------------------------------------------------

_MAPPINGS = {"OrderedDict", "defaultdict", "Counter"}


def as_mapping(node: Node) -> _Pairs | None:
    """The node as key and value pairs if it is a dict, an OrderedDict, a defaultdict or a Counter."""
    if isinstance(node, Dict):
        return node
    if isinstance(node, Object) and isinstance(node.cls, Global):
        if node.cls.module != "collections" or node.cls.name not in _MAPPINGS:
            return None
        # Python 2's OrderedDict([[k, v], ...]) and Counter({...})
        inner = node.args[-1] if node.args and not node.pairs else None
        if isinstance(inner, Dict):
            return inner
        if isinstance(inner, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in inner):
            return Dict.of((p[0], p[1]) for p in inner)
        return node
    return None


def walk(value: Node) -> Iterator[Node]:
    """Every node that can be reached, shared ones once, parents first; iterative."""
    seen: set[int] = set()
    todo: list[Node] = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, str | int | float | bytes | bytearray | Global) or node is None:
            if isinstance(node, Global):
                yield node
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        match node:
            case list() | tuple():
                todo.extend(reversed(node))
            case Dict():
                todo.extend(x for pair in reversed(node.pairs) for x in reversed(pair))
            case Set():
                todo.extend(reversed(node.members))
            case Persistent():
                todo.append(node.pid)
            case Object():
                if node.has_state:
                    todo.append(node.state)
                todo.extend(x for pair in reversed(node.pairs) for x in reversed(pair))
                todo.extend(reversed(node.items))
                todo += [node.kwargs, node.args, node.cls]


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
