"""One file of a universal checkpoint, decoded: the settings, or one tensor of one parameter."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ckpttools.containers import fields
from ckpttools.containers.nodes import decode
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.errors import Unsupported
from ckpttools.formats.deepspeed import stage_of
from ckpttools.location import Location
from ckpttools.tree import Value

PARAM = "param"  # the key of the tensor in a parameter's file
# what tensor and expert parallelism leave beside it, which says how the tensor is cut
PARALLEL = ("is_expert_param", "ep_num_experts", "vocab_tensor", "param_n_sub_params", "sub_param_shape")


class Settings(Struct, frozen=True, kw_only=True):
    """zero/optimizer_state.pt. `groups` are the settings of the parameter groups, `members` the sub-groups of
    each, and `steps` what is kept per sub-group, where it was made from ZeRO-3.
    """

    file: TorchFile
    root: fields.Mapping
    stage: int | None
    groups: tuple[Mapping[str, Value], ...]
    members: tuple[tuple[int, ...], ...] | None
    steps: tuple[Value, ...]


class State(Struct, frozen=True):
    """A parameter's file: the tensor in it, or, of step.pt, the value."""

    file: TorchFile
    value: Value


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
