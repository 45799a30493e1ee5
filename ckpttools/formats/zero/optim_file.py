"""Writing *_optim_states.pt: each rank's partition of master weights and optimizer state, and all
settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpttools.checkpoint import FP32
from ckpttools.containers import fields
from ckpttools.containers.edit import at
from ckpttools.containers.nodes import encode, kept, ordered, put_node
from ckpttools.containers.pickles import Dict, Global, Node, Object
from ckpttools.containers.torch_file import new_storage, tensor_node, write_torch_file
from ckpttools.formats.deepspeed import STAGE, new_scaler, version_of
from ckpttools.formats.zero.decode import Rank
from ckpttools.formats.zero.join import ZeroFolder
from ckpttools.formats.zero.model_file import configured, param_shapes
from ckpttools.formats.zero.target import Target
from ckpttools.plan import OutputFile
from ckpttools.tensors import TensorRef, cut_chunks

ADDRESS = Global("deepspeed.utils.tensor_fragment", "fragment_address")


def outputs(to: Target, batch: Mapping[str, int]) -> Iterator[OutputFile]:
    """One file for each rank. What ranks share is that of rank 0, which the reader has held against the
    others."""
    template = to.template.ranks[0] if to.template is not None else None
    root: Dict | Object = template.root if template is not None else Dict()
    common = configured(to, root, batch)
    if root.get("param_shapes") is not None:
        common["param_shapes"] = param_shapes(to, root.get("param_shapes"))
    for rank in range(to.ranks):
        if template is None:
            state: Node = Dict.of(_fresh(to, rank).items())
            yield write_torch_file(
                _name(to, rank),
                Dict.of(
                    [
                        ("optimizer_state_dict", state),
                        *common.items(),
                        ("ds_version", version_of(to.checkpoint)),
                    ]
                ),
            )
        else:
            state = template.state.replace(_changed(to, template, rank))
            yield write_torch_file(_name(to, rank), root.replace({"optimizer_state_dict": state, **common}))


def _name(to: Target, rank: int) -> str:
    """The file of a rank; the prefix says that the engine runs in bf16."""
    if to.template is not None:
        return to.template.files.optim_name(rank)
    prefix = "bf16_" if to.layout.dtype == "bf16" else ""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _changed(to: Target, template: Rank, rank: int) -> dict[str, Node]:
    """The values of a rank's file that are made anew; everything else is as it was read."""
    state = template.state
    values: dict[str, Node] = {
        "base_optimizer_state": _base_state(to, rank),
        "single_partition_of_fp32_groups": _masters(to, rank),
        "partition_count": [to.ranks] * len(to.groups),
    }
    if template.paddings is not None:
        key = "group_paddings" if "group_paddings" in state else "groups_padding"
        values[key] = _paddings(to, rank)
    if template.gaps is not None:
        values["param_alignment_paddings"] = [list(group.gaps) for group in to.groups]
    if template.mappings is not None:
        values["param_slice_mappings"] = _mappings(to, rank)
    scaler = _scaler(to, template)
    if scaler is not None:
        values["loss_scaler"] = scaler
    return values


def _fresh(to: Target, rank: int) -> dict[str, Node]:
    """All that DeepSpeed writes, in its order (stage_1_and_2.py, bf16_optimizer.py: state_dict)."""
    scaler = _scaler(to, None)
    head: dict[str, Node] = {
        "loss_scaler": scaler,
        "dynamic_loss_scale": to.checkpoint.loss_scaler.get("class") == "DynamicLossScaler",
        "overflow": False,
    }
    body: dict[str, Node] = {
        **_clip_grad(to),
        "base_optimizer_state": _base_state(to, rank),
        "single_partition_of_fp32_groups": _masters(to, rank),
    }
    stage: dict[str, Node] = {"zero_stage": Object("reduce", STAGE, (to.layout.zero_stage or 1,))}
    tail: dict[str, Node] = {
        "group_paddings": _paddings(to, rank),
        "param_alignment_paddings": [list(group.gaps) for group in to.groups],
        "partition_count": [to.ranks] * len(to.groups),
        "ds_version": version_of(to.checkpoint),
        "param_slice_mappings": _mappings(to, rank),
    }
    return {**head, **body, **stage, **tail} if to.lean else {**body, **tail}


def _clip_grad(to: Target) -> dict[str, Node]:
    """As the settings state it. Left out, the engine that loads the file keeps its own, 1.0 by default."""
    value = to.checkpoint.settings.get("gradient_clipping")
    return {"clip_grad": float(value)} if isinstance(value, int | float) else {}


def _scaler(to: Target, template: Rank | None) -> Node:
    """The loss scaler as saved; a new object where it changed, or where none was read."""
    wanted = {key: value for key, value in to.checkpoint.loss_scaler.items() if key != "class"}
    old = template.state.get("loss_scaler") if template is not None else None
    if isinstance(old, Object) and template is not None:
        state = kept(template.file, old.state, wanted) if wanted else old.state
        if state is old.state:
            return old
        made = Object(old.how, old.cls, old.args, old.kwargs)
        made.state = state
        return made
    if template is not None:
        return old
    return new_scaler(to.checkpoint.loss_scaler)


def _masters(to: Target, rank: int) -> list[Node]:
    return [_partition(to, g, rank, FP32) for g in range(len(to.groups))]


def _paddings(to: Target, rank: int) -> list[Node]:
    """BF16_Optimizer notes the whole padding at the last rank, the others each rank's own."""
    if to.lean:
        return [group.padding(rank) for group in to.groups]
    last = rank == to.ranks - 1
    return [group.total - group.used if last else 0 for group in to.groups]


def _partition(to: Target, g: int, rank: int, kind: str) -> Object:
    """A rank's part of a flat vector. fp32 is a view without the padding, over a storage with it."""
    group, ref = to.groups[g], to.flat[g][kind]
    item = ref.dtype.itemsize
    chunks = cut_chunks(ref.chunks, rank * group.part * item, group.part * item)
    shown = group.part - group.padding(rank) if kind == FP32 and to.lean else group.part
    storage = new_storage(ref.dtype, group.part, chunks)
    return tensor_node(TensorRef(ref.dtype, (shown,), ()), storage)


def _base_state(to: Target, rank: int) -> Node:
    """The torch optimizer's state_dict with this rank's partitions."""
    template = to.template.ranks[0] if to.template is not None else None
    base = fields.as_mapping(template.state.get("base_optimizer_state")) if template is not None else None
    old_groups = template.hyper if template is not None and template.hyper is not None else ()
    old_state = fields.as_mapping(base.get("state")) if base is not None else None
    states: list[tuple[Node, Node]] = []
    groups: list[Node] = []
    for g, group in enumerate(to.checkpoint.groups):
        origin = to.origin[g]
        settings = old_groups[origin] if origin is not None and origin < len(old_groups) else None
        index = _index(settings, g) if to.origin == tuple(range(len(to.origin))) else g
        own = old_state.get(_index(settings, g)) if settings is not None and old_state is not None else None
        if own is not None or to.flat[g].keys() - {FP32} or to.shared[g]:
            states.append((index, _own_state(to, g, rank, own)))
        wanted = {**group.hyper, "params": [index]}
        if template is None or settings is None:
            groups.append(encode(wanted))
        else:
            groups.append(kept(template.file, settings, wanted))
    if base is None:
        return Dict.of([("state", Dict.of(states)), ("param_groups", groups)])
    return base.replace({"state": Dict.of(states), "param_groups": groups})


def _index(settings: Dict | Object | None, g: int) -> int:
    """The number of a group's flat parameter."""
    params = settings.get("params") if settings is not None else None
    index = fields.integer(params[0]) if isinstance(params, list) and params else None
    return g if index is None else index


def _own_state(to: Target, g: int, rank: int, old: Node) -> Node:
    """A flat parameter's state: the group's kinds at their paths, partitions of this rank for what is cut."""
    group = to.checkpoint.groups[g]
    template = to.template.ranks[0] if to.template is not None else None
    wanted = [*(kind for kind in to.flat[g] if kind != FP32), *to.shared[g]]
    node: Node = old if old is not None else Dict()
    if old is None:
        # torch's optimizers count first
        wanted.sort(key=lambda kind: kind != "step")
    for kind in wanted:
        path = group.paths.get(kind, (kind,))
        if kind in to.flat[g]:
            node = put_node(node, path, _partition(to, g, rank, kind))
        elif template is not None:
            node = put_node(node, path, kept(template.file, at(node, *path), to.shared[g][kind]))
        else:
            node = put_node(node, path, encode(to.shared[g][kind]))
    return node


def _mappings(to: Target, rank: int) -> list[Node]:
    return [_mapping(to, g, rank) for g in range(len(to.groups))]


def _mapping(to: Target, g: int, rank: int) -> Object:
    template = _address(to.template) if to.template is not None else Object("newobj", ADDRESS, ())
    pairs: list[tuple[Node, Node]] = []
    for name, (numel, start) in to.groups[g].mapping(rank, to.slices[g]).items():
        address = Object(template.how, template.cls, template.args)
        address.state = Dict.of([("numel", numel), ("start", start)])
        pairs.append((name, address))
    return ordered(pairs)


def _address(source: ZeroFolder) -> Object:
    """A fragment address as this DeepSpeed pickles it: its module has moved over the versions."""
    for rank in source.ranks:
        for group in fields.sequence(rank.file.path, rank.state.get("param_slice_mappings"), "mappings"):
            pairs = fields.as_mapping(group)
            for _, node in pairs.named() if pairs is not None else ():
                if isinstance(node, Object):
                    return node
    return Object("newobj", ADDRESS, ())
