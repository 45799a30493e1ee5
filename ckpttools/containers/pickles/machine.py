"""The stack machine: stack, marks and memo, and what opcodes do to them. All calls are inert."""

from __future__ import annotations

from collections.abc import Callable

from ckpttools.containers.pickles.cursor import Cursor
from ckpttools.containers.pickles.known import ARGUMENTS_DECIDE
from ckpttools.containers.pickles.nodes import (
    NO_KEYWORDS,
    Dict,
    Global,
    Node,
    Object,
    Pairs,
    Pickle,
    Reject,
    Set,
    shared,
)

MAX_MEMO = 5_000_000
MAX_STACK = 2_000_000
MAX_MARKS = 10_000
MAX_NAME = 512
MAX_CALLS = 3_000_000  # with the names of classes, which cost most


class Machine(Cursor):
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

    def result(self) -> Pickle:
        """What STOP leaves."""
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
            target.append(items)
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
            self.globals[key] = shared(module, name)
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
