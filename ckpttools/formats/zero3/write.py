"""Writing a ZeRO-3 tag folder for any number of ranks, from the Checkpoint alone.

DeepSpeed reads on load: `module` (strictly: parameters as tensors without elements), frozen_param_fragments,
dp_world_size, counters, lr_scheduler, and of the optimizer file its state, masters and loss scaler. Its
converters need the rest. Sub-groups are cut for the new ranks, with the sub_group_size of the settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from ckpttools.checkpoint import FP32, Checkpoint, Layout, ParamGroup
from ckpttools.containers.nodes import encode, ordered, put_node
from ckpttools.containers.pickles import Dict, Node, Object
from ckpttools.containers.torch_file import new_storage, tensor_node, write_torch_file
from ckpttools.errors import Unsupported, escape
from ckpttools.formats.buffers import NORMS
from ckpttools.formats.cutting import equal, no_groups, not_flat
from ckpttools.formats.deepspeed import (
    STAGE,
    frozen_shapes,
    kept_batch,
    new_root,
    new_scaler,
    shapes_node,
    sub_group_size,
    version_of,
)
from ckpttools.formats.notes import unsaid
from ckpttools.formats.rank_files import optim_name
from ckpttools.formats.zero3.cuts import held, part_of, sub_groups
from ckpttools.formats.zero3.names import model_name
from ckpttools.plan import OutputFile, Plan
from ckpttools.tensors import DTYPES, FLOAT32, Chunk, DType, TensorRef, Zeros, join_chunks
from ckpttools.tree import Value


class Target(Struct, frozen=True, kw_only=True):
    """What the files are made from: `cuts` are the sub-groups' names, per parameter group."""

    checkpoint: Checkpoint
    ranks: int
    dtype: DType
    cuts: tuple[tuple[tuple[str, ...], ...], ...]
    buffers: frozenset[str]
    settings: Mapping[str, Value]


def plan(checkpoint: Checkpoint, layout: Layout) -> Plan:
    """The files of a tag folder for `layout.dp_degree` ranks.

    Raises Unsupported for state that is not of its parameter's shape, or differs within a sub-group.
    """
    to, notes = _target(checkpoint, layout)
    prefix = "bf16_" if to.dtype is DTYPES["bfloat16"] else ""
    files: list[OutputFile] = []
    for rank in range(to.ranks):
        files.append(write_torch_file(model_name(rank), _model(to, rank)))
        files.append(write_torch_file(optim_name(rank, prefix), _optim(to, rank)))
    return Plan(files=tuple(files), notes=(*_notes(to), *notes), checks=checkpoint.checks)


def _target(checkpoint: Checkpoint, layout: Layout) -> tuple[Target, tuple[str, ...]]:
    """What to write, with notes about the batch."""
    if not checkpoint.groups:
        raise no_groups(checkpoint)
    batch, notes = kept_batch(checkpoint, layout)
    settings = {**checkpoint.settings, **batch}
    section = settings.get("zero_optimization")
    if settings:
        settings["zero_optimization"] = {**(section if isinstance(section, Mapping) else {}), "stage": 3}
    limit = sub_group_size(settings)
    short = {d.short: d for d in DTYPES.values()}
    trained = (name for group in checkpoint.groups for name in group.params)
    found = next((checkpoint.tensors[n].dtype for n in trained if n in checkpoint.tensors), FLOAT32)
    cuts = []
    for group in checkpoint.groups:
        numels = {n: math.prod(shape) for n, shape in group.params.items()}
        cuts.append(tuple(tuple(names) for names in sub_groups(numels, layout.dp_degree, limit)))
    to = Target(
        checkpoint=checkpoint,
        ranks=layout.dp_degree,
        dtype=short.get(layout.dtype or "", found),
        cuts=tuple(cuts),
        buffers=_buffers(checkpoint),
        settings=settings,
    )
    return to, notes


def _buffers(checkpoint: Checkpoint) -> frozenset[str]:
    """Buffers are whole in module, parameters are not: each tensor must be known for the one or the other."""
    trained = {name for group in checkpoint.groups for name in group.params}
    known = trained | checkpoint.buffers | checkpoint.shared.keys()
    if not checkpoint.roles_guessed:
        known |= checkpoint.frozen
    guessed = set()
    for name, ref in checkpoint.tensors.items():
        if name in known:
            continue
        if ref.dtype.is_float and not name.endswith(NORMS):
            raise Unsupported(
                "tensor-unknown",
                f"{escape(name)} is in no parameter group: a frozen parameter or a buffer?",
                where=checkpoint.path,
                why="ZeRO-3 cuts parameters and keeps buffers whole, and DeepSpeed loads them strictly",
                hint="--like CHECKPOINT takes it from a DeepSpeed checkpoint of the same model; zero0, zero1 "
                "and zero2 load it as either",
            )
        guessed.add(name)
    return checkpoint.buffers | guessed


def _notes(to: Target) -> Iterator[str]:
    yield from unsaid(to.checkpoint)
    count = sum(map(len, to.cuts))
    if count > len(to.cuts):
        limit = sub_group_size(to.settings)
        ranks = f"{to.ranks} rank{'s' * (to.ranks > 1)}"
        yield f"{count} sub-groups, as a sub_group_size of {limit} makes them on {ranks}"
    if to.checkpoint.layout.zero_stage == 3 and to.checkpoint.layout.dp_degree > 1:
        yield "buffers and the client's values are those of rank 0, on every rank"


def _model(to: Target, rank: int) -> Dict:
    checkpoint = to.checkpoint
    frozen = [name for name in checkpoint.tensors if name in checkpoint.frozen]
    shapes, cuts = frozen_shapes(checkpoint), zip(checkpoint.groups, to.cuts, strict=True)
    parts = ordered((n, _part([checkpoint.tensors[n]], to.ranks, rank)) for n in frozen)
    none = checkpoint.left_out or checkpoint.excludes_frozen
    return new_root(
        checkpoint,
        dict(_module(to)),
        ranks=to.ranks,
        settings=to.settings,
        buffer_names=[name for name in checkpoint.tensors if name in to.buffers],
        param_shapes=[
            shapes_node({name: group.params[name] for name in names}) for group, cut in cuts for names in cut
        ],
        frozen_param_shapes=shapes_node(shapes) if shapes or not checkpoint.excludes_frozen else None,
        frozen_param_fragments=parts if frozen or not none else None,
        **({} if rank == 0 else {"shared_params": Dict()}),
    )


def _about(to: Target) -> dict[str, Node]:
    config = {"ds_config": encode(dict(to.settings))} if to.settings else {}
    return {**config, "ds_version": version_of(to.checkpoint)}


def _module(to: Target) -> Iterator[tuple[str, TensorRef]]:
    """Buffers are whole, parameters have no elements."""
    for name, ref in to.checkpoint.tensors.items():
        dtype = ref.dtype if name in to.checkpoint.frozen else to.dtype
        yield name, ref if name in to.buffers else TensorRef(dtype, (0,), ())


def _part(refs: Sequence[TensorRef], ranks: int, rank: int) -> Object:
    """A rank's parts of some tensors, one after another, each filled up with zeros."""
    dtype, chunks, total = refs[0].dtype, list[Chunk](), 0
    for ref in refs:
        part, own = part_of(ref.numel, ranks), held(ref.numel, ranks, rank)
        chunks += ref.flat(min(rank * part, ref.numel), own).chunks
        chunks.append(Zeros((part - own) * dtype.itemsize))
        total += part
    storage = new_storage(dtype, total, join_chunks(chunks))
    return tensor_node(TensorRef(dtype, (total,), ()), storage)


def _optim(to: Target, rank: int) -> Dict:
    states: list[tuple[Node, Node]] = []
    masters: list[Node] = []
    groups: list[Node] = []
    for group, cut in zip(to.checkpoint.groups, to.cuts, strict=True):
        ids: list[Value] = []
        for names in cut:
            s = len(masters)
            ids.append(s)
            masters.append(_part(_refs(to, group, FP32, names), to.ranks, rank))
            state = _state(to, group, names, rank)
            if state.pairs:
                states.append((s, state))
        groups.append(encode({**group.hyper, "params": ids}))
    scaler = to.checkpoint.loss_scaler
    inner = Dict.of([("state", Dict.of(states)), ("param_groups", groups)])
    outer: dict[str, Node] = {
        "zero_stage": Object("reduce", STAGE, (3,)),
        "loss_scaler": new_scaler(scaler),
        "dynamic_loss_scale": scaler.get("class") == "DynamicLossScaler",
        "overflow": False,
        "partition_count": to.ranks,
        "optimizer_state_dict": inner,
        "fp32_flat_groups": masters,
    }
    return Dict.of({"optimizer_state_dict": Dict.of(outer.items()), **_about(to)}.items())


def _state(to: Target, group: ParamGroup, names: Sequence[str], rank: int) -> Dict:
    node: Node = Dict()
    for kind in sorted(group.scalars, key=lambda kind: kind != "step"):  # torch's optimizers count first
        values = [group.scalars[kind][name] for name in names if name in group.scalars[kind]]
        if not values:
            continue
        if len(values) < len(names) or any(not equal(values[0], value) for value in values[1:]):
            raise not_flat(
                to.checkpoint, kind, "is not the same for all parameters of a sub-group", "sub-group"
            )
        node = put_node(node, group.paths.get(kind, (kind,)), encode(values[0]))
    for kind, refs in group.state.items():
        if kind != FP32 and any(name in refs for name in names):
            part = _part(_refs(to, group, kind, names), to.ranks, rank)
            node = put_node(node, group.paths.get(kind, (kind,)), part)
    assert isinstance(node, Dict)
    return node


def _refs(to: Target, group: ParamGroup, kind: str, names: Sequence[str]) -> list[TensorRef]:
    refs: Mapping[str, TensorRef] = group.state.get(kind, {})
    if kind == FP32 and not refs:
        refs = {n: to.checkpoint.tensors[n].cast(FLOAT32) for n in names if n in to.checkpoint.tensors}
    lacking = next((name for name in names if name not in refs), None)
    if lacking is not None:
        raise not_flat(
            to.checkpoint, kind, f"is missing for {lacking}, which others of its sub-group have", "sub-group"
        )
    out = [refs[name] for name in names]
    dtypes = {ref.dtype.short for ref in out}
    if len(dtypes) > 1 or not out[0].dtype.is_float:
        raise not_flat(to.checkpoint, kind, f"has the element types {', '.join(sorted(dtypes))}", "sub-group")
    for name, ref in zip(names, out, strict=True):
        if ref.numel != math.prod(group.params[name]):
            raise not_flat(to.checkpoint, kind, f"of {name} is not of the parameter's shape", "sub-group")
    return out
