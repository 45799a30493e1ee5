"""DeepSpeed's mp_rank_00_model_states.pt, decoded, whatever the stage that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckpttools.containers import fields
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.errors import Unsupported
from ckpttools.formats.deepspeed import module_of, names_of, shapes_of
from ckpttools.location import Location
from ckpttools.tensors import TensorRef
from ckpttools.tree import Value


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStates:
    """mp_rank_00_model_states.pt, decoded. `shapes` is per group, in flat order."""

    file: TorchFile
    root: fields.Mapping
    weights: Mapping[str, TensorRef]
    buffers: frozenset[str]
    frozen: frozenset[str]
    frozen_shapes: Mapping[str, tuple[int, ...]]  # as stated: also of those that the file leaves out
    shared: Mapping[str, str]
    extra_state: Mapping[str, Value]  # what module holds beside tensors
    shapes: tuple[Mapping[str, tuple[int, ...]], ...] | None  # None: in the optimizer files (<= 0.5.10)
    dp_world_size: int | None
    ds_version: str | None


def read_model(path: Location) -> ModelStates:
    """Decode the model file."""
    file = read_torch_file(path)
    root = fields.mapping(path, file.value, "the file's value")
    module = root.get("module")
    if module is None and "module" in root:
        raise Unsupported(
            "layout-unsupported",
            "module is empty: a pipeline-parallel checkpoint, which is recognised but not read yet",
            where=path,
            layout="pipeline",
        )
    weights, extra = module_of(file, root)
    shapes = None
    if root.get("param_shapes") is not None:
        groups = fields.sequence(path, root.get("param_shapes"), "param_shapes")
        shapes = tuple(shapes_of(path, node, f"param_shapes[{g}]") for g, node in enumerate(groups))
    frozen = root.get("frozen_param_shapes")
    trainable = {name for group in shapes or () for name in group}
    shared = _shared(root, weights, trainable)
    buffers = names_of(root.get("buffer_names"))
    frozen_shapes: Mapping[str, tuple[int, ...]] = {}
    if frozen is not None:
        frozen_shapes = shapes_of(path, frozen, "frozen_param_shapes")
        frozen_names = frozenset(frozen_shapes)
    elif shapes is not None:
        # stage 1 records no frozen parameters: whatever module holds beside the rest is frozen
        frozen_names = frozenset(weights) - trainable - buffers - frozenset(shared)
    else:
        frozen_names = frozenset()
    version = root.get("ds_version")
    return ModelStates(
        file=file,
        root=root,
        weights=weights,
        buffers=buffers,
        frozen=frozen_names,
        frozen_shapes=frozen_shapes,
        extra_state=extra,
        shared=shared,
        shapes=shapes,
        dp_world_size=fields.integer(root.get("dp_world_size")),
        ds_version=version if isinstance(version, str) else None,
    )


def frozen_fragments(model: ModelStates) -> dict[str, TensorRef]:
    """DeepSpeed's second copy of the frozen parameters, by name; {} where there is none."""
    pairs = fields.as_mapping(model.root.get("frozen_param_fragments"))
    views = ((name, model.file.view(node)) for name, node in (pairs.named() if pairs is not None else ()))
    return {name: view.ref for name, view in views if view is not None}


def _shared(root: fields.Mapping, weights: Mapping[str, TensorRef], trainable: set[str]) -> dict[str, str]:
    """Alias -> owner, where the file has the owner. Before DeepSpeed 0.9.2 only a shared storage says so."""
    stated = root.get("shared_params")
    if stated is not None:
        pairs = fields.as_mapping(stated)
        found = {a: o for a, o in pairs.named() if isinstance(o, str)} if pairs is not None else {}
        # exclude_frozen_parameters leaves out the owner alone: its alias is then a weight like any other
        found = {a: o for a, o in found.items() if o in weights or o in trainable}
        # parameters without elements have no address: DeepSpeed takes them all for one
        return {a: o for a, o in found.items() if a not in weights or weights[a].numel or a not in trainable}
    owner: dict[object, str] = {}
    found = {}
    for name in [*(n for n in weights if n in trainable), *(n for n in weights if n not in trainable)]:
        ref = weights[name]
        if ref.numel:
            first = owner.setdefault((ref.chunks, ref.shape, ref.dtype.name), name)
            if first != name and name not in trainable:
                found[name] = first
    return found
