"""Writing mp_rank_00_model_states.pt: weights, shapes, names, counters, the client's own values."""

from __future__ import annotations

from collections.abc import Mapping

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import fields
from ckpttools.containers.nodes import ORDERED, decode, encode, encode_tensor, kept, ordered
from ckpttools.containers.pickles import Dict, Node, Object
from ckpttools.containers.torch_file import Storage, size, size_node, write_torch_file
from ckpttools.formats.buffers import listed
from ckpttools.formats.deepspeed import (
    OWN_KEYS,
    client_values,
    counter_values,
    frozen_shapes,
    scheduler_state,
    shapes_node,
    version_of,
)
from ckpttools.formats.model_states import ModelStates
from ckpttools.formats.rank_files import MODEL_NAME
from ckpttools.formats.zero.target import Target
from ckpttools.plan import OutputFile
from ckpttools.tensors import TensorRef
from ckpttools.tree import Value, same

# what DeepSpeed writes beside the rest and nothing models (engine.py, _common_checkpoint_state)
EMPTY: Mapping[str, Node] = {"optimizer": None, "data_sampler": None, "random_ltd": None}


def output(to: Target, batch: Mapping[str, int]) -> OutputFile:
    """The model file. `batch` are the settings of ds_config that change with the ranks."""
    template = to.template.model if to.template is not None else None
    storages: dict[object, Storage] = {}
    values = _values(to, template, storages) | _client(to.checkpoint, template, storages)
    config = configured(to, template.root if template is not None else Dict(), batch)
    if template is None:
        root: Dict | Object = Dict.of({**EMPTY, **values, **config}.items())
        return write_torch_file(MODEL_NAME, root)
    known = OWN_KEYS | set(values) | set(config)
    dropped = [key for key in template.root.names() if key not in known]
    return write_torch_file(template.file.path.name, template.root.replace(values | config, dropped))


def _values(to: Target, template: ModelStates | None, storages: dict[object, Storage]) -> dict[str, Node]:
    """What DeepSpeed itself keeps in the file; a key that the template lacks stays out if it adds nothing."""
    checkpoint = to.checkpoint
    root: Dict | Object = template.root if template is not None else Dict()
    out: dict[str, Node] = {"module": _module(checkpoint, template, storages)}
    buffers = listed(checkpoint)
    if template is None or template.buffers != set(buffers):
        out["buffer_names"] = [*buffers]
    if template is None or root.get("param_shapes") is not None:
        out["param_shapes"] = param_shapes(to, root.get("param_shapes"))
    if template is None or checkpoint.frozen != template.frozen:
        out["frozen_param_shapes"] = shapes_node(frozen_shapes(checkpoint))
        out["frozen_param_fragments"] = _fragments(checkpoint, storages)
    elif root.get("frozen_param_fragments") is not None and checkpoint.tensors != template.weights:
        out["frozen_param_fragments"] = _fragments(checkpoint, storages)
    if template is None or checkpoint.shared != template.shared:
        out["shared_params"] = encode(dict(checkpoint.shared))
    scheduler, own = scheduler_state(checkpoint)
    if template is None or (own and (scheduler or root.get("lr_scheduler"))):
        out["lr_scheduler"] = _kept(template, "lr_scheduler", scheduler)
    out |= counter_values(checkpoint)
    if template is None:
        out.setdefault("global_steps", 0)  # DeepSpeed loads nothing without
    out["dp_world_size"] = to.ranks
    if template is None:
        out |= {"mp_world_size": 1, "ds_version": version_of(to.checkpoint)}
    return out


def _kept(template: ModelStates | None, key: str, value: Value) -> Node:
    return encode(value) if template is None else kept(template.file, template.root.get(key), value)


def _module(checkpoint: Checkpoint, template: ModelStates | None, storages: dict[object, Storage]) -> Node:
    """The weights, names in the model's order; a tensor that was read keeps its node under another name."""
    if (
        template is not None
        and list(template.weights.items()) == list(checkpoint.tensors.items())
        and same(dict(template.extra_state), dict(checkpoint.extra_state))
    ):
        return template.root.get("module")
    old = fields.as_mapping(template.root.get("module")) if template is not None else None
    nodes: dict[TensorRef, Node] = {}
    made = Object("reduce", ORDERED, ())
    pairs: list[tuple[Node, Node]] = []
    if template is not None and old is not None:
        nodes = {view.ref: node for _, node in old.named() if (view := template.file.view(node)) is not None}
        if isinstance(old, Object):
            made.state = old.state
    for name, ref in checkpoint.tensors.items():
        pairs.append((name, nodes.get(ref) or encode_tensor(ref, storages)))
    pairs += [(name, encode(value, storages)) for name, value in checkpoint.extra_state.items()]
    made.pairs = pairs
    return made


def param_shapes(to: Target, old: Node) -> Node:
    """Per group, name to shape in flat order. An entry that was read and still holds stays as it was."""
    entries: dict[str, tuple[Node, tuple[int, ...]]] = {}
    for each in old if isinstance(old, list) else [old]:
        pairs = fields.as_mapping(each)
        for name, node in pairs.named() if pairs is not None else ():
            entries[name] = (node, size(node))
    out: list[Node] = []
    for group, flat in zip(to.checkpoint.groups, to.groups, strict=True):
        shapes: list[tuple[Node, Node]] = []
        for name in flat.names:
            node, shape = entries.get(name, (None, None))
            wanted = group.params[name]
            shapes.append((name, node if shape == wanted else size_node(wanted)))
        out.append(ordered(shapes))
    return out


def _fragments(checkpoint: Checkpoint, storages: dict[object, Storage]) -> Node:
    """DeepSpeed's second copy of the frozen parameters (the same storage as in module)."""
    names = [name for name in checkpoint.tensors if name in checkpoint.frozen]
    return ordered((name, encode_tensor(checkpoint.tensors[name], storages)) for name in names)


def _client(
    checkpoint: Checkpoint, template: ModelStates | None, storages: dict[object, Storage]
) -> dict[str, Node]:
    """The client's values, with losses and the like under the keys where they were found."""
    return {
        key: encode(value, storages)
        if template is None or key not in template.root
        else kept(template.file, template.root.get(key), value, storages)
        for key, value in client_values(checkpoint).items()
    }


def configured(to: Target, root: Dict | Object, batch: Mapping[str, int]) -> dict[str, Node]:
    """ds_config as the Checkpoint has it, with the batch settings of the new ranks."""
    model = to.template.model if to.template is not None else None
    old = fields.as_mapping(root.get("ds_config"))
    settings = dict(to.checkpoint.settings)
    if model is not None and same(decode(model.file, model.root.get("ds_config")) or {}, settings):
        return {"ds_config": old.replace(dict(batch))} if batch and old is not None else {}
    if not settings:
        return {}
    return {"ds_config": encode(settings | dict(batch))}
