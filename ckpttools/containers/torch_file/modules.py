"""Named tensors inside a torch file's value: a state dict, a pickled module, a list.

torch.save(model) pickles each nn.Module as an object whose state holds `_parameters`, `_buffers`, `_modules`
(name -> what it is, None where it is registered and absent) and `_non_persistent_buffers_set`. The names are
those of Module.state_dict: a module's parameters, then its buffers but for the non-persistent ones, then its
modules'. Source: torch/nn/modules/module.py (_save_to_state_dict). No class of it is looked up.
"""

from __future__ import annotations

from ckpttools.containers.pickles import Node, Object, Pairs, Set, as_mapping
from ckpttools.containers.torch_file.views import TorchFile, View
from ckpttools.errors import CkptError, escape, some

MAX_DEPTH = 200  # modules within modules
MAX_NAMES = 1_000_000


def named_views(file: TorchFile, node: Node) -> dict[str, View]:
    """The tensors that a node holds by name; empty where it holds none in a form that names them.

    Tied parameters have the same storage. A list's tensors are named by their places.
    """
    if (state := module_state(node)) is not None:
        return _of_module(file, state)
    if isinstance(node, list | tuple):
        views = {str(i): file.view(item) for i, item in enumerate(node)}
        return {name: view for name, view in views.items() if view is not None} if all(views.values()) else {}
    pairs = as_mapping(node)
    if pairs is None:
        return {}
    found = ((name, file.view(value)) for name, value in pairs.named())
    return {name: view for name, view in found if view is not None}


def module_state(node: Node) -> Pairs | None:
    """The state of a pickled nn.Module, of whatever class; None for anything else."""
    if not isinstance(node, Object) or not node.has_state:
        return None
    state = as_mapping(node.state)
    return state if state is not None and "_parameters" in state and "_modules" in state else None


def _of_module(file: TorchFile, state: Pairs) -> dict[str, View]:
    found: dict[str, View] = {}
    todo: list[tuple[str, Pairs, int]] = [("", state, 0)]
    made = 0
    while todo:
        prefix, state, depth = todo.pop()
        made += 1
        if depth > MAX_DEPTH or made > MAX_NAMES or len(prefix) > 10_000:
            raise CkptError(
                "field-damaged",
                "a module holds itself, or modules without end",
                where=file.path,
                why="its weights would have names without end",
            )
        passing = _members(state.get("_non_persistent_buffers_set"))
        for kind, left_out in (("_parameters", frozenset[str]()), ("_buffers", passing)):
            for name, value in _named(state.get(kind)):
                view = file.view(value) if name not in left_out else None
                if view is not None:
                    found[prefix + name] = view
        inner = [(name, module_state(value)) for name, value in _named(state.get("_modules"))]
        todo += [
            (f"{prefix}{name}.", child, depth + 1) for name, child in reversed(inner) if child is not None
        ]
    return found


def _named(node: Node) -> list[tuple[str, Node]]:
    pairs = as_mapping(node)
    return [] if pairs is None else list(pairs.named())


def _members(node: Node) -> frozenset[str]:
    """The strings of a set, as protocol 4 writes it or as a call of `set`."""
    if isinstance(node, Object) and (node.is_a("builtins", "set") or node.is_a("__builtin__", "set")):
        node = node.args[0] if node.args else []
    items = node.members if isinstance(node, Set) else node if isinstance(node, list | tuple) else []
    return frozenset(item for item in items if isinstance(item, str))


def under(node: Node, key: str) -> Node:
    """What a dotted path leads to; a key may itself hold dots. None where it leads nowhere."""
    if isinstance(node, list | tuple):
        head, _, rest = key.partition(".")
        inner = node[int(head)] if head.isdecimal() and len(head) < 10 and int(head) < len(node) else None
        return under(inner, rest) if rest and inner is not None else inner
    pairs = module_state(node) or as_mapping(node)
    if pairs is None:
        return None
    if key in pairs:
        return pairs.get(key)
    cuts = [i for i, c in enumerate(key) if c == "."][:40]
    for cut in cuts:
        if key[:cut] in pairs and (found := under(pairs.get(key[:cut]), key[cut + 1 :])) is not None:
            return found
    return None


def candidates(file: TorchFile, depth: int = 3) -> list[tuple[str, int]]:
    """Keys of the file's value under which named tensors lie, and how many; in file order, not below others.

    Optimizers keep their tensors under numbers, which are no names.
    """
    found: list[tuple[str, int]] = []
    todo: list[tuple[str, Node, int]] = [("", file.value, 0)]
    while todo and len(found) < 100:
        path, node, level = todo.pop(0)
        if path and (n := len(named_views(file, node))):
            found.append((path, n))
            continue
        listed = enumerate(node) if isinstance(node, list | tuple) else ()
        items = [*_named(node), *((str(i), item) for i, item in listed)] if level < depth else []
        todo += [(f"{path}.{name}" if path else name, item, level + 1) for name, item in items[:1000]]
    return found


def what_it_is(file: TorchFile) -> str:
    """A torch file without weights, in words: what its value looks like."""
    node = file.value
    pairs = as_mapping(node)
    if pairs is None:
        if isinstance(node, Object):
            return "one tensor" if file.view(node) is not None else f"an object of class {escape(node.cls)}"
        return f"a list of {len(node)} values" if isinstance(node, list | tuple) else "a single value"
    return state_of(pairs) or f"a dict whose keys are {some(pairs.names(), 12) or 'none'}"


def state_of(pairs: Pairs) -> str | None:
    """Whose state a dict is that belongs to no model, in words."""
    keys = set(pairs.names())
    if {"state", "param_groups"} <= keys:
        return "the state of an optimizer"
    if "last_epoch" in keys or "_step_count" in keys:
        return "the state of a learning rate scheduler"
    if {"scale", "growth_factor"} <= keys:
        return "the state of a gradient scaler"
    if {"python", "numpy", "cpu"} <= keys or {"random_state", "torch_manual_seed"} <= keys:
        return "the states of random number generators"  # of the HF Trainer, of accelerate
    return None
