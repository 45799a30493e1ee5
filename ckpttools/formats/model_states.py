"""DeepSpeed's *_model_states.pt, decoded, whatever the stage that wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, Layout
from ckpttools.containers import fields
from ckpttools.containers.pickles import Node
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.errors import Unsupported
from ckpttools.formats.deepspeed import (
    client,
    counters,
    excludes_frozen,
    module_of,
    names_of,
    optimizer_class,
    settings_of,
    shapes_of,
)
from ckpttools.formats.rank_files import experts
from ckpttools.location import Location
from ckpttools.tensors import TensorRef, cat
from ckpttools.tree import Value

Shapes = Mapping[str, tuple[int, ...]]


class ModelStates(Struct, frozen=True, kw_only=True):
    """A model file, decoded: of the whole, or of a rank of stage 3, where `weights` holds parameters as
    tensors without elements, whole buffers, and `fragments` the rank's parts of what is frozen.
    """

    dp_rank: int = 0
    file: TorchFile
    root: fields.Mapping
    weights: Mapping[str, TensorRef]
    extra_state: Mapping[str, Value]  # what module holds beside tensors
    buffers: frozenset[str]
    shapes: tuple[Shapes, ...]  # per group, of stage 3 per sub-group, in flat order
    frozen: frozenset[str]
    frozen_shapes: Shapes  # as stated: also of those that the file leaves out
    fragments: Mapping[str, TensorRef]  # of the frozen ones: a second copy, or a rank's part
    shared: Mapping[str, str]
    dp_world_size: int | None
    ds_version: str | None


def read_stated(path: Location, dp_rank: int = 0) -> ModelStates:
    """Decode the model file of a rank of stage 3, or of a universal checkpoint: as it says."""
    model = _read(path, dp_rank)
    fields.sequence(path, model.root.get("param_shapes"), "param_shapes")
    return model


def read_model(path: Location) -> ModelStates:
    """Decode a model file of any age, which may leave things to be concluded; before 0.5.11 `shapes` is ():
    they are in the optimizer files.
    """
    model = _read(path, 0)
    refuse_experts(path, model.root)
    trainable = {name for group in model.shapes for name in group}
    shared = _shared(model, trainable)
    frozen, root = model.frozen, model.root
    if root.get("frozen_param_shapes") is None and root.get("param_shapes") is not None:
        # stage 1 records no frozen parameters: whatever module holds beside the rest is frozen
        frozen = frozenset(model.weights) - trainable - model.buffers - frozenset(shared)
    return replace(model, shared=shared, frozen=frozen)


def refuse_experts(path: Location, root: fields.Mapping) -> None:
    """Raise Unsupported for the model file of a folder with experts, which lie in files of their own: where
    all of those are lost, the rest is not to be taken for a smaller model. Its layers show it: `num_experts`,
    which DeepSpeed writes beside them, may be a client's own, too.
    """
    module = fields.as_mapping(root.get("module"))
    gates = module is not None and any(".deepspeed_moe." in f".{name}" for name in module.names())
    if gates or root.get("ds_autoep_layers"):
        raise experts(path, "the model file names layers with experts")


def _read(path: Location, dp_rank: int) -> ModelStates:
    file = read_torch_file(path)
    root = fields.mapping(path, file.value, "the file's value")
    module = root.get("module")
    if module is None and "module" in root:
        raise Unsupported(
            "layout-unsupported",
            "module is empty: a pipeline-parallel checkpoint, which is recognised but not read yet",
            where=path,
            layout="pipeline",
            why="the weights lie in a file for each layer",
            hint="ckpt verify checks its files one by one, and ckpt extract takes the weights of one file",
        )
    weights, extra = module_of(file, root)
    stated, frozen = root.get("param_shapes"), root.get("frozen_param_shapes")
    groups = fields.sequence(path, stated, "param_shapes") if stated is not None else []
    frozen_shapes = shapes_of(path, frozen, "frozen_param_shapes") if frozen is not None else {}
    version = root.get("ds_version")
    return ModelStates(
        dp_rank=dp_rank,
        file=file,
        root=root,
        weights=weights,
        extra_state=extra,
        buffers=names_of(root.get("buffer_names")),
        shapes=tuple(shapes_of(path, node, f"param_shapes[{g}]") for g, node in enumerate(groups)),
        frozen=frozenset(frozen_shapes),
        frozen_shapes=frozen_shapes,
        fragments={
            name: view.ref
            for name, node in _named(root, "frozen_param_fragments")
            if (view := file.view(node))
        },
        shared={a: o for a, o in _named(root, "shared_params") if isinstance(o, str)},
        dp_world_size=fields.ranks(path, root.get("dp_world_size"), "dp_world_size"),
        ds_version=version if isinstance(version, str) else None,
    )


def described(model: ModelStates, tensors: Mapping[str, TensorRef], layout: Layout, stage: int) -> Checkpoint:
    """What a model file says of the whole folder, whose weights are `tensors`, and nothing of the optimizer's
    state.
    """
    settings = settings_of(model.file, model.root)
    return Checkpoint(
        path=model.file.path.parent,
        layout=layout,
        tensors=tensors,
        training=counters(model.file, model.root),
        shared={alias: owner for alias, owner in model.shared.items() if owner in tensors},
        frozen=model.frozen & tensors.keys(),
        left_out={name: shape for name, shape in model.frozen_shapes.items() if name not in tensors},
        excludes_frozen=excludes_frozen(model.root, tensors, stage),
        extra_state=model.extra_state,
        buffers=model.buffers - model.frozen,
        roles_guessed=not model.buffers.isdisjoint(model.frozen & tensors.keys()),  # ours: formats.buffers
        optimizer=optimizer_class(settings),
        client=client(model.file, model.root),
        settings=settings,
    )


def _named(root: fields.Mapping, key: str) -> Iterable[tuple[str, Node]]:
    pairs = fields.as_mapping(root.get(key))
    return pairs.named() if pairs is not None else ()


def frozen_weights(models: Sequence[ModelStates]) -> dict[str, TensorRef]:
    """The frozen parameters of stage 3, put together from the parts of all ranks, in their order; the last
    ones are padded. Raises CkptError where a part has another size than the shape makes it, or ranks state
    other shapes.
    """
    out: dict[str, TensorRef] = {}
    stated = models[0].frozen_shapes
    for model in models:
        mine = model.frozen_shapes
        for name in [name for name in {**stated, **mine} if mine.get(name) != stated.get(name)]:
            problem = "is missing" if name not in mine else f"is {list(mine[name])}"
            raise fields.bad_field(
                model.file.path, f"frozen_param_shapes.{name}", f"{problem}, unlike rank 0's"
            )
    for name, shape in stated.items():
        numel = math.prod(shape)
        wanted = -(-numel // len(models))
        parts: list[TensorRef] = []
        for model in models:
            part, field = model.fragments.get(name), f"frozen_param_fragments.{name}"
            if part is None or part.shape != (wanted,):
                problem = "is missing" if part is None else f"is {list(part.shape)}, not {wanted} elements"
                raise fields.bad_field(model.file.path, field, problem)
            if parts and part.dtype is not parts[0].dtype:
                raise fields.bad_field(model.file.path, field, f"is {part.dtype}, unlike rank 0's")
            parts.append(part)
        out[name] = cat(parts, parts[0].dtype).flat(0, numel).view(shape)
    return out


def _shared(model: ModelStates, trainable: set[str]) -> dict[str, str]:
    """Alias -> owner, where the file has the owner. Before DeepSpeed 0.9.2 only a shared storage says so."""
    weights = model.weights
    if model.root.get("shared_params") is not None:
        # exclude_frozen_parameters leaves out the owner alone: its alias is then a weight like any other
        found = {a: o for a, o in model.shared.items() if o in weights or o in trainable}
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
