"""What the keys of a distributed checkpoint mean: the model, the optimizer, and what is saved beside them.

    nested    model.<fqn>; optimizer.state.<fqn>.<kind>; optimizer.param_groups.<g>.<setting>, with `params`,
              the list of names in the group
    flat      the optimizer's state flattened (StateDictOptions.flatten_optimizer_state_dict): the same keys
              but from paths of two parts, and every setting per parameter: param_groups.<fqn>.<setting>;
              of an optimizer made from named parameters each has `param_names`, the list of its group
    titan     torchtitan: flat, the model's names at the top; beside it lr_scheduler, train_state, dataloader
    Megatron  the model's names at the top; optimizer.state.<kind>.<fqn>, where the kind fp32_param has the
              masters; or flat buckets that have no names (optimizer.distributed, chained_0.optimizer ...)

All of it may lie under one more key (`app` in torch's tutorial), beside which counters may stand.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

from msgspec import Struct, field

from ckpttools.checkpoint import FP32, PARAM_NAMES, ParamGroup
from ckpttools.containers.fields import bad_field
from ckpttools.errors import UsageError, escape, some
from ckpttools.formats.dcp.names import NAME
from ckpttools.formats.torch_optimizer import whole_and_counts
from ckpttools.location import Location
from ckpttools.tensors import TensorRef
from ckpttools.tree import Key, Value, leaves, same
from ckpttools.tree import Path as Keys

NESTED, FLAT, TITAN, ACCELERATE = "nested", "flat", "titan", "accelerate"
STYLES = (NESTED, FLAT, TITAN, ACCELERATE)
MODEL = ("model", "module", "model_state_dict", "state_dict", "model_state", "net", "weights")
OPTIMIZER = ("optimizer", "optim", "optimizer_state_dict", "optimizer_state", "optim_state_dict")
STATE, GROUPS, PARAMS = "state", "param_groups", "params"
BUCKETS, CHAINED = "distributed", "chained_"  # Megatron's: distrib_optimizer.py, ChainedOptimizer
EXTRA_STATE = "_extra_state"
MASTERS = {"fp32_param": FP32}


class Names(Struct, frozen=True, kw_only=True):
    """Under which keys the model and the optimizer lie: what only this format needs to write them again."""

    prefix: Keys = ()
    beside: frozenset[Key] = frozenset()  # keys of the client that do not lie below the prefix
    model: str | None = "model"  # None: at the top
    optimizer: str = "optimizer"


class Roles(Struct, frozen=True, kw_only=True):
    names: Names
    style: str
    tensors: Mapping[str, TensorRef]
    extra: Mapping[str, Value]  # what the model's state holds beside tensors
    groups: tuple[ParamGroup, ...] = ()
    client: Mapping[str, Value] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def tree(where: Location, values: Iterable[tuple[Keys, Value]]) -> dict[Key, Value]:
    """The saved state from its leaves. A list is made of the indices that are there, if none is missing."""
    root: dict[Key, Value] = {}
    for path, value in values:
        node = root
        for step in path[:-1]:
            node = node.setdefault(step, _Node())
            if not isinstance(node, _Node):
                raise bad_field(where / NAME, ".".join(map(str, path)), "lies below another value")
        if path[-1] in node:
            raise bad_field(where / NAME, ".".join(map(str, path)), "is there twice, or holds others")
        node[path[-1]] = value
    return {key: _plain(value) for key, value in root.items()}


class _Node(dict[Key, Value]):
    """A dict that is under construction, against one that is a saved value."""


def _plain(node: Value) -> Value:
    if not isinstance(node, _Node):
        return node
    if list(node) and all(isinstance(key, int) for key in node) and sorted(node) == list(range(len(node))):
        return [_plain(node[i]) for i in range(len(node))]
    return {key: _plain(value) for key, value in node.items()}


def guessed(keys: Iterable[str]) -> dict[str, Keys]:
    """Paths for keys without planner_data, as far as their beginnings say what they are."""
    known = dict.fromkeys(keys)
    model = {rest for head, _, rest in (key.partition(".") for key in known) if head in MODEL and rest}
    out: dict[str, Keys] = {}
    for key in known:
        head, _, rest = key.partition(".")
        part, _, inner = rest.partition(".")
        group, _, setting = inner.partition(".")
        out[key] = (key,)
        if (
            (head in MODEL and rest)
            or (head.startswith(CHAINED) and part in OPTIMIZER)
            or (head in OPTIMIZER and part == BUCKETS)
        ):
            out[key] = (head, rest)
        elif head in OPTIMIZER and part in (STATE, GROUPS) and inner:
            nested = f"{head}.{GROUPS}.0.{PARAMS}" in known
            if nested and part == GROUPS and group.isdecimal():
                out[key] = (head, GROUPS, int(group), setting)
            else:
                out[key] = (head, STATE, *_split(inner, model)) if nested else (head, rest)
    return out


def roles(where: Location, root: Mapping[Key, Value]) -> Roles:
    """Which part of the saved state is what. Raises CkptError for an optimizer that contradicts itself."""
    prefix, root, beside = _below(root)
    model_key, optimizer_key = _sections(root) or (None, None)
    rest = dict(root)
    tensors: dict[str, TensorRef] = {}
    extra: dict[str, Value] = {}
    notes: list[str] = []
    if model_key is not None:
        for path, leaf in _of_model(rest.pop(model_key)):
            (tensors if isinstance(leaf, TensorRef) else extra)[".".join(map(str, path))] = leaf
    else:
        tensors = {str(k): v for k, v in rest.items() if isinstance(v, TensorRef)}
        extra = {str(k): v for k, v in rest.items() if k not in tensors and str(k).endswith(EXTRA_STATE)}
        rest = {k: v for k, v in rest.items() if str(k) not in tensors and str(k) not in extra}
    if not tensors and optimizer_key is None:
        raise _no_weights(where, root)
    groups: tuple[ParamGroup, ...] = ()
    flat = False
    if optimizer_key is not None:
        node = rest[optimizer_key]
        flat = any(str(key).startswith((f"{STATE}.", f"{GROUPS}.")) for key in node)
        if not flat and _numbered(node):
            notes.append(
                "the optimizer's state is numbered, as torch.optim keeps it: which parameter is which is not "
                "in the files"
            )
        else:
            reader = _flat_groups if flat else _nested_groups
            groups = reader(where, node, {name: ref.shape for name, ref in tensors.items()}, notes)
            del rest[optimizer_key]
    style = TITAN if flat and model_key is None and tensors else FLAT if flat else NESTED
    return Roles(
        names=Names(
            prefix=prefix,
            beside=frozenset(beside),
            model=model_key,
            optimizer=optimizer_key or OPTIMIZER[0],
        ),
        style=style,
        tensors=tensors,
        extra=extra,
        groups=groups,
        client={str(key): value for key, value in (*rest.items(), *beside.items())},
        notes=tuple(notes),
    )


def _of_model(node: Mapping[Key, Value], below: Keys = ()) -> Iterator[tuple[Keys, Value]]:
    """The values of a model's state: tensors, and what a module gives as its extra state, which is one value
    whatever is in it (torch/nn/modules/module.py, _EXTRA_STATE_KEY_SUFFIX).
    """
    for key, value in node.items():
        path = (*below, key)
        if str(key).endswith(EXTRA_STATE):
            yield path, value
        elif isinstance(value, Mapping) and value:
            yield from _of_model(value, path)
        else:
            yield from (((*path, *inner), leaf) for inner, leaf in leaves(value))


def _below(root: Mapping[Key, Value]) -> tuple[Keys, Mapping[Key, Value], dict[Key, Value]]:
    """The key under which model and optimizer lie together, if they do, what is there and what is beside."""
    if _sections(root) or any(isinstance(value, TensorRef) for value in root.values()):
        return (), root, {}
    held = {key: inner for key, inner in root.items() if isinstance(inner, Mapping) and _sections(inner)}
    if len(held) != 1:
        return (), root, {}
    ((key, inner),) = held.items()
    beside = {other: value for other, value in root.items() if other != key}
    return ((), root, {}) if beside.keys() & inner.keys() else ((key,), inner, beside)


def _no_weights(where: Location, root: Mapping[Key, Value]) -> UsageError:
    """Nothing is damaged: which of the tensors are the model is not known."""
    held = [str(key) for key, value in root.items() if _has_tensors(value)]
    if not held:
        return UsageError(
            "not-a-checkpoint",
            "a distributed checkpoint without tensors",
            where=where,
            why="no model is in it",
            hint="name the folder that holds the model, if it was saved apart",
        )
    return UsageError(
        "no-weights",
        f"the weights lie under no name that training code usually gives: tensors lie under {some(held)}",
        where=where,
        why=f"the names looked for are {', '.join(MODEL)}, also below one other key",
        hint="torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes one file of it; "
        "ckpt's --key then says which weights",
    )


def _sections(root: Mapping[Key, Value]) -> tuple[str | None, str | None] | None:
    """The keys of the model and of the optimizer, None for what is not there, None where neither is."""
    model = next((k for k in MODEL if _has_tensors(root.get(k))), None)
    optimizer = next((k for k in OPTIMIZER if _is_optimizer(root.get(k))), None)
    return (model, optimizer) if model or optimizer else None


def _has_tensors(node: Value) -> bool:
    return isinstance(node, Mapping) and any(isinstance(leaf, TensorRef) for _, leaf in leaves(node))


def _is_optimizer(node: Value) -> bool:
    return isinstance(node, Mapping) and any(
        key in (STATE, GROUPS) or str(key).startswith((f"{STATE}.", f"{GROUPS}.")) for key in node
    )


def _numbered(node: Mapping[Key, Value]) -> bool:
    groups = node.get(GROUPS)
    lists = [g.get(PARAMS) for g in groups if isinstance(g, Mapping)] if isinstance(groups, list) else []
    return any(isinstance(names, list) and any(type(n) is int for n in names) for names in lists)


def _nested_groups(
    where: Location, node: Mapping[Key, Value], shapes: Mapping[str, tuple[int, ...]], notes: list[str]
) -> tuple[ParamGroup, ...]:
    groups, states = node.get(GROUPS, []), node.get(STATE, {})
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise bad_field(where / NAME, GROUPS, "is not a list of groups")
    if not isinstance(states, Mapping):
        raise bad_field(where / NAME, STATE, "is not a dict")
    left = {str(name): state for name, state in states.items()}
    out = []
    for g, group in enumerate(groups):
        names = group.get(PARAMS, [])
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise bad_field(where / NAME, f"{GROUPS}.{g}.{PARAMS}", "is not a list of names")
        mine = {name: left.pop(name, {}) for name in names}
        hyper = {str(key): value for key, value in group.items() if key != PARAMS}
        out.append(_group(mine, hyper, shapes, notes))
    if left:
        notes.append(f"optimizer state of {len(left)} parameters that no group names")
        out.append(_group(left, {}, shapes, notes))
    return tuple(out)


def _flat_groups(
    where: Location, node: Mapping[Key, Value], shapes: Mapping[str, tuple[int, ...]], notes: list[str]
) -> tuple[ParamGroup, ...]:
    """Groups are not in the files: parameters with the same settings make one."""
    states: dict[str, dict[Key, Value]] = {}
    hyper: dict[str, dict[str, Value]] = {}
    for key, value in node.items():
        part, _, rest = str(key).partition(".")
        name, setting = _split(rest, shapes)
        if part == STATE:
            states.setdefault(name, {})[MASTERS.get(setting, setting)] = value
        elif part == GROUPS:
            hyper.setdefault(name, {})[setting] = value
        else:
            notes.append(f"the optimizer's '{escape(key)}' is not known")
    groups: list[tuple[dict[str, Value], dict[str, dict[Key, Value]]]] = []
    for name in dict.fromkeys((*hyper, *states)):
        mine = hyper.get(name, {})
        members = next((members for known, members in groups if same(known, mine)), None)
        if members is None:
            groups.append((mine, members := {}))
        members[name] = states.get(name, {})
    if not all(PARAM_NAMES in mine for mine, _ in groups):
        notes.append("the optimizer's groups are not in the files: parameters of the same settings make one")
    return tuple(_group(members, mine, shapes, notes) for mine, members in groups)


def _split(rest: str, names: Container[str]) -> tuple[str, str]:
    """`<fqn>.<setting>`, where either may hold dots: the longest name that the model has. Megatron puts the
    setting first.
    """
    head, tail = rest, ""
    while "." in head:
        head, _, step = head.rpartition(".")
        tail = f"{step}.{tail}" if tail else step
        if head in names:
            return head, tail
    kind, _, name = rest.partition(".")
    if name in names:
        return name, kind
    name, _, setting = rest.rpartition(".")
    return name, setting


def _group(
    states: Mapping[str, Value],
    hyper: Mapping[str, Value],
    shapes: Mapping[str, tuple[int, ...]],
    notes: list[str],
) -> ParamGroup:
    found: dict[str, dict[str, Value]] = {}
    paths: dict[str, Keys] = {}
    params: dict[str, tuple[int, ...]] = {}
    for name, state in states.items():
        held = list(leaves(state)) if isinstance(state, Mapping) and state else []
        for path, value in held:
            kind = ".".join(map(str, path))
            found.setdefault(kind, {})[name] = value
            if len(path) > 1:
                paths[kind] = path
        largest = max((v.shape for _, v in held if isinstance(v, TensorRef)), key=len, default=None)
        shape = shapes.get(name, largest)
        if shape is None:
            notes.append(f"the shape of '{escape(name)}', which has no state and no weight, is not known")
            continue
        params[name] = shape
    state_of, scalars = whole_and_counts(found, params)
    return ParamGroup(
        params=params,
        state=state_of,
        hyper={key: value for key, value in hyper.items() if key != PARAM_NAMES},
        scalars=scalars,
        paths=paths,
        named=PARAM_NAMES in hyper,
    )
