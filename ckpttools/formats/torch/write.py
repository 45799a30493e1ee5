"""Writing a single file, with the keys that training code usually has.

A file that was read keeps its own keys, and whatever has not changed its own nodes. Each weight is written
once, in fp32 where there is a master. Every tensor of the optimizer gets a storage of its own: torch counts
steps in place, and one storage for two parameters would count twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from ckpttools.checkpoint import PARAM_NAMES, Checkpoint, Layout, ParamGroup
from ckpttools.containers import fields
from ckpttools.containers.edit import at
from ckpttools.containers.nodes import ORDERED, decode, encode, kept, put_node
from ckpttools.containers.pickles import Dict, Node, Object
from ckpttools.containers.torch_file import Storage, TorchFile, write_torch_file
from ckpttools.errors import UsageError, escape, some
from ckpttools.formats.buffers import BUFFERS, told
from ckpttools.formats.format import Places
from ckpttools.formats.notes import left_out, one_copy, unnamed, unread
from ckpttools.formats.torch.names import find_weights, strip
from ckpttools.formats.torch_optimizer import place_of, separate, state_of
from ckpttools.plan import Plan
from ckpttools.tensors import TensorRef
from ckpttools.tree import Key, Path, Value, dotted, leaves, put, same, tensors

# fields of Training whose key is another than their name
COUNTERS = {"scheduler": "scheduler_state_dict", "step": "global_step", "samples": "global_samples"}


class Template(NamedTuple):
    """The file that was read, and where in it the parts lie."""

    file: TorchFile
    root: Dict | Object
    weights: str
    prefix: str
    optimizer: tuple[Key, ...] | None


def plan(checkpoint: Checkpoint, layout: Layout | None = None) -> Plan:
    """The one file; its path is the destination itself. `layout` says nothing that a single file can show."""
    template = _template(checkpoint)
    notes: list[str] = []
    values: dict[str, Node] = {}
    values[template.weights if template else "model_state_dict"] = _module(checkpoint, template, notes)
    if checkpoint.groups:
        path = _optimizer_path(template)
        values[str(path[0])] = _optimizer(checkpoint, template, path)
    if (buffers := told(checkpoint)) is not None:
        values[BUFFERS] = buffers
    for key, value in _rest(checkpoint, template, values, notes).items():
        if template is None or key not in template.root:
            values[key] = encode(value, {})
        else:
            values[key] = kept(template.file, template.root.get(key), value, {})
    notes += _not_held(checkpoint)
    if template is None:
        notes += unread(checkpoint)
        root: Dict | Object = Dict.of(values.items())
    else:
        # keys that are no text are nobody's: they stay, and whoever reads the file is told
        root = template.root.replace(values, [k for k in template.root.names() if k not in values])
    file = write_torch_file("", root)
    return Plan(files=(file,), notes=tuple(dict.fromkeys(notes)), checks=checkpoint.checks)


def keys_of(checkpoint: Checkpoint) -> Places:
    """Where the parts lie in the file that `plan` makes."""
    found = _template(checkpoint)
    return Places(
        weights=(found.weights if found is not None else "model_state_dict",),
        optimizer=_optimizer_path(found),
        scheduler=_place(checkpoint, found, "scheduler"),
    )


def _optimizer_path(template: Template | None) -> Path:
    return template.optimizer if template and template.optimizer else ("optimizer_state_dict",)


def _place(checkpoint: Checkpoint, template: Template | None, field: str) -> Path:
    """Where a field of Training lies: in the place that it had in the file that was read, if one was."""
    usual = (COUNTERS.get(field, field),)
    path = checkpoint.training.keys.get(field, usual)
    return path if template is not None or len(path) > 1 else usual


def _template(checkpoint: Checkpoint) -> Template | None:
    file = checkpoint.template
    if not isinstance(file, TorchFile):
        return None
    root = fields.as_mapping(file.value)
    try:
        key, found = find_weights(file)
    except UsageError:  # they were asked for under another key
        return None
    if root is None or key is None or key in checkpoint.client:
        return None
    return Template(file, root, key, strip(found)[1], place_of(file))


def _module(checkpoint: Checkpoint, template: Template | None, notes: list[str]) -> Node:
    """The state dict. Tied names are views of one storage."""
    best = checkpoint.best_copies()
    notes += one_copy(checkpoint)
    prefix = template.prefix if template else ""
    values: dict[str, Value] = {prefix + name: ref for name, ref in best.items()}
    names = dict.fromkeys(values)  # of tied ones the first has the optimizer's state
    values |= {prefix + name: value for name, value in checkpoint.extra_state.items()}
    old = fields.as_mapping(template.root.get(template.weights)) if template else None
    if template is not None and old is not None:
        before = {name: decode(template.file, node) for name, node in old.named()}
        in_order = before.keys() == values.keys() and [n for n in before if n in names] == [*names]
        if in_order and all(same(before[name], value) for name, value in values.items()):
            return template.root.get(template.weights)
    made = Object("reduce", ORDERED, ())
    if isinstance(old, Object):
        made.state = old.state  # the versions of the modules (_metadata)
    storages: dict[object, Storage] = {}
    nodes: dict[TensorRef, Node] = {}
    pairs: list[tuple[Node, Node]] = []
    if template is not None and old is not None:
        nodes = {view.ref: node for _, node in old.named() if (view := template.file.view(node)) is not None}
    for name, value in values.items():
        known = nodes.get(value) if isinstance(value, TensorRef) else None
        pairs.append((name, encode(value, storages) if known is None else known))
    if old is not None:  # as those of the whole file: nobody's, and they stay
        pairs += [pair for pair in old.pairs if not isinstance(pair[0], str)]
    made.pairs = pairs
    return made


def _optimizer(checkpoint: Checkpoint, template: Template | None, path: tuple[Key, ...]) -> Node:
    """The optimizer's state dict: ids count on over the groups."""
    old = template.root.get(str(path[0])) if template and template.optimizer else None
    inner = at(old, *path[1:]) if old is not None else None
    before = fields.as_mapping(inner)
    old_state = fields.as_mapping(before.get("state")) if before is not None else None
    known = _by_tensor(template, old_state)
    saved = before.get("param_groups") if before is not None else None
    old_groups = [fields.as_mapping(each) for each in saved] if isinstance(saved, list) else []
    old_groups += [None] * (len(checkpoint.groups) - len(old_groups))
    states: list[tuple[Node, Node]] = []
    groups: list[Node] = []
    for group, settings, ids in zip(
        checkpoint.groups, old_groups, _ids(old_groups, checkpoint.groups), strict=False
    ):
        for i, name in zip(ids, group.params, strict=True):
            node = _state(group, name, template, known)
            if node is not None:
                states.append((i, node))
        wanted: dict[str, Value] = dict(group.hyper)
        if settings is None or PARAM_NAMES in settings:
            # torch >= 2.6 keeps them and goes by the order alone
            wanted[PARAM_NAMES] = list(group.params)
        wanted["params"] = ids
        if template is None or settings is None:
            groups.append(encode(wanted, {}))
        else:
            order = [*(k for k in settings.names() if k in wanted), *(k for k in wanted if k not in settings)]
            groups.append(kept(template.file, settings, {key: wanted[key] for key in order}))
    values: dict[str, Node] = {"state": Dict.of(states), "param_groups": groups}
    values |= {key: encode(value, {}) for key, value in _beside(checkpoint, str(path[0])).items()}
    new = Dict.of(values.items()) if before is None else before.replace(values)
    if old is None or template is None:
        return new
    return put_node(old, path[1:], new)


def _beside(checkpoint: Checkpoint, key: str) -> Mapping[str, Value]:
    """What the optimizer's dict held beside state and groups."""
    rest = checkpoint.client.get(key)
    return rest if isinstance(rest, Mapping) and not rest.keys() & {"state", "param_groups"} else {}


def _ids(old: Sequence[fields.Mapping | None], groups: Sequence[ParamGroup]) -> list[list[Key]]:
    """The ids of each group's parameters: as the file that was read has them where all are as many, else
    counted anew. An id says nothing about which parameter it was in that file.
    """
    saved = [settings.get("params") if settings is not None else None for settings in old]
    listed = [each for each in saved if isinstance(each, list)]
    if any(isinstance(i, str) for each in listed for i in each):
        return [list(group.params) for group in groups]
    if [len(each) for each in listed] == [len(group.params) for group in groups]:
        return [[i for i in each if isinstance(i, int)] for each in listed]
    ends = list(accumulate((len(group.params) for group in groups), initial=0))
    return [list(range(first, end)) for first, end in pairwise(ends)]


def _by_tensor(
    template: Template | None, state: fields.Mapping | None
) -> dict[TensorRef, tuple[Node, Value]]:
    """What the file that was read keeps for a parameter, by each tensor in it: the node and its value."""
    if template is None or state is None:
        return {}
    kept = [(node, decode(template.file, node)) for _, node in state.pairs]
    return {ref: (node, value) for node, value in kept for _, ref in tensors(value)}


def _state(
    group: ParamGroup,
    name: str,
    template: Template | None,
    known: Mapping[TensorRef, tuple[Node, Value]],
) -> Node:
    """What the optimizer keeps for one parameter, None where that is nothing; counts come first."""
    refs = (refs[name] for refs in group.state.values() if name in refs)
    old, before = next((known[ref] for ref in refs if ref in known), (None, {}))
    found = state_of(group, name, [dotted(path) for path, _ in leaves(before)])
    if not found:
        return None
    if template is not None and old is not None:
        return kept(template.file, old, found)
    return separate(found)


def _rest(
    checkpoint: Checkpoint, template: Template | None, taken: Mapping[str, Node], notes: list[str]
) -> dict[str, Value]:
    """Counters and what training code saved, by key, in the order of the file that was read."""
    state = checkpoint.training
    out: dict[str, Value] = dict(checkpoint.client)
    optimizer = _optimizer_path(template)
    for key in [each for each in out if each in taken]:
        if key not in optimizer or not _beside(checkpoint, key):
            notes.append(f"'{escape(key)}' among the client's values is not written: the name is taken")
        del out[key]
    for field, value in state.stated.items():
        if value not in (None, {}, []):
            out = put(out, _place(checkpoint, template, field), value)
    return out


def _not_held(checkpoint: Checkpoint) -> Iterator[str]:
    layout = checkpoint.layout
    yield from unnamed(checkpoint)
    if not checkpoint.groups and not checkpoint.unnamed:
        yield "no optimizer state: the source has none whose parameters are known by name"
    elif not checkpoint.unnamed and not all(group.hyper for group in checkpoint.groups):
        yield "no optimizer settings (lr, betas ...): the source does not have them"
    if checkpoint.optimizer:
        yield f"not kept: the optimizer's class ({escape(checkpoint.optimizer)})"
    if checkpoint.loss_scaler and checkpoint.loss_scaler.get("dynamic") is not False:
        yield f"not kept: the loss scaler ({escape(checkpoint.loss_scaler.get('class', 'of no class'))})"
    if checkpoint.settings:
        yield f"not kept: the run's settings ({some(checkpoint.settings)})"
    yield from left_out(checkpoint)
    if layout.dp_degree > 1:
        yield f"not kept: the layout for {layout.dp_degree} ranks; any number of ranks loads the file"
