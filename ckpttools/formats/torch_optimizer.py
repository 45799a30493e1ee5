"""A torch optimizer's saved state as parameter groups with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct, field

from ckpttools.checkpoint import FP32, PARAM_NAMES, STEP, Checkpoint, ParamGroup
from ckpttools.containers.edit import at
from ckpttools.containers.nodes import decode, encode
from ckpttools.containers.pickles import Dict, Node
from ckpttools.containers.torch_file import TorchFile, tensor_node
from ckpttools.containers.torch_file.modules import candidates
from ckpttools.errors import escape
from ckpttools.formats.buffers import is_buffer
from ckpttools.formats.counters import OPTIMIZER
from ckpttools.formats.ids import Ids, Shape, by_shape
from ckpttools.tensors import TensorRef
from ckpttools.tree import Key, Value, dotted, leaves, put
from ckpttools.tree import Path as Keys

ROW, COL = "_row", "_col"
PREFIXES = ("module.", "_orig_mod.")  # that DDP and torch.compile put before names


class Saved(Struct, frozen=True, kw_only=True):
    """What a file keeps of an optimizer. `groups` are empty, and `problem` says why, where its parameters
    have no names; `rest` is what the optimizer's dict holds beside state and groups.
    """

    path: tuple[Key, ...]
    groups: tuple[ParamGroup, ...] = ()
    problem: str | None = None
    by_place: bool = False  # the names were found by order and shape
    rest: Mapping[str, Value] = field(default_factory=dict)


def place_of(file: TorchFile) -> tuple[Key, ...] | None:
    """Where an optimizer's state dict lies: under one of the usual keys, or the only item of a list there."""
    for key in OPTIMIZER:
        node = at(file.value, key)
        path: tuple[Key, ...] = (key, 0) if isinstance(node, list | tuple) and len(node) == 1 else (key,)
        if at(file.value, *path, "state") is not None and at(file.value, *path, "param_groups") is not None:
            return path
        if node is not None:
            return None
    return None


def of(checkpoint: Checkpoint) -> Saved | None:
    """What a single file says about its optimizer, None where it has none or is no such file."""
    file = checkpoint.template
    return read(file, checkpoint.tensors, checkpoint.shared) if isinstance(file, TorchFile) else None


def keys_of_weights(checkpoint: Checkpoint) -> list[str]:
    """Where weights may lie in a single file."""
    file = checkpoint.template
    return [key for key, _ in candidates(file)] if isinstance(file, TorchFile) else []


def read(
    file: TorchFile,
    tensors: Mapping[str, TensorRef],
    shared: Mapping[str, str],
    order: Sequence[Sequence[str]] | None = None,
    path: tuple[Key, ...] | None = None,
) -> Saved | None:
    """The optimizer of a file whose weights are `tensors`; None where it keeps none that is known.

    `order` are the names of each group's parameters, where they are known from elsewhere; `path` is where it
    lies, if under none of the usual keys.
    """
    path = path or place_of(file)
    if path is None:
        return None
    value = decode(file, at(file.value, *path))
    if not isinstance(value, dict):
        return None
    state, saved = value["state"], value["param_groups"]
    groups = [group for group in saved if isinstance(group, dict)] if isinstance(saved, list) else []
    if not isinstance(state, dict) or not groups or len(groups) != len(saved):
        return Saved(path=path, problem="its state is not one of torch.optim")
    ids = [group.get("params") for group in groups]
    flat = [each for group in ids if isinstance(group, list) for each in group]
    if not all(isinstance(group, list) for group in ids) or not all(type(i) in (int, str) for i in flat):
        return Saved(path=path, problem="its groups do not list their parameters")
    if len(set(flat)) != len(flat) or not set(state) <= set(flat):
        return Saved(path=path, problem="its state is of other parameters than its groups")
    if not all(isinstance(each, dict) and all(type(k) is str for k in each) for each in state.values()):
        return Saved(path=path, problem="its state is not kept per parameter")
    # as ZeRO's: bitsandbytes keeps its moments one level deeper, other optimizers in lists
    nested = {i: dict(leaves(each)) for i, each in state.items() if any(map(_holds, each.values()))}
    values = {
        i: {dotted(p): value for p, value in nested[i].items()} if i in nested else each
        for i, each in state.items()
    }
    paths = {dotted(p): p for each in nested.values() for p in each if len(p) > 1}
    found = _names(groups, values, tensors, shared, order)
    if found.problem is not None:
        return Saved(path=path, problem=found.problem)
    return Saved(
        path=path,
        groups=tuple(
            _group(group, dict(zip(names, group["params"], strict=True)), values, paths, tensors)
            for group, names in zip(groups, found.names, strict=True)
        ),
        by_place=not any(
            PARAM_NAMES in group or any(type(i) is str for i in group["params"]) for group in groups
        ),
        rest={key: each for key, each in value.items() if key not in ("state", "param_groups")},
    )


def _holds(value: Value) -> bool:
    return isinstance(value, (dict, list, tuple))


def _names(
    groups: list[dict[str, Value]],
    state: Mapping[Key, Mapping[str, Value]],
    tensors: Mapping[str, TensorRef],
    shared: Mapping[str, str],
    order: Sequence[Sequence[str]] | None,
) -> Ids:
    """The names of all ids: as the groups list them, as the ids are, in the order given, else by shape."""
    for key in (PARAM_NAMES, "params"):
        lists = [group.get(key) for group in groups]
        if all(isinstance(names, list) and all(type(n) is str for n in names) for names in lists):
            return _listed([[*names] for names in lists if names is not None], groups, tensors, shared)
    model = {
        name: ref.shape for name, ref in tensors.items() if name not in shared and not is_buffer(name, ref)
    }
    whole = {
        kind
        for each in state.values()
        for kind, value in each.items()
        if kind != STEP and isinstance(value, TensorRef) and value.shape
    }
    shapes = [[_shape(state.get(i, {}), whole) for i in group["params"]] for group in groups]
    return by_shape(shapes, model) if order is None else _ordered(shapes, model, order)


def _ordered(
    shapes: Sequence[Sequence[Shape | None]], model: Mapping[str, Shape], order: Sequence[Sequence[str]]
) -> Ids:
    """The names in an order that is known, if the shapes fit it."""
    ours, theirs = [len(group) for group in shapes], [len(group) for group in order]
    if ours != theirs:
        return Ids(problem=f"it has groups of {ours} parameters, the other run of {theirs}")
    for group, names in zip(shapes, order, strict=True):
        for shape, name in zip(group, names, strict=True):
            if shape is not None and model.get(name) != shape:
                return Ids(problem=f"its state is {list(shape)} where {escape(name)} stands in the other run")
    return Ids(names=tuple(tuple(names) for names in order))


def _listed(
    lists: list[list[str]],
    groups: list[dict[str, Value]],
    tensors: Mapping[str, TensorRef],
    shared: Mapping[str, str],
) -> Ids:
    found: list[tuple[str, ...]] = []
    for names, group in zip(lists, groups, strict=True):
        if len(names) != len(group["params"]):
            return Ids(problem=f"{PARAM_NAMES} and params are of different lengths")
        own = [_own(name, tensors) for name in names]
        lacking = next((names[i] for i, name in enumerate(own) if name is None), None)
        if lacking is not None:
            return Ids(problem=f"it names {escape(lacking)}, which the model does not have")
        found.append(tuple(shared.get(name, name) for name in own if name is not None))
    if len({name for names in found for name in names}) != sum(map(len, found)):
        return Ids(problem="it names a parameter twice")
    return Ids(names=tuple(found))


def _own(name: str, tensors: Mapping[str, TensorRef]) -> str | None:
    """The model's name for a parameter that may carry the prefixes of wrappers."""
    while name not in tensors:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return name


def _shape(state: Mapping[str, Value], whole: set[str]) -> Shape | None:
    """The shape that the tensors kept for a parameter agree on, None where there is none or several."""
    shapes: set[Shape | None] = set()
    for kind, value in state.items():
        if kind in whole and isinstance(value, TensorRef):  # a 0-d tensor of other kinds is a count
            shapes.add(_factored(state, kind) if kind.endswith((ROW, COL)) else value.shape)
    return shapes.pop() if len(shapes) == 1 else None


def _factored(state: Mapping[str, Value], kind: str) -> Shape | None:
    """The shape of a parameter whose second moment is kept as its means over columns and over rows: each
    lacks a dimension, and of a square matrix they are alike (transformers, optimization.py, Adafactor).
    """
    name = kind.removesuffix(ROW).removesuffix(COL)
    row, col = state.get(name + ROW), state.get(name + COL)
    if not isinstance(row, TensorRef) or not isinstance(col, TensorRef) or not row.shape or not col.shape:
        return None
    return (*row.shape, col.shape[-1]) if row.shape[:-1] == col.shape[:-1] else None


def _group(
    saved: Mapping[str, Value],
    ids: Mapping[str, Key],
    state: Mapping[Key, Mapping[str, Value]],
    paths: Mapping[str, Keys],
    tensors: Mapping[str, TensorRef],
) -> ParamGroup:
    shapes = {name: tensors[name].shape for name in ids}
    held: dict[str, dict[str, Value]] = {}
    for name, i in ids.items():
        for kind, value in state.get(i, {}).items():
            held.setdefault(kind, {})[name] = value
    kept, scalars = whole_and_counts(held, shapes)
    return ParamGroup(
        params=shapes,
        state=kept,
        scalars=scalars,
        hyper={key: value for key, value in saved.items() if key not in ("params", PARAM_NAMES)},
        paths={kind: path for kind, path in paths.items() if kind in kept or kind in scalars},
        named=PARAM_NAMES in saved,
    )


def whole_and_counts(
    held: Mapping[str, Mapping[str, Value]], shapes: Mapping[str, Shape]
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, dict[str, Value]]]:
    """State by kind and name: the tensors of their parameters' shapes, and all else.

    A count beside a parameter without dimensions has its shape, and is one all the same where others have a
    tensor without dimensions too.
    """
    whole: dict[str, dict[str, TensorRef]] = {}
    rest: dict[str, dict[str, Value]] = {}
    for kind, values in held.items():
        count = kind == STEP or any(
            isinstance(value, TensorRef) and not value.shape and shapes.get(name)
            for name, value in values.items()
        )
        for name, value in values.items():
            if isinstance(value, TensorRef) and value.shape == shapes.get(name) and not count:
                whole.setdefault(kind, {})[name] = value
            else:
                rest.setdefault(kind, {})[name] = value
    return whole, rest


# --- written anew ---------------------------------------------------------------------------------------


def state_of(group: ParamGroup, name: str, order: Sequence[str] = ()) -> dict[Key, Value]:
    """What the optimizer keeps for one parameter, but for its master: kinds in `order`, then counts first."""
    kinds = {
        kind: values[name]
        for held in (group.scalars, group.state)
        for kind, values in held.items()
        if name in values and kind != FP32
    }
    found: dict[Key, Value] = {}
    for kind in dict.fromkeys((*order, *kinds)):
        if kind in kinds:
            path = group.paths.get(kind)
            if path is None:
                found[kind] = kinds[kind]
            else:
                found = put(found, path, kinds[kind])
    return found


def separate(value: Value) -> Node:
    """The node of a value in which every tensor has a storage of its own: torch counts steps in place."""
    if isinstance(value, TensorRef):
        return tensor_node(value)
    if isinstance(value, Mapping):
        return Dict.of((key, separate(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(map(separate, value))
    return encode(value, {})
