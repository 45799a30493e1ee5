"""Values inside saved files as plain Python, and files with some of their values changed.

A scheduler's state may hold floats as they are, as numpy scalars (OpenPCDet) or as tensors of one element
(a capturable optimizer's lr). `value` shows all of them alike; an edit puts the new value back as what the
old one was, so that the library finds the types that it saved. Everything that is not edited is carried
over as read: tensors stay the same bytes, unknown objects the same opcodes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from ckpttools.containers import jsons
from ckpttools.containers.fields import bounded
from ckpttools.containers.pickles import Dict, Global, Node, Object, as_mapping, plain
from ckpttools.containers.torch_file import (
    FORMS,
    Storage,
    TorchFile,
    View,
    new_storage,
    read_torch_file,
    scalar,
    tensor_node,
    write_torch_file,
)
from ckpttools.errors import CkptError, UsageError
from ckpttools.location import Location
from ckpttools.plan import Literal, OutputFile, SourceCheck
from ckpttools.tensors import TensorRef
from ckpttools.training import ABSENT, Edit, Place
from ckpttools.tree import Key

MAX_DEPTH = 40
_NUMPY = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "u8": "<Q", "u4": "<I"}
_SCALARS = (Global("numpy.core.multiarray", "scalar"), Global("numpy._core.multiarray", "scalar"))


class Opaque(Struct, frozen=True, eq=False):
    """A saved object that is neither a number, text, a list nor a dict; it is carried, not looked into."""

    node: Node

    def __deepcopy__(self, memo: object) -> Opaque:
        """Itself: a node is never changed, and is known by its identity."""
        return self

    def __str__(self) -> str:
        """Its class or, for an attribute that was looked up, that one's name."""
        node = self.node
        if isinstance(node, Object) and len(node.args) == 2 and isinstance(node.args[1], str):
            return f"{node.cls}({node.args[0]}, {node.args[1]})" if isinstance(node.cls, Global) else "?"
        return str(node.cls) if isinstance(node, Object) and isinstance(node.cls, Global) else str(type(node))


# --- reading ------------------------------------------------------------------------------------------


def at(root: Node, *keys: Key) -> Node:
    """The node that keys and indices lead to, None where there is none."""
    node = root
    for key in keys:
        if isinstance(node, list | tuple):
            if not isinstance(key, int) or not -len(node) <= key < len(node):
                return None
            node = node[key]
        elif (pairs := as_mapping(node)) is not None:
            node = pairs.get(key)
        else:
            return None
    return node


def value(file: TorchFile, node: Node) -> object:
    """The node as plain values: numbers, text, lists, tuples, dicts with str and int keys; else Opaque.

    Numpy scalars and tensors of one element become numbers, read from the file. What is shared stays shared:
    a small file can say a list of lists that would be endless otherwise.
    """
    return _value(file, node, MAX_DEPTH, {})


def _value(file: TorchFile, node: Node, depth: int, known: dict[int, object]) -> object:
    if id(node) not in known:
        known[id(node)] = _new_value(file, node, depth, known)
    return known[id(node)]


def _new_value(file: TorchFile, node: Node, depth: int, known: dict[int, object]) -> object:
    if depth < 0:
        raise UsageError(
            "schedule-damaged",
            "a saved state is nested too deeply",
            where=file.path,
            why="no scheduler keeps its values so",
        )
    if node is None or isinstance(node, bool | float | str):
        return node
    if isinstance(node, int):
        return bounded(node)
    if isinstance(node, list):
        return [_value(file, item, depth - 1, known) for item in node]
    if isinstance(node, tuple):
        return tuple(_value(file, item, depth - 1, known) for item in node)
    if (pairs := as_mapping(node)) is not None:
        keys = [key for key, _ in pairs.pairs]
        if not all(isinstance(key, str | int) for key in keys):
            return Opaque(node)
        inner = ((key, pairs.get(key)) for key in keys if isinstance(key, str | int))
        return {key: _value(file, held, depth - 1, known) for key, held in inner}
    if isinstance(node, Object):
        number = _number(file, node)
        return Opaque(node) if number is None else number
    return Opaque(node)


def _number(file: TorchFile, node: Object) -> int | float | None:
    if node.cls in _SCALARS:
        form, raw = _numpy(node)
        return None if form is None or raw is None else struct.unpack(form, raw)[0]
    view = file.view(node)
    return None if view is None else scalar(file.stated(view))


def _numpy(node: Object) -> tuple[str | None, bytes | None]:
    """The struct format and the bytes of a pickled numpy scalar, None where they are of another kind."""
    if len(node.args) != 2 or not isinstance(node.args[0], Object):
        return None, None
    dtype, raw = node.args
    assert isinstance(dtype, Object)
    code = dtype.args[0] if dtype.args and isinstance(dtype.args[0], str) else ""
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    form = _NUMPY.get(code) if order in ("<", "|", "=") else None
    if isinstance(raw, Object) and raw.is_a("_codecs", "encode") and isinstance(raw.args[0], str):
        try:
            raw = raw.args[0].encode("latin1")
        except UnicodeEncodeError:
            return None, None
    if form is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(form):
        return None, None
    return form, raw


# --- changing -----------------------------------------------------------------------------------------


def changed(file: TorchFile, edits: Iterable[Edit]) -> Node:
    """The file's value with the edits made; nodes that no edit touches are the very same."""
    root: dict[Key, object] = {}
    for edit in edits:
        branch = root
        for key in edit.place.at[:-1]:
            inner = branch.setdefault(key, {})
            if not isinstance(inner, dict):
                raise _overlap(edit)
            branch = inner
        if edit.place.at[-1] in branch:
            raise _overlap(edit)
        branch[edit.place.at[-1]] = edit
    return _branch(file, file.value, root)


def _overlap(edit: Edit) -> AssertionError:
    return AssertionError(f"two edits of {edit.place}")


def _branch(file: TorchFile, node: Node, branch: Mapping[Key, object]) -> Node:
    def new(key: Key, old: Node) -> Node:
        todo = branch[key]
        if isinstance(todo, Edit):
            return like(file, old, todo.new)
        assert isinstance(todo, dict)
        return _branch(file, old, todo)

    if isinstance(node, list | tuple):
        items = [new(i, item) if i in branch else item for i, item in enumerate(node)]
        return items if isinstance(node, list) else tuple(items)
    pairs = as_mapping(node)
    assert pairs is not None
    left = dict.fromkeys(branch)
    out: list[tuple[Node, Node]] = []
    for key, old in pairs.pairs:
        if isinstance(key, str | int) and not isinstance(key, bool) and key in branch:
            left.pop(key, None)
            out.append((key, new(key, pairs.get(key))))
        else:
            out.append((key, old))
    out += [(key, new(key, ABSENT)) for key in left]
    return _with_pairs(node, out)


def _with_pairs(node: Node, pairs: list[tuple[Node, Node]]) -> Node:
    """A dict, an OrderedDict or a Counter like `node` that holds other pairs."""
    if not isinstance(node, Object):
        return Dict.of(pairs)
    made = Object(node.how, node.cls, node.args, node.kwargs)
    made.items, made.state = node.items, node.state
    if node.args and not node.pairs:  # Counter({...}) and Python 2's OrderedDict([...])
        inner = node.args[-1]
        last: Node = [list(pair) for pair in pairs] if isinstance(inner, list) else Dict.of(pairs)
        made.args = (*node.args[:-1], last)
    else:
        made.pairs = pairs
    return made


def like(file: TorchFile, old: Node, new: object) -> Node:
    """`new` as a node of the kind that `old` is; the same node where the value is the same."""
    if isinstance(new, Opaque):
        return new.node
    if old is ABSENT:
        return _fresh(new)
    if isinstance(new, dict) and (pairs := as_mapping(old)) is not None:
        if value(file, old) == new:
            return old
        items: list[tuple[Node, Node]] = [
            (key, like(file, pairs.get(key, ABSENT), item)) for key, item in new.items()
        ]
        return _with_pairs(old, items)
    if isinstance(new, list | tuple) and isinstance(old, list | tuple):
        olds = [*old, *([old[-1]] * len(new) if old else [ABSENT] * len(new))][: len(new)]
        made = [like(file, have, item) for have, item in zip(olds, new, strict=True)]
        return tuple(made) if isinstance(old, tuple) else made
    if isinstance(old, Object) and isinstance(new, int | float) and not isinstance(new, bool):
        if _number(file, old) == new:
            return old
        return _scalar(file, old, new)
    return _fresh(new)


def _fresh(new: object) -> Node:
    if isinstance(new, Mapping):
        return Dict.of((key, _fresh(item)) for key, item in new.items())
    if isinstance(new, list):
        return [_fresh(item) for item in new]
    if isinstance(new, tuple):
        return tuple(_fresh(item) for item in new)
    assert new is None or isinstance(new, bool | int | float | str), f"no plain value: {type(new)}"
    return new


def _scalar(file: TorchFile, old: Object, new: int | float) -> Node:
    """A numpy scalar or a tensor of one element like `old`, holding `new`."""
    if old.cls in _SCALARS:
        form, _ = _numpy(old)
        assert form is not None
        made = Object(old.how, old.cls, (old.args[0], _encoded(packed(file.path, form, new))), old.kwargs)
        made.state = old.state
        return made
    view = file.view(old)
    assert view is not None
    return _tensor(file.path, old, view, new)


def _encoded(raw: bytes) -> Object:
    """Bytes as protocol 2 pickles them, which torch.save uses."""
    return Object("reduce", Global("_codecs", "encode"), (raw.decode("latin1"), "latin1"))


def _tensor(path: Location, old: Object, view: View, new: int | float) -> Node:
    raw = packed(path, FORMS[view.dtype.name], new)
    storage: Storage = new_storage(view.dtype, 1, [Literal(raw)])
    made = tensor_node(TensorRef(view.dtype, view.shape, ()), storage)
    if old.is_a("torch._utils", "_rebuild_parameter"):
        return Object(old.how, old.cls, (made, *old.args[1:]))
    return made


def packed(path: Location, form: str, new: int | float) -> bytes:
    try:
        return struct.pack(form, new)
    except (struct.error, OverflowError) as error:
        raise CkptError("schedule-damaged", f"{new} cannot be stored: {error}", where=path) from None


# --- files --------------------------------------------------------------------------------------------


def edited(file: Location, path: str, edits: Sequence[Edit]) -> tuple[OutputFile, tuple[SourceCheck, ...]]:
    """The output file at `path` (relative): `file` with the edits made, and the checks of its source."""
    if file.name.endswith(".json"):
        return _edited_json(file, path, edits), ()
    source = read_torch_file(file)
    written = write_torch_file(path, changed(source, edits), legacy=source.archive is None)
    return written, tuple(source.checks())


def _edited_json(file: Location, path: str, edits: Sequence[Edit]) -> OutputFile:
    values: object = jsons.read(file, allow_nan=True)
    for edit in edits:
        inner = values
        for key in edit.place.at[:-1]:
            assert isinstance(inner, dict | list)
            inner = inner[key]  # type: ignore[index]  # the places were found by walking this file
        assert isinstance(inner, dict | list)
        inner[edit.place.at[-1]] = edit.new  # type: ignore[index]
    # as transformers and accelerate write their states, in ASCII
    text = json.dumps(values, indent=2) + "\n"
    return OutputFile(path=path, segments=(Literal(text.encode()),))


def files_of(edits: Iterable[Edit]) -> dict[Location, list[Edit]]:
    """The edits by the file that they change."""
    found: dict[Location, list[Edit]] = {}
    for edit in edits:
        found.setdefault(edit.place.file, []).append(edit)
    return found


def place(file: TorchFile, *keys: Key) -> Place:
    return Place(file=file.path, at=keys)


def alike(a: object, b: object) -> bool:
    """Whether values of two files are equal: objects by what is shown of them, tensors by shape and type."""
    return _alike(a, b, set())


def _alike(a: object, b: object, seen: set[tuple[int, int]]) -> bool:
    """`seen` are pairs of containers that are equal, or being looked at: shared ones are looked at once."""
    if isinstance(a, Opaque) and isinstance(b, Opaque):
        return alike(plain(a.node), plain(b.node))
    if not isinstance(a, Mapping | list | tuple):
        return bool(a == b or (a != a and b != b))
    if (id(a), id(b)) in seen:
        return True
    seen.add((id(a), id(b)))
    if isinstance(a, Mapping):
        return (
            isinstance(b, Mapping) and a.keys() == b.keys() and all(_alike(a[key], b[key], seen) for key in a)
        )
    pairs = zip(a, b, strict=True) if isinstance(b, list | tuple) and len(a) == len(b) else None
    return pairs is not None and all(_alike(one, two, seen) for one, two in pairs)
