"""The values of a pickle: plain ones, lists, tuples, and inert nodes for all that is not plain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from ckpttools.errors import CkptError


class Reject(CkptError):
    """The bytes are not a pickle that this reader accepts."""

    def __init__(self, message: str, at: int | None = None) -> None:
        super().__init__(
            "pickle-damaged",
            message + (f" at byte {at}" if at is not None else ""),
            why="the values that this pickle describes cannot be trusted",
            hint="the file is damaged or not written by torch.save: fetch it again from where it was saved",
        )


class Global(Struct, frozen=True):
    """A name in the file: `module.name`. Never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_SHARED: dict[tuple[str, str], Global] = {}
_MOST_SHARED = 1000  # no hostile file fills the memory


def shared(module: str, name: str) -> Global:
    """One for all files that say it: a checkpoint may have hundreds of thousands."""
    made = _SHARED.get((module, name)) or Global(module, name)
    if len(_SHARED) < _MOST_SHARED:
        _SHARED[module, name] = made
    return made


FEW = 4  # pairs among which one is found as fast without an index


class Pairs:
    """Key and value pairs in file order. Only strings and ints can be looked up: the rest is carried.

    A dict in a pickle may repeat a key: as in Python, the last value counts. Most have none at all, of
    hundreds of thousands: `pairs` is a list once there are some.
    """

    __slots__ = ("_index", "pairs")

    def __init__(self) -> None:
        self.pairs: Sequence[tuple[Node, Node]] = ()
        self._index: dict[str, Node] | None = None

    def get(self, key: str | int, default: Node = None) -> Node:
        if self._index is None and len(self.pairs) <= FEW:  # hundreds of thousands of small ones
            for k, value in reversed(self.pairs):
                if type(k) is type(key) and k == key:
                    return value
            return default
        if self._index is None:
            # ints are indexed by their text: Python hashes text with a secret, ints without one
            self._index = {
                ("s" + k if isinstance(k, str) else f"i{k}"): v
                for k, v in self.pairs
                if isinstance(k, str | int) and not isinstance(k, bool)
            }
        return self._index.get("s" + key if isinstance(key, str) else f"i{key}", default)

    def __contains__(self, key: str | int) -> bool:
        return self.get(key, MISSING) is not MISSING

    def extend(self, pairs: Iterable[tuple[Node, Node]]) -> None:
        if isinstance(self.pairs, list):
            self.pairs.extend(pairs)
        else:
            self.pairs = [*self.pairs, *pairs]
        self._index = None

    def names(self) -> list[str]:
        """The keys that are strings, in file order, each once."""
        return list(dict.fromkeys(k for k, _ in self.pairs if isinstance(k, str)))

    def named(self) -> Iterator[tuple[str, Node]]:
        """The pairs whose key is a string."""
        return iter({key: value for key, value in self.pairs if isinstance(key, str)}.items())

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


class Dict(Pairs):
    """A dict."""

    __slots__ = ()

    @classmethod
    def of(cls, pairs: Iterable[tuple[Node, Node]]) -> Dict:
        node = cls()
        node.pairs = list(pairs)
        return node

    def replace(self, values: dict[str, Node], drop: Iterable[str] = ()) -> Dict:
        """A copy with some values replaced, added or dropped."""
        return Dict.of(self.with_values(values, drop))


NO_KEYWORDS = Dict()  # shared, never filled


class Object(Pairs):
    """What a call in the pickle would have made: constructor, arguments, then items, pairs and state."""

    __slots__ = ("args", "cls", "how", "items", "kwargs", "state")

    def __init__(self, how: str, cls: Node, args: tuple[Node, ...], kwargs: Dict = NO_KEYWORDS) -> None:
        self.pairs = ()  # without the call of super(): checkpoints hold hundreds of thousands
        self._index = None
        self.how = how  # "reduce", "newobj", "newobj_ex", "obj" or "inst"
        self.cls = cls
        self.args = args
        self.kwargs = kwargs
        self.items: Sequence[Node] = ()
        self.state: Node = MISSING

    def append(self, items: Iterable[Node]) -> None:
        """Further items: of a list, a deque."""
        if isinstance(self.items, list):
            self.items.extend(items)
        else:
            self.items = [*self.items, *items]

    @property
    def has_state(self) -> bool:
        return self.state is not MISSING

    def is_a(self, module: str, name: str) -> bool:
        return isinstance(self.cls, Global) and self.cls.module == module and self.cls.name == name

    def replace(self, values: dict[str, Node], drop: Iterable[str] = ()) -> Object:
        """A copy with some string-keyed pairs replaced, added or dropped."""
        node = Object(self.how, self.cls, self.args, self.kwargs)
        node.items, node.state = self.items, self.state
        node.pairs = self.with_values(values, drop)
        return node


class Persistent(Struct, frozen=True, eq=False):
    """A persistent id: torch uses one per storage."""

    pid: Node


class Set(Struct, frozen=True, eq=False):
    """A set or frozenset literal of protocol 4."""

    members: list[Node]
    frozen: bool


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()

# The values of a pickle: plain ones, lists, tuples, and the nodes above.
Node = object


class Pickle(Struct, frozen=True, kw_only=True):
    """One pickle: its value, where it ended, and every callable that loading it would have called."""

    value: Node
    end: int  # bytes consumed
    protocol: int
    # the first call of each callable; every call of those in ARGUMENTS_DECIDE and of computed ones
    calls: list[Object]
    names: list[Global]  # every name that loading resolves, called or not, each once
    changed: list[Object]  # what is given items, pairs or a state after its call


_MAPPINGS = {"OrderedDict", "defaultdict", "Counter"}


def as_mapping(node: Node) -> Pairs | None:
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


# a tuple of types: isinstance takes several times as long with a union, and is asked for each node
_PLAIN = (str, int, float, bytes, bytearray, type(None))


def walk(value: Node) -> Iterator[Node]:
    """Every node that can be reached, shared ones once, parents first; iterative."""
    seen: set[int] = set()
    todo: list[Node] = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, _PLAIN):
            continue
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
