"""Reading a ZeRO-3 tag folder: headers of every rank, joined into one logical checkpoint.

`tensors` are what the engine computes with: the master weights rounded to its dtype, as it makes them itself
on every load. Frozen parameters and buffers are as saved, buffers those of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from ckpttools.checkpoint import FP32, Checkpoint, FileRole, Layout, ParamGroup
from ckpttools.containers.nodes import decode
from ckpttools.containers.torch_file import TorchFile
from ckpttools.formats.deepspeed import SLICED, loss_scaler, slices
from ckpttools.formats.model_states import described, frozen_weights, read_stated
from ckpttools.formats.rank_files import role_of, roles_of_others, unchecked
from ckpttools.formats.zero3.decode import read_shard
from ckpttools.formats.zero3.join import Zero3Folder, assemble, gathered
from ckpttools.formats.zero3.names import find
from ckpttools.location import Location
from ckpttools.tensors import DTYPES, FLOAT32, DType, TensorRef
from ckpttools.tree import Key, Value


def read(folder: Location) -> Checkpoint:
    """Read a tag folder. Raises CkptError where a file is missing, damaged or contradicts the others."""
    files = find(folder)
    models = [read_stated(path, rank) for rank, path in files.model.items()]
    shards = [read_shard(path, rank) for rank, path in files.optim.items()]
    return checkpoint(assemble(files, models, shards))


def checkpoint(folder: Zero3Folder) -> Checkpoint:
    """The whole, unpartitioned."""
    model, shard = folder.models[0], folder.shards[0]
    masters = {n: r for s in range(len(folder.shapes)) for n, r in gathered(folder, s).items()}
    dtype = _dtype(folder)
    tensors = _tensors(folder, masters, dtype)
    version = model.ds_version or shard.ds_version
    layout = Layout(
        format="zero3",
        ranked=True,
        zero_stage=3,
        ranks=folder.ranks,
        dp_degree=folder.ranks,
        tag=folder.files.folder.name,
        dtype=dtype.short if dtype is not None else None,
        writer=f"DeepSpeed {version or '(version not recorded)'}",
    )
    return replace(
        described(model, tensors, layout, 3),
        groups=tuple(_group(folder, g, masters) for g in range(len(shard.groups))),
        files=tuple(_roles(folder)),
        checks=tuple(check for file in torch_files(folder) for check in file.checks()),
        notes=(*unchecked(list(torch_files(folder))), *slices(model.root.get(SLICED))),
        loss_scaler=loss_scaler(shard.file, shard.state.get("loss_scaler")),
        template=folder,
    )


def torch_files(folder: Zero3Folder) -> Iterator[TorchFile]:
    yield from (model.file for model in folder.models)
    yield from (shard.file for shard in folder.shards)


def _dtype(folder: Zero3Folder) -> DType | None:
    """The engine's, as module's placeholders have it; else what the prefix of the files says."""
    module = folder.models[0].weights
    found = next((module[name].dtype for name in folder.trainable if name in module), None)
    return found or (DTYPES["bfloat16"] if folder.files.prefix == "bf16_" else None)


def _tensors(folder: Zero3Folder, masters: dict[str, TensorRef], dtype: DType | None) -> dict[str, TensorRef]:
    """Every name of module in its order, then trained parameters that it lacks."""
    model, frozen = folder.models[0], frozen_weights(folder.models)

    def weight(name: str) -> TensorRef:
        have = model.weights.get(name)
        return masters[name].cast(have.dtype if have is not None else dtype or FLOAT32)

    out: dict[str, TensorRef] = {}
    for name, ref in model.weights.items():
        owner = model.shared.get(name, name)
        if owner in masters:
            out[name] = weight(owner)
        elif owner in frozen or ref.numel or owner == name:
            out[name] = frozen.get(owner, ref)
        # else a placeholder: exclude_frozen_parameters leaves out the owner alone
    return out | {name: weight(name) for name in masters if name not in out}


def _group(folder: Zero3Folder, g: int, masters: dict[str, TensorRef]) -> ParamGroup:
    """A parameter group: its sub-groups one after another."""
    shard = folder.shards[0]
    params: dict[str, tuple[int, ...]] = {}
    state: dict[str, dict[str, TensorRef]] = {FP32: {}}
    scalars: dict[str, dict[str, Value]] = {}
    paths: dict[str, tuple[Key, ...]] = {}
    for s in shard.members[g]:
        names = folder.shapes[s]
        params |= names
        state[FP32] |= {name: masters[name] for name in names}
        for kind, leaf in shard.states[s].items():
            if kind in folder.cut[s]:
                state.setdefault(kind, {}).update(gathered(folder, s, kind))
            else:
                scalars.setdefault(kind, {}).update(dict.fromkeys(names, leaf.value))
            if leaf.path != (kind,):
                paths[kind] = leaf.path
    hyper = {k: decode(shard.file, node) for k, node in shard.groups[g].named() if k != "params"}
    return ParamGroup(params=params, state=state, scalars=scalars, hyper=hyper, paths=paths)


def _roles(folder: Zero3Folder) -> Iterator[FileRole]:
    n = folder.ranks
    for model in folder.models:
        what = f"dp rank {model.dp_rank} of {n}: shapes, buffers, its parts of frozen weights, counters"
        yield role_of(model.file, what)
    for shard in folder.shards:
        what = f"dp rank {shard.dp_rank} of {n}: its parts of fp32 weights and optimizer state"
        yield role_of(shard.file, what)
    yield from roles_of_others(folder.files.others)
