"""Each rank's file against its place, and all of them against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpttools.containers.edit import alike
from ckpttools.containers.pickles import plain
from ckpttools.findings import ERROR, WARNING, Finding
from ckpttools.formats.engine import number_of
from ckpttools.formats.found import contradiction, found
from ckpttools.formats.rank_files import FLAT
from ckpttools.formats.rank_local import State, finding
from ckpttools.formats.zero.decode import Rank
from ckpttools.formats.zero.flat import FlatGroup
from ckpttools.formats.zero.join import ZeroFolder, expected_mapping
from ckpttools.formats.zero.read import MASTERS
from ckpttools.tensors import FLOAT32


def slice_mappings(folder: ZeroFolder) -> Iterator[Finding]:
    """Each rank names the parameter fragments that it owns: they must be those of its place."""
    for rank in folder.ranks:
        if rank.mappings is None:
            continue
        wanted = _mappings(folder, rank.dp_rank)
        if rank.mappings == wanted:
            continue
        owner = next((r.dp_rank for r in folder.ranks if rank.mappings == _mappings(folder, r.dp_rank)), None)
        if owner is not None:
            yield found(
                "rank-misplaced",
                rank.file.path,
                f"dp rank {rank.dp_rank}",
                f"the file holds the partition of dp rank {owner}, not of rank {rank.dp_rank}: "
                "it was swapped, copied over another or renamed",
            )
        else:
            group, name = _first_difference(rank, wanted)
            yield found(
                "mapping-mismatch",
                rank.file.path,
                f"param_slice_mappings[{group}]{'.' + name if name else ''}",
                "the fragments of this rank do not follow from the parameters' shapes and order",
            )


def _mappings(folder: ZeroFolder, dp_rank: int) -> tuple[Mapping[str, tuple[int, int]], ...]:
    return tuple(expected_mapping(group, dp_rank, round_robin=folder.round_robin) for group in folder.groups)


def _first_difference(rank: Rank, wanted: tuple[Mapping[str, tuple[int, int]], ...]) -> tuple[int, str]:
    assert rank.mappings is not None
    for g, (have, want) in enumerate(zip(rank.mappings, wanted, strict=False)):
        for name in {**have, **want}:
            if have.get(name) != want.get(name):
                return g, name
    return 0, ""


def paddings(folder: ZeroFolder) -> Iterator[Finding]:
    """group_paddings: each rank's own padding since DeepSpeed 0.16.4, all of it at the last rank before."""
    for rank in folder.ranks:
        if rank.paddings is None:
            continue
        own = tuple(group.padding(rank.dp_rank) for group in folder.groups)
        last = rank.dp_rank == len(folder.ranks) - 1
        at_last = tuple(group.total - group.used if last else 0 for group in folder.groups)
        if rank.paddings not in (own, at_last):
            yield found(
                "padding-mismatch",
                rank.file.path,
                "optimizer_state_dict.group_paddings",
                f"says {list(rank.paddings)}, the parameters' shapes make it {list(own)}",
            )


def masters(folder: ZeroFolder) -> Iterator[Finding]:
    """DeepSpeed keeps master weights in fp32, or, where it is told to, in the 16 bits of the weights."""
    weights = folder.model.weights
    dtypes = [{weights[name].dtype for name in names if name in weights} for names in folder.names]
    for rank in folder.ranks:
        for g, (view, of_weights) in enumerate(zip(rank.fp32, dtypes, strict=False)):
            dtype = view.ref.dtype
            if dtype is FLOAT32 or not of_weights or (dtype.itemsize == 2 and dtype in of_weights):
                continue
            theirs = " and ".join(sorted(map(str, of_weights)))
            yield found(
                "dtype-odd",
                rank.file.path,
                f"{MASTERS}[{g}]",
                f"master weights of {dtype}, where the weights are {theirs}",
                severity=ERROR,
            )


def moments(folder: ZeroFolder) -> Iterator[Finding]:
    """Every rank holds the same kinds of optimizer state, each as long as its partition if cut at all."""
    muon = _uses_muon(folder)  # whose momentum_buffer spans whole parameters
    for g, (group, states) in enumerate(zip(folder.groups, folder.states, strict=True)):
        every = {kind: leaf.path for state in states for kind, leaf in state.items()}
        for rank, state in zip(folder.ranks, states, strict=True):
            if lacking := every.keys() - state.keys():
                yield found(
                    "moment-missing",
                    rank.file.path,
                    f"group {g}",
                    f"dp rank {rank.dp_rank} lacks the optimizer state {_list(lacking)}, which others have",
                )
        tensors = {"exp_avg", "exp_avg_sq"} | {k for state in states for k, leaf in state.items() if leaf.ref}
        for kind, path in every.items():
            if kind in folder.partitioned[g]:
                continue
            for i, state in enumerate(states):
                if kind in tensors and kind in state and state[kind].ref is None:
                    yield found("moment-size", folder.ranks[i].file.path, f"group {g} {kind}", "is no tensor")
            lengths = {i: _length(state, kind) for i, state in enumerate(states)}
            fits = {i: n in _lengths(group, folder.ranks[i], g) for i, n in lengths.items()}
            alike = len(set(lengths.values())) == 1  # as long as one rank's lean partition by chance
            if (alike or not any(fits.values())) and (muon or path[-1] not in FLAT):
                continue  # DeepSpeed's rule: what has not the partition's length is carried as it is
            for i, numel in lengths.items():
                if numel is not None and not fits[i]:
                    yield found(
                        "moment-size",
                        folder.ranks[i].file.path,
                        f"group {g} {kind}",
                        f"has {numel} elements where the partition has {group.part}",
                    )


def _length(state: State, kind: str) -> int | None:
    """The length of a flat tensor; None for everything else."""
    ref = state[kind].ref if kind in state else None
    return ref.shape[0] if ref is not None and len(ref.shape) == 1 else None


def _lengths(group: FlatGroup, rank: Rank, g: int) -> set[int]:
    """How long a partition may be stored: with its padding, or without."""
    return {group.part, group.part - group.padding(rank.dp_rank), rank.fp32[g].shape[0]}


def _uses_muon(folder: ZeroFolder) -> bool:
    hyper = folder.ranks[0].hyper
    return hyper is not None and any("use_muon" in group for group in hyper)


def of_single_ranks(folder: ZeroFolder) -> Iterator[Finding]:
    """State that is neither cut over the ranks nor the same on all: it fits as many ranks only."""
    for each in folder.unaccounted():
        leaf = folder.states[each.group][each.rank].get(each.kind)
        own = len(leaf.path) == 1 and leaf.path[0] in {"step", *FLAT} if leaf is not None else True
        if leaf is None or (own and not _uses_muon(folder)):
            continue  # named by its own check
        yield finding(each, leaf, folder.ranks[each.rank].file.path, "group")


def second_moment(folder: ZeroFolder) -> Iterator[Finding]:
    """Adam keeps exp_avg_sq (Adamax: exp_inf) beside exp_avg; and what one group has, the others have."""
    first = folder.ranks[0]
    everywhere = {key for moments in first.moments for key in moments}
    for g, moments in enumerate(first.moments):
        lacking = everywhere - set(moments) if moments or len(first.moments) > 1 else set()
        if first.hyper is not None and "eps" in first.hyper[g] and "exp_avg" in moments:
            lacking |= {"exp_avg_sq"} - set(moments) if "exp_inf" not in moments else set()
        uses_muon = first.hyper is not None and any("use_muon" in group for group in first.hyper)
        if lacking and not uses_muon:
            yield found(
                "moment-missing",
                first.file.path,
                f"group {g}",
                f"has no {_list(lacking)}",
                severity=WARNING,
                hint="a group whose parameters never got a gradient looks so, and a damaged file",
            )


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def same_on_all_ranks(folder: ZeroFolder) -> Iterator[Finding]:
    """What is replicated must be equal: version, stage, hyper-parameters, scaler and Adam's step."""
    first = folder.ranks[0]
    for rank in folder.ranks[1:]:
        for name, mine, theirs in (
            ("ds_version", rank.ds_version, first.ds_version),
            ("zero_stage", rank.stage, first.stage),
            ("layout", rank.variant, first.variant),
            ("param_groups", _hyper(rank), _hyper(first)),
            ("param_alignment_paddings", rank.gaps, first.gaps),
            *(
                (key, plain(rank.state.get(key)), plain(first.state.get(key)))
                for key in ("loss_scaler", "dynamic_loss_scale", "clip_grad", "overflow")
            ),
        ):
            if not alike(mine, theirs):
                yield found(
                    "ranks-differ",
                    rank.file.path,
                    name,
                    f"rank {rank.dp_rank} says {_short(mine)}, rank 0 says {_short(theirs)}",
                )
        for name in sorted({*rank.state.names()} ^ {*first.state.names()}, key=str):
            has, lacks = (rank, first) if name in rank.state else (first, rank)
            yield found(
                "ranks-differ",
                lacks.file.path,
                f"optimizer_state_dict.{name}",
                f"rank {lacks.dp_rank} lacks what rank {has.dp_rank} has",
            )
        if not alike(plain(rank.root.get("ds_config")), plain(first.root.get("ds_config"))):
            yield contradiction(rank.file.path, "ds_config", "differs from that of rank 0")
        mine_step, first_step = steps(rank), steps(first)
        # a step that is not there at all is missing state, and named as that
        pairs = zip(mine_step, first_step, strict=True)
        if any(mine != theirs for mine, theirs in pairs if None not in (mine, theirs)):
            yield found(
                "step-mismatch",
                rank.file.path,
                f"dp rank {rank.dp_rank}",
                f"the shard is of optimizer step {_step(mine_step)}, rank 0 of {_step(first_step)}: "
                "they come from different saves",
            )


def _hyper(rank: Rank) -> object:
    return None if rank.hyper is None else [plain(group) for group in rank.hyper]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _step(values: tuple[float | None, ...]) -> str:
    known = sorted({int(v) for v in values if v is not None})
    return " and ".join(map(str, known)) or "0"


def steps(rank: Rank) -> tuple[float | None, ...]:
    """Adam's step per group, None where the optimizer has none (or has not stepped)."""
    found = (moments.get("step") for moments in rank.moments)
    views = ((node, rank.file.view(node)) for node in found)
    return tuple(number_of(node if view is None else view.ref) for node, view in views)
