"""Reading a ZeRO-1/2 tag folder: headers of every rank, joined into one logical checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from msgspec.structs import replace

from ckpttools.checkpoint import FP32, Checkpoint, FileRole, Layout, ParamGroup
from ckpttools.containers import fields
from ckpttools.containers.nodes import decode
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import escape
from ckpttools.formats.deepspeed import SLICED, loss_scaler, slices
from ckpttools.formats.model_states import ModelStates, described, read_model
from ckpttools.formats.rank_files import role_of, roles_of_others, unchecked
from ckpttools.formats.zero.decode import Rank, read_rank
from ckpttools.formats.zero.join import ZeroFolder, assemble, zero_settings
from ckpttools.formats.zero.names import find
from ckpttools.location import Location
from ckpttools.tensors import FLOAT32, Flat, TensorRef, cat
from ckpttools.tree import Value

MASTERS = "optimizer_state_dict.single_partition_of_fp32_groups"


def read(folder: Location) -> Checkpoint:
    """Read a tag folder. Raises CkptError where a file is missing, damaged or contradicts the others."""
    files = find(folder)
    model = read_model(files.model)
    ranks: list[Rank] = []
    for number, path in files.optim.items():
        ranks.append(alike(read_rank(path, number), ranks))
    return checkpoint(assemble(files, model, tuple(ranks)))


def alike(rank: Rank, ranks: Sequence[Rank]) -> Rank:
    """The same rank, without a copy of what each one lists for all parameters: the first has it."""
    first = ranks[0] if ranks else rank
    if rank.gaps != first.gaps:
        return rank
    mine, kept = (each.state.get("param_alignment_paddings") for each in (rank, first))
    if isinstance(mine, list) and isinstance(kept, list):
        mine[:] = kept
    return replace(rank, gaps=first.gaps)


def checkpoint(folder: ZeroFolder) -> Checkpoint:
    """The whole, unpartitioned: flat groups joined over the ranks and cut at the parameters."""
    model, ranks = folder.model, folder.ranks
    stage = next((rank.stage for rank in ranks if rank.stage is not None), None)
    variant = ranks[0].variant
    layout = Layout(
        format=f"zero{stage or 1}",
        ranked=True,
        zero_stage=stage,
        ranks=len(ranks),
        dp_degree=len(ranks),
        tag=folder.files.folder.name,
        dtype=_dtype(model, folder.shapes),
        writer=f"DeepSpeed {model.ds_version or ranks[0].ds_version or '(version not recorded)'}",
        variant={"rigid": None, "bf16_optimizer": "BF16_Optimizer", "elastic": "elastic"}[variant],
        round_robin=folder.round_robin,
        aligned=_is_aligned(folder),
    )
    return replace(
        described(model, model.weights, layout, stage or 1),
        shared=model.shared,
        frozen=model.frozen,
        groups=tuple(_param_group(folder, g) for g in range(len(folder.groups))),
        files=tuple(_roles(folder)),
        checks=tuple(check for file in torch_files(folder) for check in file.checks()),
        notes=tuple(_notes(folder)),
        loss_scaler=loss_scaler(ranks[0].file, ranks[0].state.get("loss_scaler")),
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
    kinds = folder.partitioned[g]
    first = folder.states[g][0]
    names = folder.names[g]
    return ParamGroup(
        params={name: folder.shapes[g][name] for name in names},
        state={kind: _cut(folder, g, kind) for kind in (FP32, *kinds)},
        # one flat parameter stands for all of the group: they share what is not cut
        scalars={kind: dict.fromkeys(names, leaf.value) for kind, leaf in first.items() if kind not in kinds},
        paths={kind: leaf.path for kind, leaf in first.items() if leaf.path != (kind,)},
        hyper=_hyper(folder.ranks[0], g),
    )


def _hyper(rank: Rank, g: int) -> dict[str, Value]:
    """A group's settings as saved; without the index of its flat parameter."""
    if rank.hyper is None:
        return {}
    return {key: decode(rank.file, node) for key, node in rank.hyper[g].named() if key != "params"}


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
    refs = [vector(folder, rank, g, key) for rank in range(len(folder.ranks))]
    dtypes = {ref.dtype for ref in refs}
    expected = FLOAT32 if FLOAT32 in dtypes else refs[0].dtype  # the usual one is seldom the wrong one
    for rank, ref in zip(folder.ranks, refs, strict=True):
        if ref.dtype is not expected:
            raise fields.bad_field(
                rank.file.path,
                f"{MASTERS}[{g}]" if key == FP32 else f"optimizer_state_dict {key} of group {g}",
                f"is {ref.dtype} where other ranks have {expected}",
            )
    return cat(refs, expected)


def vector(folder: ZeroFolder, rank: int, g: int, kind: str) -> TensorRef:
    """One rank's partition of the master weights or of another kind, as stored."""
    if kind != FP32:
        ref = folder.states[g][rank][kind].ref
        assert ref is not None  # a partitioned kind is a tensor on every rank
        return ref
    view = folder.ranks[rank].fp32[g]
    if not view.dtype.is_float:
        raise fields.bad_field(
            folder.ranks[rank].file.path,
            f"{MASTERS}[{g}]",
            f"is {view.dtype} where floating point weights are expected",
        )
    return view.ref


def _roles(folder: ZeroFolder) -> Iterator[FileRole]:
    yield role_of(
        folder.model.file, "weights in the training dtype, parameter shapes, counters, client state"
    )
    n = len(folder.ranks)
    for rank in folder.ranks:
        what = f"dp rank {rank.dp_rank} of {n}: its partition of fp32 weights and optimizer state"
        yield role_of(rank.file, what)
    yield from roles_of_others(folder.files.others)


def _notes(folder: ZeroFolder) -> Iterator[str]:
    yield from unchecked(list(torch_files(folder)))
    yield from slices(folder.model.root.get(SLICED))
    if folder.round_robin:
        yield "round_robin_gradients: the flat order depends on the number of ranks"
    missing = [name for group in folder.shapes for name in group if name not in folder.model.weights]
    if missing:
        yield f"{len(missing)} trainable parameters are not in module, the first {escape(missing[0])}"


def _is_aligned(folder: ZeroFolder) -> bool:
    """Whether zero_optimization.parameter_alignment was on. A model may need no gaps for it."""
    if any(any(group.gaps) for group in folder.groups):
        return True
    zero = zero_settings(folder.ranks[0].root.get("ds_config"))
    return zero is not None and zero.get("parameter_alignment") is True
