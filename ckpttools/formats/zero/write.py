"""Writing a ZeRO-1/2 tag folder for any number of ranks.

What DeepSpeed reads on load is `dp_world_size`, the file names, `ds_version`, `base_optimizer_state` and
the fp32 partitions; its converters read the rest. All of it is recomputed for the new rank count, and
everything else in the files is carried over as it was read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import fields
from ckpttools.containers.pickles import Dict, Global, Node, Object
from ckpttools.containers.torch_file import new_storage, tensor_node, write_torch_file
from ckpttools.errors import CkptError, Unsupported
from ckpttools.formats.counters import BATCH, batch_settings
from ckpttools.formats.zero.flat import FlatGroup, alignment_gaps, mapping_starts, reordered
from ckpttools.formats.zero.read import ZeroFolder
from ckpttools.plan import OutputFile, Plan, copy_file
from ckpttools.schedules.evidence import kept, known, of_deepspeed, of_samples
from ckpttools.stores.files import size_of
from ckpttools.tensors import Chunk, TensorRef, Zeros, cut_chunks, join_chunks

ADDRESS = Global("deepspeed.utils.tensor_fragment", "fragment_address")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """The layout to be written: flat groups for the new rank count, and their values."""

    source: ZeroFolder
    groups: tuple[FlatGroup, ...]
    names: tuple[tuple[str, ...], ...]  # per group, in the optimizer's own order
    values: tuple[Mapping[str, TensorRef], ...]  # per group: kind -> the whole flat vector, padded
    ranks: int
    config: Mapping[str, int]  # ds_config's batch settings that change


def plan(checkpoint: Checkpoint) -> Plan:
    """The files of a tag folder, for `checkpoint.layout.dp_degree` ranks.

    Raises Unsupported for a checkpoint that was not read from a ZeRO folder, or whose optimizer settings
    are not in the files.
    """
    source = checkpoint.template
    if not isinstance(source, ZeroFolder):
        raise Unsupported(
            "not-zero",
            f"{checkpoint.layout.format} is not a ZeRO checkpoint",
            where=checkpoint.path,
            why="only ZeRO-1 and ZeRO-2 folders are partitioned over ranks and can be resharded",
        )
    if source.ranks[0].variant == "elastic":
        raise Unsupported(
            "elastic",
            "saved with elastic_checkpoint: true, which leaves out the optimizer's settings",
            where=checkpoint.path,
            why="lr, betas and weight_decay are not in the files, and current DeepSpeed cannot load its own "
            "elastic checkpoints: whatever was written could not be resumed",
            hint="extract the weights (ckpt extract --weights-only), or save without elastic_checkpoint",
        )
    ranks = checkpoint.layout.dp_degree
    config, config_note = _batch(source, ranks)
    groups = tuple(_group(source, g, ranks) for g in range(len(source.groups)))
    target = _Target(
        source=source,
        groups=groups,
        names=tuple(tuple(group.params) for group in checkpoint.groups),
        values=tuple(
            {kind: _flat(groups[g], refs) for kind, refs in group.state.items()}
            for g, group in enumerate(checkpoint.groups)
        ),
        ranks=ranks,
        config=config,
    )
    files = [_model_file(target), *(_rank_file(target, rank) for rank in range(ranks))]
    files += [copy_file(path, path.name, size_of(path)) for path in source.files.others]
    return Plan(files=tuple(files), notes=(*config_note, *_differing(source)), checks=checkpoint.checks)


def _group(source: ZeroFolder, g: int, ranks: int) -> FlatGroup:
    """One group's layout over the new ranks: round-robin permuted anew, alignment gaps recomputed."""
    old = source.groups[g]
    names = source.names[g]
    numels = dict(zip(old.names, old.numels, strict=True))
    order = tuple(reordered(names, ranks)) if source.round_robin else names
    sizes = tuple(numels[name] for name in order)
    gaps = alignment_gaps(sizes, _boundary(source)) if _is_aligned(source) else (0,) * len(order)
    alignment = ranks * old.alignment // old.ranks
    return FlatGroup(names=order, numels=sizes, gaps=gaps, ranks=ranks, alignment=alignment)


def _is_aligned(source: ZeroFolder) -> bool:
    """Whether zero_optimization.parameter_alignment was on. A model may need no gaps for it."""
    if any(any(group.gaps) for group in source.groups):
        return True
    config = fields.as_mapping(source.ranks[0].root.get("ds_config"))
    zero = fields.as_mapping(config.get("zero_optimization")) if config is not None else None
    return zero is not None and zero.get("parameter_alignment") is True


def _boundary(source: ZeroFolder) -> int:
    """Elements of the model's dtype in 16 bytes."""
    sizes = {
        source.model.weights[name].dtype.itemsize
        for group in source.shapes
        for name in group
        if name in source.model.weights
    }
    if len(sizes) != 1:
        raise CkptError(
            "alignment-unknown",
            "parameter_alignment is on, but the model's dtype is not the same everywhere",
            where=source.files.folder,
        )
    return 16 // sizes.pop()


def _flat(group: FlatGroup, refs: Mapping[str, TensorRef]) -> TensorRef:
    """The group's flat vector of one kind, gaps and tail filled with zeros."""
    dtype = next(iter(refs.values())).dtype
    chunks: list[Chunk] = []
    for name, gap in zip(group.names, group.gaps, strict=True):
        chunks += refs[name].chunks
        chunks.append(Zeros(gap * dtype.itemsize))
    chunks.append(Zeros((group.total - group.used) * dtype.itemsize))
    return TensorRef(dtype, (group.total,), join_chunks(chunks))


# --- the model file -----------------------------------------------------------------------------------


def _model_file(target: _Target) -> OutputFile:
    root = target.source.model.root
    values: dict[str, Node] = {"dp_world_size": target.ranks}
    if root.get("param_shapes") is not None:
        values["param_shapes"] = _shapes(target, root.get("param_shapes"))
    values |= _configs(target, root)
    return write_torch_file(target.source.model.file.path.name, root.replace(values))


def _shapes(target: _Target, node: Node) -> Node:
    """param_shapes in the new flat order, each entry as it was."""
    assert isinstance(node, list)
    out: list[Node] = []
    for group, old in zip(target.groups, node, strict=True):
        pairs = fields.as_mapping(old)
        assert pairs is not None
        entries = dict(pairs.named())
        new = Object("reduce", Global("collections", "OrderedDict"), ())
        new.pairs = [(name, entries[name]) for name in group.names]
        out.append(new)
    return out


def _configs(target: _Target, root: fields.Mapping) -> dict[str, Node]:
    config = fields.as_mapping(root.get("ds_config"))
    if config is None or not target.config:
        return {}
    return {"ds_config": config.replace(dict(target.config))}


def _batch(source: ZeroFolder, ranks: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """The batch settings that keep the global batch over the new ranks, and what to say about them.

    DeepSpeed never reads these copies; they are kept true for people and tools.
    """
    root = source.model.root
    old = batch_settings(root.get("ds_config"))
    samples, updates = (fields.integer(root.get(key)) for key in ("global_samples", "global_steps"))
    batch = known((*of_deepspeed(old, len(source.ranks)), *of_samples(samples, updates)))
    meta = fields.as_mapping(root.get("meta"))  # MMEngine's, which counts micro-batches
    iteration = fields.integer(meta.get("iter")) if meta is not None else None
    new = kept(batch, ranks, "update" if iteration is None else "micro", iteration)
    values = {"micro": new.micro, "accumulation": new.accumulation}
    changed = {BATCH[k]: v for k, v in values.items() if v is not None and k in old and v != old[k]}
    return changed, new.notes


# --- the optimizer files ------------------------------------------------------------------------------


def _rank_file(target: _Target, rank: int) -> OutputFile:
    source = target.source.ranks[0]
    state = source.state
    values: dict[str, Node] = {
        "base_optimizer_state": _base_state(target, rank),
        "single_partition_of_fp32_groups": [
            _partition(target, g, rank, "fp32") for g in range(len(target.groups))
        ],
        "partition_count": [target.ranks] * len(target.groups),
    }
    if source.paddings is not None:
        key = "group_paddings" if "group_paddings" in state else "groups_padding"
        values[key] = [_stated_padding(target, g, rank) for g in range(len(target.groups))]
    if source.gaps is not None:
        values["param_alignment_paddings"] = [list(group.gaps) for group in target.groups]
    if source.mappings is not None:
        values["param_slice_mappings"] = [_mapping(target, g, rank) for g in range(len(target.groups))]
    root_values: dict[str, Node] = {"optimizer_state_dict": state.replace(values)}
    if source.root.get("param_shapes") is not None:
        root_values["param_shapes"] = _shapes(target, _listed(source.root.get("param_shapes")))
    root_values |= _configs(target, source.root)
    return write_torch_file(target.source.files.optim_name(rank), source.root.replace(root_values))


def _listed(node: Node) -> Node:
    return node if isinstance(node, list) else [node]


def _stated_padding(target: _Target, g: int, rank: int) -> int:
    """BF16_Optimizer notes the whole padding at the last rank, the others each rank's own."""
    group = target.groups[g]
    if target.source.ranks[0].variant == "bf16_optimizer":
        return group.total - group.used if rank == group.ranks - 1 else 0
    return group.padding(rank)


def _partition(target: _Target, g: int, rank: int, kind: str) -> Object:
    """A rank's part of a flat vector. fp32 is a view without the padding, over a storage with it."""
    group, ref = target.groups[g], target.values[g][kind]
    item = ref.dtype.itemsize
    chunks = cut_chunks(ref.chunks, rank * group.part * item, group.part * item)
    lean = kind == "fp32" and target.source.ranks[0].variant == "rigid"
    shown = group.part - group.padding(rank) if lean else group.part
    storage = new_storage(ref.dtype, group.part, chunks)
    return tensor_node(TensorRef(ref.dtype, (shown,), ()), storage)


def _base_state(target: _Target, rank: int) -> Node:
    """The torch optimizer's state_dict with this rank's partitions; scalars and settings as they were."""
    source = target.source.ranks[0]
    base = fields.as_mapping(source.state.get("base_optimizer_state"))
    assert base is not None and source.hyper is not None
    old = fields.as_mapping(base.get("state"))
    assert old is not None
    new: list[tuple[Node, Node]] = []
    index = {id(old.get(i)): g for g, i in enumerate(_indices(source.hyper)) if i in old}
    for key, own in old.pairs:
        g, pairs = index.get(id(own)), fields.as_mapping(own)
        if g is None or pairs is None:
            new.append((key, own))
            continue
        parts = {kind: _partition(target, g, rank, kind) for kind in target.source.partitioned[g]}
        new.append((key, pairs.replace(dict(parts))))
    return base.replace({"state": Dict.of(new)})


def _indices(hyper: tuple[fields.Mapping, ...]) -> Iterator[int]:
    for group in hyper:
        params = group.get("params")
        assert isinstance(params, list) and isinstance(params[0], int)
        yield params[0]


def _mapping(target: _Target, g: int, rank: int) -> Object:
    group = target.groups[g]
    names = target.names[g]
    template = _address_template(target.source)
    new = Object("reduce", Global("collections", "OrderedDict"), ())
    for name, (numel, start) in group.mapping(rank, mapping_starts(names, group), names).items():
        address = Object(template.how, template.cls, template.args)
        address.state = Dict.of([("numel", numel), ("start", start)])
        new.pairs.append((name, address))
    return new


def _address_template(source: ZeroFolder) -> Object:
    """A fragment address as this DeepSpeed pickles it: its module has moved over the versions."""
    for rank in source.ranks:
        for group in fields.sequence(rank.file.path, rank.state.get("param_slice_mappings"), "mappings"):
            pairs = fields.as_mapping(group)
            for _, node in pairs.named() if pairs is not None else ():
                if isinstance(node, Object):
                    return node
    return Object("newobj", ADDRESS, ())


def _differing(source: ZeroFolder) -> list[str]:
    """Replicated optimizer values that are not the same on all ranks cannot be carried over as they are."""
    notes: list[str] = []
    for g, names in enumerate(source.partitioned):
        kept = [key for key in source.ranks[0].moments[g] if key not in names]
        lost = {key for rank in source.ranks[1:] for key in rank.moments[g]} - {*kept, *names}
        if lost:
            notes.append(f"group {g}: {', '.join(sorted(lost))} exist on some ranks only and are not carried")
    return notes
