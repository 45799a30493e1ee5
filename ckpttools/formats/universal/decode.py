"""One file of a universal checkpoint, decoded: a model file, the settings, or one tensor of one parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckpttools.containers import fields
from ckpttools.containers.nodes import decode
from ckpttools.containers.pickles import Node
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.errors import Unsupported
from ckpttools.formats.deepspeed import names_of, shapes_of, stage_of
from ckpttools.location import Location
from ckpttools.tensors import TensorRef
from ckpttools.tree import Value

PARAM = "param"  # the key of the tensor in a parameter's file
# what tensor and expert parallelism leave beside it, which says how the tensor is cut
PARALLEL = ("is_expert_param", "ep_num_experts", "vocab_tensor", "param_n_sub_params", "sub_param_shape")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model file, of ZeRO-1 and 2 or of a rank of ZeRO-3, where `module` holds parameters without elements
    and `fragments` this rank's parts of frozen ones. `shapes` is per group, there per sub-group.
    """

    file: TorchFile
    root: fields.Mapping
    module: Mapping[str, TensorRef]
    extra_state: Mapping[str, Value]
    buffers: frozenset[str]
    shapes: tuple[Shapes, ...]
    frozen: Shapes
    fragments: Mapping[str, TensorRef]
    shared: Mapping[str, str]
    dp_world_size: int
    ds_version: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """zero/optimizer_state.pt. `groups` are the settings of the parameter groups, `members` the sub-groups of
    each, and `steps` what is kept per sub-group, where it was made from ZeRO-3.
    """

    file: TorchFile
    root: fields.Mapping
    stage: int | None
    groups: tuple[Mapping[str, Value], ...]
    members: tuple[tuple[int, ...], ...] | None
    steps: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class State:
    """A parameter's file: the tensor in it, or, of step.pt, the value."""

    file: TorchFile
    value: Value


def read_model(path: Location) -> Model:
    """Decode a model file."""
    file = read_torch_file(path)
    root = fields.mapping(path, file.value, "the file's value")
    module: dict[str, TensorRef] = {}
    extra: dict[str, Value] = {}
    held = root.get("module")
    for name, node in fields.mapping(path, held, "module").named() if held is not None else ():
        if view := file.view(node):
            module[name] = view.ref
        else:
            extra[name] = decode(file, node)
    shapes = fields.sequence(path, root.get("param_shapes"), "param_shapes")
    frozen, fragments = root.get("frozen_param_shapes"), root.get("frozen_param_fragments")
    shared = fields.as_mapping(root.get("shared_params"))
    ranks, version = fields.integer(root.get("dp_world_size")), root.get("ds_version")
    return Model(
        file=file,
        root=root,
        module=module,
        extra_state=extra,
        buffers=names_of(root.get("buffer_names")),
        shapes=tuple(shapes_of(path, node, f"param_shapes[{g}]") for g, node in enumerate(shapes)),
        frozen=shapes_of(path, frozen, "frozen_param_shapes") if frozen is not None else {},
        fragments=_tensors(file, fragments, "frozen_param_fragments"),
        shared={a: o for a, o in shared.named() if isinstance(o, str)} if shared is not None else {},
        dp_world_size=ranks if ranks is not None and ranks > 0 else 1,
        ds_version=version if isinstance(version, str) else None,
    )


def _tensors(file: TorchFile, node: Node, field: str) -> dict[str, TensorRef]:
    if node is None:
        return {}
    pairs = fields.mapping(file.path, node, field)
    views = {name: file.view(inner) for name, inner in pairs.named()}
    return {name: view.ref for name, view in views.items() if view is not None}


def read_settings(path: Location) -> Settings:
    """Decode zero/optimizer_state.pt."""
    file = read_torch_file(path)
    root = fields.mapping(path, file.value, "the file's value")
    groups: list[Mapping[str, Value]] = []
    members: list[tuple[int, ...]] = []
    stage = stage_of(root.get("zero_stage"))
    for g, node in enumerate(fields.sequence(path, root.get("param_groups"), "param_groups")):
        pairs = fields.mapping(path, node, f"param_groups[{g}]")
        groups.append({key: decode(file, inner) for key, inner in pairs.named() if key != "params"})
        ids = pairs.get("params")
        members.append(tuple(i for i in ids if type(i) is int) if isinstance(ids, list) else ())
    # rank 0's own parts of the masters are there only where it is ZeRO-3's whole shard
    sub_groups = root.get("fp32_flat_groups")
    kept = fields.as_mapping(root.get("optimizer_state_dict"))
    state = fields.as_mapping(kept.get("state")) if kept is not None else None
    steps: list[Value] = []
    if isinstance(sub_groups, list):
        for s in range(len(sub_groups)):
            found = fields.as_mapping(state.get(s)) if state is not None else None
            steps.append(decode(file, found.get("step")) if found is not None else None)
    return Settings(
        file=file,
        root=root,
        stage=stage,
        groups=tuple(groups),
        members=tuple(members) if isinstance(sub_groups, list) else None,
        steps=tuple(steps),
    )


def read_state(path: Location, kind: str) -> State:
    """Decode a parameter's file: a dict with the tensor, or the tensor itself; of `step` any value."""
    file = read_torch_file(path)
    if kind == "step":
        return State(file, decode(file, file.value))
    pairs = fields.as_mapping(file.value) if file.view(file.value) is None else None
    if pairs is not None:
        cut = next((key for key in PARALLEL if pairs.get(key)), None)
        if cut is not None:
            raise Unsupported(
                "layout-unsupported",
                f"a universal checkpoint of tensor or expert parallelism ({cut}), which is not read yet",
                where=path,
                why="how the parameter was cut depends on the ranks that load it",
                hint="load it in DeepSpeed with the same parallelism",
                layout="tensor-parallel",
            )
    view = file.view(pairs.get(PARAM) if pairs is not None else file.value)
    if view is None:
        raise fields.bad_field(path, PARAM, "is not a tensor")
    if not view.dtype.is_float:
        raise fields.bad_field(path, PARAM, f"is {view.dtype}")
    return State(file, view.ref)
