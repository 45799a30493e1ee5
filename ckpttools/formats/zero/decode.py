"""A rank's optimizer file of a ZeRO-1/2 folder, decoded.

Three optimizer layouts exist (deepspeed.md of each release differs in detail, not in these):

    rigid           fp32 partitions without padding, moments with it; `base_optimizer_state` is the torch
                    optimizer's state_dict
    bf16_optimizer  both with padding; no zero_stage, loss_scaler, overflow (class BF16_Optimizer)
    elastic         both without padding; `base_optimizer_state` is a list per group, no param_groups
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct

from ckpttools.containers import fields
from ckpttools.containers.pickles import Dict, Node, Object
from ckpttools.containers.torch_file import TorchFile, View, read_torch_file
from ckpttools.errors import Unsupported
from ckpttools.formats.deepspeed import stage_of
from ckpttools.location import Location

MOST = 1 << 62  # elements of a partition
Addresses = dict[str, tuple[int, int]]  # name -> (numel, start) within a rank's partition


class Rank(Struct, frozen=True, kw_only=True):
    """One optimizer file, decoded. Lists are per parameter group."""

    dp_rank: int
    file: TorchFile
    root: fields.Mapping
    state: fields.Mapping  # optimizer_state_dict
    fp32: tuple[View, ...]
    moments: tuple[Mapping[str, Node], ...]
    hyper: tuple[fields.Mapping, ...] | None  # param_groups; None where the layout has none
    variant: str
    stage: int | None
    partition_count: tuple[int, ...] | None
    paddings: tuple[int, ...] | None
    gaps: tuple[tuple[int, ...], ...] | None
    mappings: tuple[Addresses, ...] | None
    ds_version: str | None


def read_rank(path: Location, dp_rank: int) -> Rank:
    """Decode one rank's optimizer file."""
    file = read_torch_file(path)
    root = fields.mapping(path, file.value, "the file's value")
    state = fields.mapping(path, root.get("optimizer_state_dict"), "optimizer_state_dict")
    at = "optimizer_state_dict."
    _refuse_old(path, state)
    fp32 = tuple(
        _vector(file, node, f"{at}single_partition_of_fp32_groups[{g}]")
        for g, node in enumerate(
            fields.sequence(
                path, state.get("single_partition_of_fp32_groups"), f"{at}single_partition_of_fp32_groups"
            )
        )
    )
    base = state.get("base_optimizer_state")
    hyper: tuple[fields.Mapping, ...] | None = None
    moments: tuple[Mapping[str, Node], ...]
    if isinstance(base, list):
        variant = "elastic"
        moments = tuple(
            dict(fields.mapping(path, node, f"{at}base_optimizer_state[{g}]").named())
            for g, node in enumerate(base)
        )
    else:
        variant = "bf16_optimizer" if "zero_stage" not in state and "loss_scaler" not in state else "rigid"
        pairs = fields.mapping(path, base, f"{at}base_optimizer_state")
        hyper, moments = _torch_state(path, pairs, f"{at}base_optimizer_state.")
    if len(moments) != len(fp32):
        raise fields.bad_field(
            path, f"{at}base_optimizer_state", f"has {len(moments)} groups where fp32 has {len(fp32)}"
        )
    version = root.get("ds_version") or state.get("ds_version")
    return Rank(
        dp_rank=dp_rank,
        file=file,
        root=root,
        state=state,
        fp32=fp32,
        moments=moments,
        hyper=hyper,
        variant=variant,
        stage=stage_of(state.get("zero_stage")),
        partition_count=_counts(state.get("partition_count"), len(fp32)),
        paddings=_counts(state.get("group_paddings", state.get("groups_padding")), len(fp32)),
        gaps=_gaps(path, state.get("param_alignment_paddings")),
        mappings=_mappings(path, state.get("param_slice_mappings")),
        ds_version=version if isinstance(version, str) else None,
    )


def _refuse_old(path: Location, state: fields.Mapping) -> None:
    if "fp32_flat_groups" in state:
        raise Unsupported(
            "layout-unsupported",
            "a ZeRO-3 optimizer file in a folder of ZeRO-1 or 2",
            where=path,
            layout="zero3",
            why="the files are of different runs, or of a run whose stage was changed",
            hint="move the files of the other run out of the folder",
        )
    if "local_sub_partitions_of_fp32_groups" in state:
        raise Unsupported(
            "layout-unsupported",
            "a file of the first ZeRO-1 (DeepSpeed 0.3), whose partitions are interleaved",
            where=path,
            why="current DeepSpeed refuses it too",
            hint="load and save it with DeepSpeed 0.3 to 0.5 with ZeRO stage 2",
        )


def _vector(file: TorchFile, node: Node, field: str) -> View:
    view = file.view(node)
    if view is None or len(view.shape) != 1:
        raise fields.bad_field(file.path, field, "is not a flat tensor")
    return view


def _torch_state(
    path: Location, base: fields.Mapping, at: str
) -> tuple[tuple[fields.Mapping, ...], tuple[Mapping[str, Node], ...]]:
    """param_groups and, per group, the state of its one flat parameter."""
    groups = tuple(
        fields.mapping(path, node, f"{at}param_groups[{g}]")
        for g, node in enumerate(fields.sequence(path, base.get("param_groups"), f"{at}param_groups"))
    )
    state = fields.mapping(path, base.get("state"), f"{at}state")
    moments: list[Mapping[str, Node]] = []
    for g, group in enumerate(groups):
        params = group.get("params")
        if not isinstance(params, list) or len(params) != 1 or fields.integer(params[0]) is None:
            raise fields.bad_field(path, f"{at}param_groups[{g}].params", "does not name one flat parameter")
        index = fields.integer(params[0])
        assert index is not None
        own = state.get(index)  # absent before the first step
        moments.append(
            dict(fields.mapping(path, own, f"{at}state[{index}]").named()) if own is not None else {}
        )
    return groups, tuple(moments)


def _counts(node: Node, groups: int) -> tuple[int, ...] | None:
    """A list of ints per group; DeepSpeed 0.2 to 0.4 saved one int for all."""
    if isinstance(node, list) and all(fields.integer(x) is not None for x in node):
        return tuple(x for x in node if isinstance(x, int))
    single = fields.integer(node)
    return (single,) * groups if single is not None else None


def _gaps(path: Location, node: Node) -> tuple[tuple[int, ...], ...] | None:
    if node is None:
        return None
    field = "optimizer_state_dict.param_alignment_paddings"
    groups = fields.sequence(path, node, field)
    return tuple(fields.counts(path, group, f"{field}[{g}]") for g, group in enumerate(groups))


def _mappings(path: Location, node: Node) -> tuple[Addresses, ...] | None:
    if node is None:
        return None
    field = "optimizer_state_dict.param_slice_mappings"
    out: list[Addresses] = []
    for g, group in enumerate(fields.sequence(path, node, field)):
        found: Addresses = {}
        for name, value in fields.mapping(path, group, f"{field}[{g}]").named():
            found[name] = _plain(value) or _address(path, value, f"{field}[{g}].{name}")
        out.append(found)
    return tuple(out)


def _plain(node: Node) -> tuple[int, int] | None:
    """An address as it usually is: a file has one for each parameter. None for any other."""
    state = node.state if isinstance(node, Object) else None
    if not isinstance(state, Dict):
        return None
    numel, start = state.get("numel"), state.get("start")
    if type(numel) is int and type(start) is int and 0 <= numel <= MOST and 0 <= start <= MOST:
        return numel, start
    return None


def _address(path: Location, node: Node, field: str) -> tuple[int, int]:
    """deepspeed.utils.tensor_fragment.fragment_address: a dataclass with numel and start."""
    state = fields.as_mapping(node.state) if isinstance(node, Object) and node.has_state else None
    if state is None:
        raise fields.bad_field(path, field, "is not a fragment address")
    return (
        fields.count(path, state.get("numel"), f"{field}.numel", MOST),
        fields.count(path, state.get("start"), f"{field}.start", MOST),
    )


def version_numbers(text: str | None) -> tuple[int, ...]:
    """A version's first three numbers; () where it is not recorded."""
    return tuple(int(x) for x in re.findall(r"\d+", text or "")[:3])
