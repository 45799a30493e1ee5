"""All files of a ZeRO-1/2 folder together: do the ranks fit, and where is each parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from ckpttools.containers import fields
from ckpttools.containers.pickles import Dict, Node, Object
from ckpttools.errors import CkptError, Unsupported, some
from ckpttools.formats.deepspeed import original, shapes_of
from ckpttools.formats.model_states import ModelStates
from ckpttools.formats.rank_local import State, Unaccounted, state_of, unaccounted
from ckpttools.formats.zero.decode import Addresses, Rank, version_numbers
from ckpttools.formats.zero.flat import FlatGroup
from ckpttools.formats.zero.names import ZeroFiles
from ckpttools.location import Location


class ZeroFolder(Struct, frozen=True, kw_only=True):
    """A whole tag folder, decoded; the opaque remainder that the writer needs."""

    files: ZeroFiles
    model: ModelStates
    ranks: tuple[Rank, ...]
    groups: tuple[FlatGroup, ...]
    names: tuple[tuple[str, ...], ...]  # per group, in the optimizer's own order
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]  # per group, in flat order
    states: tuple[tuple[State, ...], ...]  # per group and rank: what the optimizer keeps
    partitioned: tuple[tuple[str, ...], ...]  # per group: the kinds of it that are cut over the ranks
    round_robin: bool

    @property
    def rank_files(self) -> tuple[Location, ...]:
        return tuple(rank.file.path for rank in self.ranks)

    def unaccounted(self) -> Iterator[Unaccounted]:
        """The optimizer's state that fits this number of ranks only; reads what is replicated."""
        for g, (states, cut) in enumerate(zip(self.states, self.partitioned, strict=True)):
            yield from unaccounted(g, states, cut, self._whole(g))

    def _whole(self, g: int) -> tuple[str, ...]:
        """Muon's momentum spans the whole parameters of a partition (stage_1_and_2.py:
        _muon_momentum_buffer), which may by chance be as long as it; offloaded, it is cut."""
        hyper = self.ranks[0].hyper
        if hyper is None or hyper[g].get("use_muon") is not True:
            return ()
        config = zero_settings(self.ranks[0].root.get("ds_config"))
        config = config or zero_settings(self.model.root.get("ds_config"))
        offload = fields.as_mapping(config.get("offload_optimizer")) if config is not None else None
        on = offload is not None and offload.get("device") not in (None, "none")
        return () if on else ("momentum_buffer",)


def assemble(files: ZeroFiles, model: ModelStates, ranks: tuple[Rank, ...]) -> ZeroFolder:
    """Fit the ranks together. Raises CkptError where a parameter's bytes cannot be located for certain."""
    n = check_complete(files, model, ranks)
    shapes = model.shapes
    if model.root.get("param_shapes") is None:
        if version_numbers(model.ds_version or ranks[0].ds_version) >= (0, 6):
            raise fields.bad_field(files.model, "param_shapes", "is missing")
        shapes = _old_shapes(ranks[0])
    if any(len(rank.fp32) != len(shapes) for rank in ranks):
        raise CkptError(
            "group-count",
            f"the model file describes {len(shapes)} parameter groups, the ranks hold "
            f"{sorted({len(rank.fp32) for rank in ranks})}",
            where=files.folder,
            why="the files do not belong to one save",
            hint="copy all files of the folder again from one save",
        )
    groups = tuple(_group(shapes[g], g, ranks) for g in range(len(shapes)))
    round_robin = _is_round_robin(model, ranks, groups)
    names = tuple(tuple(original(group.names, n)) if round_robin else group.names for group in groups)
    states = tuple(
        tuple(state_of(rank.file, rank.moments[g].items()) for rank in ranks) for g in range(len(groups))
    )
    return ZeroFolder(
        files=files,
        model=model,
        ranks=ranks,
        groups=groups,
        names=names,
        shapes=shapes,
        states=states,
        partitioned=tuple(_partitioned(ranks, states[g], g, group) for g, group in enumerate(groups)),
        round_robin=round_robin,
    )


def check_complete(files: ZeroFiles, model: ModelStates, ranks: tuple[Rank, ...]) -> int:
    """How many ranks there are: every one from 0 on, as many as the files say. Raises CkptError otherwise."""
    counts = ((rank.file.path, rank.partition_count[0]) for rank in ranks if rank.partition_count)
    stated = {count for path, n in counts if (count := fields.ranks(path, n, "partition_count")) is not None}
    expected = model.dp_world_size or (max(stated) if stated else len(ranks))
    missing = [rank for rank in range(expected) if rank not in files.optim]
    if missing:
        raise missing_shards(files, missing, expected)
    extra = [rank for rank in files.optim if rank >= expected]
    if extra:
        raise CkptError(
            "shard-extra",
            f"optimizer files of dp ranks {some(extra)} where the model file says {expected} ranks",
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
        f"no optimizer states for dp rank{'' if one else 's'} {some(missing)} of {expected}",
        where=files.folder,
        why=f"without {'it' if one else 'them'} the parameters that "
        f"{'this rank' if one else 'these ranks'} owned cannot be restored",
        hint=f"copy {files.optim_name(missing[0])}{'' if one else ' and the others'} "
        f"from the node that ran rank {missing[0]}",
    )


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
    return tuple(shapes_of(path, group, f"param_shapes[{g}]") for g, group in enumerate(groups))


def _group(shapes: Mapping[str, tuple[int, ...]], g: int, ranks: tuple[Rank, ...]) -> FlatGroup:
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


def _partitioned(ranks: Sequence[Rank], states: Sequence[State], g: int, group: FlatGroup) -> tuple[str, ...]:
    """The kinds that are cut over the ranks. DeepSpeed's own rule: a flat tensor as long as the partition is;
    all else is carried by each rank for itself.
    """

    def cut(i: int, rank: Rank, kind: str) -> bool:
        leaf = states[i].get(kind)
        ref = leaf.ref if leaf is not None else None
        lean = group.part - group.padding(i)
        lengths = {group.part, lean, rank.fp32[g].shape[0]}
        return ref is not None and len(ref.shape) == 1 and ref.shape[0] in lengths

    if not group.part:
        return ()
    return tuple(kind for kind in states[0] if all(cut(i, rank, kind) for i, rank in enumerate(ranks)))


def _fits(stored: int, group: FlatGroup, rank: int) -> bool:
    """Stored without padding (ZeRO), with it (BF16_Optimizer), or with what 0.3 to 0.6 left of it."""
    lean = group.part - group.padding(rank)
    return lean <= stored <= group.part if rank == group.ranks - 1 else stored in (lean, group.part)


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


def _configured(config: Node) -> bool:
    zero = zero_settings(config)
    return zero is not None and zero.get("round_robin_gradients") is True


def zero_settings(config: Node) -> Dict | Object | None:
    pairs = fields.as_mapping(config)
    return fields.as_mapping(pairs.get("zero_optimization")) if pairs is not None else None


def mappings_agree(rank: Rank, groups: tuple[FlatGroup, ...], *, round_robin: bool) -> bool:
    """Whether a rank's param_slice_mappings are those of its place among the ranks; True if it has none."""
    if rank.mappings is None:
        return True
    return rank.mappings == tuple(
        expected_mapping(group, rank.dp_rank, round_robin=round_robin) for group in groups
    )


def expected_mapping(group: FlatGroup, rank: int, *, round_robin: bool) -> Addresses:
    """The param_slice_mappings entry that DeepSpeed writes for one rank and group."""
    return group.mapping(rank, group.in_turns if round_robin else group.in_order)
