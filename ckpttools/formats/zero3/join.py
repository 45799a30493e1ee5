"""All files of a ZeRO-3 folder together: do the ranks fit, and where is each parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from msgspec import Struct

from ckpttools.containers import fields
from ckpttools.errors import CkptError, some
from ckpttools.formats.found import ONE_SAVE
from ckpttools.formats.model_states import ModelStates, Shapes, refuse_experts
from ckpttools.formats.rank_files import optim_name
from ckpttools.formats.rank_local import Leaf, Unaccounted, unaccounted
from ckpttools.formats.zero3.cuts import held, starts
from ckpttools.formats.zero3.decode import Shard
from ckpttools.formats.zero3.names import Zero3Files, model_name
from ckpttools.location import Location
from ckpttools.tensors import TensorRef, join_chunks


class Zero3Folder(Struct, frozen=True, kw_only=True):
    """A whole tag folder, decoded."""

    files: Zero3Files
    models: tuple[ModelStates, ...]
    shards: tuple[Shard, ...]
    shapes: tuple[Shapes, ...]  # per sub-group
    cut: tuple[tuple[str, ...], ...]  # per sub-group: the kinds of state that are cut over the ranks

    @property
    def ranks(self) -> int:
        return len(self.shards)

    @property
    def rank_files(self) -> tuple[Location, ...]:
        return tuple(shard.file.path for shard in self.shards)

    def unaccounted(self) -> Iterator[Unaccounted]:
        """The optimizer's state that fits this number of ranks only; reads what is replicated."""
        for s, cut in enumerate(self.cut):
            yield from unaccounted(s, [shard.states[s] for shard in self.shards], cut)

    @property
    def trainable(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for shapes in self.shapes for name, shape in shapes.items()}


def check_complete(files: Zero3Files, models: Sequence[ModelStates], shards: Sequence[Shard]) -> int:
    """How many ranks there are: every one from 0 on, as many as the files say. Raises CkptError otherwise."""
    stated = {each.dp_world_size for each in models} | {each.partition_count for each in shards}
    known = {n for n in stated if n is not None}
    if len(known) > 1:
        raise CkptError(
            "rank-count",
            f"the files were saved with {' and '.join(map(str, sorted(known)))} ranks",
            where=files.folder,
            why="they do not belong to one save",
            hint=ONE_SAVE,
        )
    last = max(*files.model, *files.optim)
    count = known.pop() if known else fields.ranks(files.folder, last + 1, "the number in a file's name") or 1
    for have, name in ((files.model, model_name), (files.optim, lambda r: optim_name(r, files.prefix))):
        missing = [rank for rank in range(count) if rank not in have]
        if missing:
            raise CkptError(
                "shard-missing",
                f"no {'model' if have is files.model else 'optimizer'} file of dp rank "
                f"{some(missing)} of {count}",
                where=files.folder,
                why="without it the parts of every parameter that the rank held cannot be restored",
                hint=f"copy {name(missing[0])} from the node that ran rank {missing[0]}",
            )
        extra = [rank for rank in have if rank >= count]
        if extra:
            raise CkptError(
                "shard-extra",
                f"files of dp rank {some(extra)} where the files say {count} ranks",
                where=files.folder,
                why="they are left over from another save; DeepSpeed's converters trip over them",
                hint="move the extra files out of the folder",
            )
    return count


def assemble(files: Zero3Files, models: Sequence[ModelStates], shards: Sequence[Shard]) -> Zero3Folder:
    """Fit the ranks together. Raises CkptError where a parameter's bytes cannot be located for certain."""
    refuse_experts(models[0].file.path, models[0].root)
    count = check_complete(files, models, shards)
    shapes = models[0].shapes
    for model in models:
        if [list(each.items()) for each in model.shapes] != [list(each.items()) for each in shapes]:
            raise CkptError(
                "shape-mismatch",
                f"rank {model.dp_rank} describes other parameters than rank 0",
                where=model.file.path,
                why="the files belong to different models or saves",
                hint=ONE_SAVE,
            )
    for shard in shards:
        _check_sizes(shard, shapes, count)
    first = shards[0]
    cut = tuple(
        tuple(kind for kind in first.states[s] if all(is_cut(shard, s, kind) for shard in shards))
        for s in range(len(shapes))
    )
    return Zero3Folder(files=files, models=tuple(models), shards=tuple(shards), shapes=shapes, cut=cut)


def _check_sizes(shard: Shard, shapes: Sequence[Shapes], ranks: int) -> None:
    if len(shard.fp32) != len(shapes):
        raise CkptError(
            "group-count",
            f"the model file describes {len(shapes)} sub-groups, the rank holds {len(shard.fp32)}",
            where=shard.file.path,
            why="the files do not belong to one save",
            hint=ONE_SAVE,
        )
    if sorted(s for members in shard.members for s in members) != list(range(len(shapes))):
        raise fields.bad_field(
            shard.file.path,
            "optimizer_state_dict.optimizer_state_dict.param_groups",
            f"does not name each of the {len(shapes)} sub-groups once",
        )
    for s, ref in enumerate(shard.fp32):
        wanted = starts([math.prod(shape) for shape in shapes[s].values()], ranks)[-1]
        if ref.numel != wanted:
            raise CkptError(
                "partition-size",
                f"sub-group {s}: its parameters over {ranks} ranks make parts of {wanted} elements, but rank "
                f"{shard.dp_rank} holds {ref.numel}",
                where=shard.file.path,
                why="the file belongs to another model, another save or another rank",
                hint=ONE_SAVE,
            )


def is_cut(shard: Shard, s: int, kind: str) -> bool:
    """DeepSpeed's own rule: a flat tensor as long as the master weights is cut over the ranks."""
    leaf = shard.states[s].get(kind)
    ref = leaf.value if leaf is not None else None
    return isinstance(ref, TensorRef) and len(ref.shape) == 1 and ref.shape == shard.fp32[s].shape


def gathered(folder: Zero3Folder, s: int, kind: str | None = None) -> dict[str, TensorRef]:
    """Every parameter of a sub-group put together: its master weights, or another kind of its state."""
    numels = [math.prod(shape) for shape in folder.shapes[s].values()]
    places = starts(numels, folder.ranks)
    vectors = [shard.fp32[s] if kind is None else _tensor(shard.states[s][kind]) for shard in folder.shards]
    for shard, vector in zip(folder.shards, vectors, strict=True):
        if vector.dtype is not vectors[0].dtype:
            raise fields.bad_field(
                shard.file.path,
                f"optimizer_state_dict {kind or 'fp32'} of sub-group {s}",
                f"is {vector.dtype} where rank 0 has {vectors[0].dtype}",
            )
    out: dict[str, TensorRef] = {}
    for (name, shape), numel, start in zip(folder.shapes[s].items(), numels, places, strict=False):
        parts = [v.flat(start, held(numel, folder.ranks, r)) for r, v in enumerate(vectors)]
        out[name] = TensorRef(vectors[0].dtype, shape, join_chunks(c for part in parts for c in part.chunks))
    return out


def _tensor(leaf: Leaf) -> TensorRef:
    assert isinstance(leaf.value, TensorRef)  # a kind that is cut is a tensor on every rank
    return leaf.value
