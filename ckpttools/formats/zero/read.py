"""Reading a ZeRO-1/2 tag folder: headers of every rank, joined into one logical checkpoint.

Three optimizer layouts exist (deepspeed.md of each release differs in detail, not in these):

    rigid           fp32 partitions without padding, moments with it; `base_optimizer_state` is the torch
                    optimizer's state_dict
    bf16_optimizer  both with padding; no zero_stage, loss_scaler, overflow (class BF16_Optimizer)
    elastic         both without padding; `base_optimizer_state` is a list per group, no param_groups
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpttools.checkpoint import Checkpoint, FileRole, Layout, ParamGroup, TrainState
from ckpttools.containers import fields
from ckpttools.containers.pickles import Global, Node, Object, plain
from ckpttools.containers.torch_file import TorchFile, View, read_torch_file, size
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats.counters import train_state
from ckpttools.formats.zero.flat import FlatGroup, mapping_starts, original
from ckpttools.formats.zero.names import ZeroFiles, find
from ckpttools.stores.files import size_of
from ckpttools.tensors import FLOAT32, ByteRange, Flat, TensorRef, cat

Addresses = dict[str, tuple[int, int]]  # name -> (numel, start) within a rank's partition


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStates:
    """mp_rank_00_model_states.pt, decoded. `shapes` is per group, in flat order."""

    file: TorchFile
    root: fields.Mapping
    weights: Mapping[str, TensorRef]
    buffers: frozenset[str]
    frozen: frozenset[str]
    shared: Mapping[str, str]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...] | None  # None: in the optimizer files (<= 0.5.10)
    dp_world_size: int | None
    ds_version: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroFolder:
    """A whole tag folder, decoded; the opaque remainder that the writer needs."""

    files: ZeroFiles
    model: ModelStates
    ranks: tuple[Rank, ...]
    groups: tuple[FlatGroup, ...]
    names: tuple[tuple[str, ...], ...]  # per group, in the optimizer's own order
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]  # per group, in flat order
    partitioned: tuple[tuple[str, ...], ...]  # per group: the moments that are cut over the ranks
    round_robin: bool


def read(folder: Path) -> Checkpoint:
    """Read a tag folder. Raises CkptError where a file is missing, damaged or contradicts the others."""
    files = find(folder)
    model = read_model(files.model)
    ranks = tuple(read_rank(path, rank) for rank, path in files.optim.items())
    return checkpoint(assemble(files, model, ranks))


# --- one file -----------------------------------------------------------------------------------------


def read_model(path: Path) -> ModelStates:
    """Decode the model file."""
    file = read_torch_file(path)
    root = fields.mapping(path, file.value, "the file's value")
    module = root.get("module")
    if module is None and "module" in root:
        raise Unsupported(
            "layout-unsupported",
            "module is empty: a pipeline-parallel checkpoint, which is recognised but not read yet",
            where=path,
        )
    weights: dict[str, TensorRef] = {}
    for name, node in fields.mapping(path, module, "module").named():
        if view := file.view(node):
            weights[name] = view.ref
    shapes = None
    if root.get("param_shapes") is not None:
        groups = fields.sequence(path, root.get("param_shapes"), "param_shapes")
        shapes = tuple(_shapes(path, node, f"param_shapes[{g}]") for g, node in enumerate(groups))
    frozen = root.get("frozen_param_shapes")
    trainable = {name for group in shapes or () for name in group}
    shared = _shared(root, weights, trainable)
    buffers = _names(root.get("buffer_names"))
    if frozen is not None:
        frozen_names = frozenset(fields.mapping(path, frozen, "frozen_param_shapes").names())
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


def _shapes(path: Path, node: Node, field: str) -> dict[str, tuple[int, ...]]:
    return {name: size(value) for name, value in fields.mapping(path, node, field).named()}


def _names(node: Node) -> frozenset[str]:
    return frozenset(x for x in node if isinstance(x, str)) if isinstance(node, list | tuple) else frozenset()


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


def read_rank(path: Path, dp_rank: int) -> Rank:
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


def _refuse_old(path: Path, state: fields.Mapping) -> None:
    if "fp32_flat_groups" in state:
        raise Unsupported(
            "layout-unsupported", "a ZeRO-3 optimizer file, which is recognised but not read yet", where=path
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
    path: Path, base: fields.Mapping, at: str
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


def stage_of(node: Node) -> int | None:
    """The ZeRO stage: an int, ZeroStageEnum(2), or as Python 3.11.0 to 3.11.3 pickled it, by getattr."""
    if isinstance(node, Object) and node.how == "reduce":
        if isinstance(node.cls, Global) and node.cls.name == "ZeroStageEnum" and len(node.args) == 1:
            return fields.integer(node.args[0])
        if isinstance(node.cls, Global) and node.cls.name == "getattr" and len(node.args) == 2:
            names = ["disabled", "optimizer_states", "gradients", "weights"]
            return names.index(node.args[1]) if node.args[1] in names else None
    return fields.integer(node)


def _counts(node: Node, groups: int) -> tuple[int, ...] | None:
    """A list of ints per group; DeepSpeed 0.2 to 0.4 saved one int for all."""
    if isinstance(node, list) and all(fields.integer(x) is not None for x in node):
        return tuple(x for x in node if isinstance(x, int))
    single = fields.integer(node)
    return (single,) * groups if single is not None else None


def _gaps(path: Path, node: Node) -> tuple[tuple[int, ...], ...] | None:
    if node is None:
        return None
    field = "optimizer_state_dict.param_alignment_paddings"
    return tuple(
        tuple(fields.count(path, x, f"{field}[{g}]") for x in fields.sequence(path, group, f"{field}[{g}]"))
        for g, group in enumerate(fields.sequence(path, node, field))
    )


def _mappings(path: Path, node: Node) -> tuple[Addresses, ...] | None:
    if node is None:
        return None
    field = "optimizer_state_dict.param_slice_mappings"
    out: list[Addresses] = []
    for g, group in enumerate(fields.sequence(path, node, field)):
        found: Addresses = {}
        for name, value in fields.mapping(path, group, f"{field}[{g}]").named():
            found[name] = _address(path, value, f"{field}[{g}].{name}")
        out.append(found)
    return tuple(out)


def _address(path: Path, node: Node, field: str) -> tuple[int, int]:
    """deepspeed.utils.tensor_fragment.fragment_address: a dataclass with numel and start."""
    state = fields.as_mapping(node.state) if isinstance(node, Object) and node.has_state else None
    if state is None:
        raise fields.bad_field(path, field, "is not a fragment address")
    return (
        fields.count(path, state.get("numel"), f"{field}.numel", 1 << 62),
        fields.count(path, state.get("start"), f"{field}.start", 1 << 62),
    )


# --- all files together -------------------------------------------------------------------------------


def assemble(files: ZeroFiles, model: ModelStates, ranks: tuple[Rank, ...]) -> ZeroFolder:
    """Fit the ranks together. Raises CkptError where a parameter's bytes cannot be located for certain."""
    n = check_complete(files, model, ranks)
    shapes = model.shapes
    if shapes is None:
        if version_numbers(model.ds_version or ranks[0].ds_version) >= (0, 6):
            raise fields.bad_field(files.model, "param_shapes", "is missing")
        shapes = _old_shapes(ranks[0])
    first = ranks[0]
    if any(len(rank.fp32) != len(shapes) for rank in ranks):
        raise CkptError(
            "group-count",
            f"the model file describes {len(shapes)} parameter groups, the ranks hold "
            f"{sorted({len(rank.fp32) for rank in ranks})}",
            where=files.folder,
            why="the files do not belong to one save",
            hint="copy all files of the folder again from one save",
        )
    groups = tuple(_group(files, shapes[g], g, ranks) for g in range(len(shapes)))
    round_robin = _is_round_robin(model, ranks, groups)
    names = tuple(tuple(original(group.names, n)) if round_robin else group.names for group in groups)
    partitioned = tuple(
        tuple(key for key in first.moments[g] if _is_partitioned(ranks, g, key, groups[g]))
        for g in range(len(groups))
    )
    return ZeroFolder(
        files=files,
        model=model,
        ranks=ranks,
        groups=groups,
        names=names,
        shapes=shapes,
        partitioned=partitioned,
        round_robin=round_robin,
    )


def check_complete(files: ZeroFiles, model: ModelStates, ranks: tuple[Rank, ...]) -> int:
    """How many ranks there are: every one from 0 on, as many as the files say. Raises CkptError otherwise."""
    if model.dp_world_size is not None and model.dp_world_size < 1:
        raise fields.bad_field(files.model, "dp_world_size", f"is {model.dp_world_size}")
    stated = {rank.partition_count[0] for rank in ranks if rank.partition_count}
    expected = model.dp_world_size or (max(stated) if stated else len(ranks))
    missing = [rank for rank in range(expected) if rank not in files.optim]
    if missing:
        raise missing_shards(files, missing, expected)
    extra = [rank for rank in files.optim if rank >= expected]
    if extra:
        raise CkptError(
            "shard-extra",
            f"optimizer files of dp ranks {_some(extra)} where the model file says {expected} ranks",
            where=files.folder,
            why="they are left over from another save; DeepSpeed and its converters trip over them",
            hint="move the extra files out of the folder",
        )
    if stated - {expected}:
        raise CkptError(
            "rank-count",
            f"the optimizer files were saved with {sorted(stated)} ranks, the model file with {expected}",
            where=files.folder,
            why="the files do not belong to one save",
            hint="copy all files of the folder again from one save",
        )
    return expected


def missing_shards(files: ZeroFiles, missing: list[int], expected: int) -> CkptError:
    one = len(missing) == 1
    return CkptError(
        "shard-missing",
        f"no optimizer states for dp rank{'' if one else 's'} {_some(missing)} of {expected}",
        where=files.folder,
        why=f"without {'it' if one else 'them'} the parameters that "
        f"{'this rank' if one else 'these ranks'} owned cannot be restored",
        hint=f"copy {files.optim_name(missing[0])}{'' if one else ' and the others'} "
        f"from the node that ran rank {missing[0]}",
    )


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def _old_shapes(rank: Rank) -> tuple[Mapping[str, tuple[int, ...]], ...]:
    """param_shapes of DeepSpeed 0.4.4 to 0.5.10, which kept them in the optimizer files."""
    path, node = rank.file.path, rank.root.get("param_shapes")
    if node is None or version_numbers(rank.ds_version) < (0, 4, 4):
        raise Unsupported(
            "shapes-missing",
            "the parameters' shapes and order are not in the checkpoint, or not reliably",
            where=path,
            why="before DeepSpeed 0.4.4 param_shapes is absent or in another order than the flat groups",
            hint="load and save it once with a newer DeepSpeed (0.5.4 or later)",
        )
    groups = node if isinstance(node, list) else [node]
    if len(groups) != len(rank.fp32):
        raise Unsupported(
            "shapes-missing",
            f"one list of parameter shapes for {len(rank.fp32)} groups",
            where=path,
            why="DeepSpeed before 0.5.4 did not say which parameter is in which group",
        )
    return tuple(_shapes(path, group, f"param_shapes[{g}]") for g, group in enumerate(groups))


def _group(
    files: ZeroFiles, shapes: Mapping[str, tuple[int, ...]], g: int, ranks: tuple[Rank, ...]
) -> FlatGroup:
    n = len(ranks)
    names = tuple(shapes)
    numels = tuple(math.prod(shape) for shape in shapes.values())
    stated = ranks[0].gaps
    gaps = stated[g] if stated is not None and g < len(stated) else (0,) * len(names)
    if len(gaps) != len(names):
        raise fields.bad_field(
            ranks[0].file.path,
            f"optimizer_state_dict.param_alignment_paddings[{g}]",
            f"has {len(gaps)} entries for {len(names)} parameters",
        )
    for alignment in (2 * n, n):  # n: DeepSpeed up to 0.5.1
        group = FlatGroup(names=names, numels=numels, gaps=gaps, ranks=n, alignment=alignment)
        if all(_fits(rank.fp32[g].shape[0], group, i) for i, rank in enumerate(ranks)):
            return group
    group = FlatGroup(names=names, numels=numels, gaps=gaps, ranks=n, alignment=2 * n)
    wrong = [i for i, rank in enumerate(ranks) if not _fits(rank.fp32[g].shape[0], group, i)]
    raise CkptError(
        "partition-size",
        f"parameter group {g}: {group.used} elements over {n} ranks make partitions of {group.part}, "
        f"but rank {wrong[0]} holds {ranks[wrong[0]].fp32[g].shape[0]}",
        where=ranks[wrong[0]].file.path,
        why="the file belongs to another model, another save or another rank",
        hint="copy all files of the folder again from one save",
    )


def _fits(stored: int, group: FlatGroup, rank: int) -> bool:
    """Stored without padding (ZeRO), with it (BF16_Optimizer), or with what 0.3 to 0.6 left of it."""
    lean = group.part - group.padding(rank)
    return lean <= stored <= group.part if rank == group.ranks - 1 else stored in (lean, group.part)


def _is_partitioned(ranks: tuple[Rank, ...], g: int, key: str, group: FlatGroup) -> bool:
    """DeepSpeed's own rule: a 1-D tensor as long as the partition is cut over the ranks."""
    for i, rank in enumerate(ranks):
        view = rank.file.view(rank.moments[g].get(key))
        if view is None or len(view.shape) != 1:
            return False
        if view.shape[0] not in (group.part, group.part - group.padding(i), rank.fp32[g].shape[0]):
            return False
    return group.part > 0


def _is_round_robin(model: ModelStates, ranks: tuple[Rank, ...], groups: tuple[FlatGroup, ...]) -> bool:
    """What the slice mappings show; where they fit both orders or neither, what ds_config says.

    Stage 1 ignored the setting until DeepSpeed 0.13 (PR 4887).
    """
    in_order = all(mappings_agree(rank, groups, round_robin=False) for rank in ranks)
    in_turns = all(mappings_agree(rank, groups, round_robin=True) for rank in ranks)
    if in_order != in_turns:
        return in_turns
    if ranks[0].stage == 1 and (version_numbers(ranks[0].ds_version) or (1,)) < (0, 13):
        return False
    return _configured(ranks[0].root.get("ds_config")) or _configured(model.root.get("ds_config"))


def version_numbers(text: str | None) -> tuple[int, ...]:
    """A version's first three numbers; () where it is not recorded."""
    return tuple(int(x) for x in re.findall(r"\d+", text or "")[:3])


def _configured(config: Node) -> bool:
    pairs = fields.as_mapping(config)
    zero = fields.as_mapping(pairs.get("zero_optimization")) if pairs is not None else None
    return zero is not None and zero.get("round_robin_gradients") is True


def mappings_agree(rank: Rank, groups: tuple[FlatGroup, ...], *, round_robin: bool) -> bool:
    """Whether a rank's param_slice_mappings are those of its place among the ranks; True if it has none."""
    if rank.mappings is None:
        return True
    return rank.mappings == tuple(
        expected_mapping(group, rank.dp_rank, round_robin=round_robin) for group in groups
    )


def expected_mapping(group: FlatGroup, rank: int, *, round_robin: bool) -> Addresses:
    """The param_slice_mappings entry that DeepSpeed writes for one rank and group."""
    names = original(group.names, group.ranks) if round_robin else list(group.names)
    return group.mapping(rank, mapping_starts(names, group), names)


# --- the logical checkpoint ---------------------------------------------------------------------------


def checkpoint(folder: ZeroFolder) -> Checkpoint:
    """The whole, unpartitioned: flat groups joined over the ranks and cut at the parameters."""
    model, ranks = folder.model, folder.ranks
    stage = next((rank.stage for rank in ranks if rank.stage is not None), None)
    variant = ranks[0].variant
    return Checkpoint(
        path=folder.files.folder,
        layout=Layout(
            format=f"zero{stage or 1}",
            zero_stage=stage,
            dp_degree=len(ranks),
            tag=folder.files.folder.name,
            dtype=_dtype(model, folder.shapes),
            writer=f"DeepSpeed {model.ds_version or ranks[0].ds_version or '(version not recorded)'}",
            variant={"rigid": None, "bf16_optimizer": "BF16_Optimizer", "elastic": "elastic"}[variant],
            round_robin=folder.round_robin,
        ),
        tensors=model.weights,
        groups=tuple(_param_group(folder, g) for g in range(len(folder.groups))),
        train_state=_train_state(model),
        shared=model.shared,
        frozen=model.frozen,
        buffers=model.buffers,
        files=tuple(_roles(folder)),
        checks=tuple(check for file in torch_files(folder) for check in file.checks()),
        notes=tuple(_notes(folder)),
        template=folder,
    )


def torch_files(folder: ZeroFolder) -> Iterator[TorchFile]:
    yield folder.model.file
    yield from (rank.file for rank in folder.ranks)


def _dtype(model: ModelStates, shapes: tuple[Mapping[str, tuple[int, ...]], ...]) -> str | None:
    for group in shapes:
        for name in group:
            if name in model.weights:
                return model.weights[name].dtype.short
    return None


def _param_group(folder: ZeroFolder, g: int) -> ParamGroup:
    state = {"fp32": _cut(folder, g, "fp32")}
    for key in folder.partitioned[g]:
        state[key] = _cut(folder, g, key)
    hyper = folder.ranks[0].hyper
    shown = plain(hyper[g]) if hyper is not None else {}
    return ParamGroup(
        params={name: folder.shapes[g][name] for name in folder.names[g]},
        state=state,
        hyper=shown if isinstance(shown, dict) else {},
    )


def _cut(folder: ZeroFolder, g: int, key: str) -> dict[str, TensorRef]:
    group = folder.groups[g]
    flat = Flat(flat_vector(folder, g, key))
    starts = group.starts()
    return {
        name: flat.cut(starts[name], math.prod(folder.shapes[g][name]), folder.shapes[g][name])
        for name in folder.names[g]
    }


def flat_vector(folder: ZeroFolder, g: int, key: str) -> TensorRef:
    """The ranks' partitions of one kind of state, joined; only the tail may be padding."""
    refs = [vector(rank, g, key) for rank in folder.ranks]
    for rank, ref in zip(folder.ranks, refs, strict=True):
        if ref.dtype is not refs[0].dtype:
            raise fields.bad_field(
                rank.file.path,
                f"optimizer_state_dict {key} of group {g}",
                f"is {ref.dtype} where rank 0 has {refs[0].dtype}",
            )
    return cat(refs, refs[0].dtype)


def vector(rank: Rank, g: int, key: str) -> TensorRef:
    """One rank's partition of "fp32" or of a moment, as stored."""
    view = rank.fp32[g] if key == "fp32" else rank.file.view(rank.moments[g][key])
    assert view is not None
    if key == "fp32" and view.dtype is not FLOAT32:
        raise fields.bad_field(
            rank.file.path,
            f"optimizer_state_dict.single_partition_of_fp32_groups[{g}]",
            f"is {view.dtype} where float32 is expected",
        )
    return view.ref


def _train_state(model: ModelStates) -> TrainState:
    return train_state(model.root, step_keys=("global_steps",))


def _roles(folder: ZeroFolder) -> Iterator[FileRole]:
    model = folder.model.file
    yield FileRole(
        path=model.path,
        nbytes=model.size,
        role="weights in the training dtype, parameter shapes, counters, client state",
        dangers=model.dangers,
    )
    n = len(folder.ranks)
    for rank in folder.ranks:
        yield FileRole(
            path=rank.file.path,
            nbytes=rank.file.size,
            role=f"dp rank {rank.dp_rank} of {n}: its partition of fp32 weights and optimizer state",
            dangers=rank.file.dangers,
        )
    for path in folder.files.others:
        yield FileRole(path=path, nbytes=size_of(path), role="not part of the ZeRO layout")


def _notes(folder: ZeroFolder) -> Iterator[str]:
    unchecked = [
        file.path.name for file in torch_files(folder) if file.archive is not None and not file.has_checksums
    ]
    legacy = [file.path.name for file in torch_files(folder) if file.archive is None]
    if unchecked:
        yield f"saved without checksums (compute_crc32=False): {', '.join(map(escape, unchecked))}"
    if legacy:
        yield f"in torch's older serialization, which has no checksums: {', '.join(map(escape, legacy))}"
    if folder.round_robin:
        yield "round_robin_gradients: the flat order depends on the number of ranks"
    missing = [name for group in folder.shapes for name in group if name not in folder.model.weights]
    if missing:
        yield f"{len(missing)} trainable parameters are not in module, the first {escape(missing[0])}"


def source_ranges(ref: TensorRef) -> list[ByteRange]:
    return [chunk for chunk in ref.chunks if isinstance(chunk, ByteRange)]
