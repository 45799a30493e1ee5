"""A rank's optimizer file of a ZeRO-3 folder, decoded."""

from __future__ import annotations

from msgspec import Struct

from ckpttools.containers import fields
from ckpttools.containers.pickles import Node
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.errors import Unsupported
from ckpttools.formats.deepspeed import stage_of
from ckpttools.formats.rank_local import State, state_of
from ckpttools.location import Location
from ckpttools.tensors import TensorRef


class Shard(Struct, frozen=True, kw_only=True):
    """A rank's optimizer file. `fp32` and `states` are per sub-group, `groups` and `members` per parameter
    group.
    """

    dp_rank: int
    file: TorchFile
    root: fields.Mapping
    state: fields.Mapping  # optimizer_state_dict
    fp32: tuple[TensorRef, ...]
    states: tuple[State, ...]  # by kind: the keys joined by dots
    groups: tuple[fields.Mapping, ...]  # param_groups
    members: tuple[tuple[int, ...], ...]  # the sub-groups of each
    partition_count: int | None
    ds_version: str | None


def _vector(file: TorchFile, node: Node, field: str) -> TensorRef:
    view = file.view(node)
    if view is None or len(view.shape) != 1:
        raise fields.bad_field(file.path, field, "is not a flat tensor")
    return view.ref


def read_shard(path: Location, dp_rank: int) -> Shard:
    """Decode a rank's optimizer file."""
    file = read_torch_file(path)
    root = fields.mapping(path, file.value, "the file's value")
    at = "optimizer_state_dict"
    state = fields.mapping(path, root.get(at), at)
    stage = stage_of(state.get("zero_stage"))
    if stage not in (None, 3):
        raise fields.bad_field(path, f"{at}.zero_stage", f"is {stage} in a folder of ZeRO-3")
    if state.get("ds_zero_partition_groups") is not None:
        raise Unsupported(
            "layout-unsupported",
            "a ZeRO-3 checkpoint with expert parallelism (AutoEP), which is recognised but not read yet",
            where=path,
            why="its expert parameters are cut over other ranks than the rest",
            layout="zero3",
            hint="ckpt verify checks its files one by one",
        )
    flat = fields.sequence(path, state.get("fp32_flat_groups"), f"{at}.fp32_flat_groups")
    fp32 = tuple(_vector(file, node, f"{at}.fp32_flat_groups[{s}]") for s, node in enumerate(flat))
    for s, ref in enumerate(fp32):
        if not ref.dtype.is_float:
            raise fields.bad_field(path, f"{at}.fp32_flat_groups[{s}]", f"is {ref.dtype}")
    inner = fields.mapping(path, state.get(at), f"{at}.{at}")
    groups = tuple(
        fields.mapping(path, node, f"{at}.{at}.param_groups[{g}]")
        for g, node in enumerate(fields.sequence(path, inner.get("param_groups"), f"{at}.param_groups"))
    )
    kept = fields.mapping(path, inner.get("state"), f"{at}.{at}.state")
    version = root.get("ds_version")
    return Shard(
        dp_rank=dp_rank,
        file=file,
        root=root,
        state=state,
        fp32=fp32,
        states=tuple(_state(file, kept.get(s), f"{at}.{at}.state[{s}]") for s in range(len(fp32))),
        groups=groups,
        members=tuple(_members(path, group, g) for g, group in enumerate(groups)),
        partition_count=fields.ranks(path, state.get("partition_count"), "partition_count"),
        ds_version=version if isinstance(version, str) else None,
    )


def _state(file: TorchFile, node: Node, field: str) -> State:
    """What the optimizer keeps for a sub-group; nothing before its first step."""
    if node is None:
        return {}
    return state_of(file, fields.mapping(file.path, node, field).named())


def _members(path: Location, group: fields.Mapping, g: int) -> tuple[int, ...]:
    field = f"optimizer_state_dict.optimizer_state_dict.param_groups[{g}].params"
    params = fields.sequence(path, group.get("params"), field)
    return tuple(fields.count(path, item, field) for item in params)
