"""The layout to be written: flat groups for a number of ranks, and the values that fill them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property

from msgspec import Struct

from ckpttools.checkpoint import FP32, Checkpoint, Layout, ParamGroup
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats import rank_local
from ckpttools.formats.cutting import equal, no_groups, not_flat
from ckpttools.formats.deepspeed import reordered
from ckpttools.formats.zero.flat import FlatGroup, Slices, alignment_gaps
from ckpttools.formats.zero.join import ZeroFolder
from ckpttools.tensors import FLOAT32, Chunk, TensorRef, Zeros, join_chunks
from ckpttools.tree import Value

ALIGNED_BYTES = 16  # zero_optimization.parameter_alignment: each parameter starts on such a multiple


class Target(Struct, frozen=True, kw_only=True, dict=True):
    """What the files of a folder are made from. `template` is the folder that was read, where there is
    one."""

    checkpoint: Checkpoint
    layout: Layout
    template: ZeroFolder | None
    groups: tuple[FlatGroup, ...]
    flat: tuple[Mapping[str, TensorRef], ...]  # per group: kind -> the whole flat vector, padded
    shared: tuple[Mapping[str, Value], ...]  # per group: kind -> the value that each rank carries
    origin: tuple[int | None, ...]  # per group: the template's group of the same parameters

    @cached_property
    def slices(self) -> tuple[Slices, ...]:
        """Per group: where its parameters lie, for the ranks' mappings."""
        params = (tuple(group.params) for group in self.checkpoint.groups)
        return tuple(group.slices(names) for group, names in zip(self.groups, params, strict=True))

    @property
    def ranks(self) -> int:
        return self.layout.dp_degree

    @property
    def lean(self) -> bool:
        """Whether fp32 partitions are shown without their padding: all layouts but BF16_Optimizer."""
        return self.layout.variant != "BF16_Optimizer"


def target(checkpoint: Checkpoint, layout: Layout) -> Target:
    """Raises Unsupported for state that cannot be cut over ranks, before anything is written."""
    template = checkpoint.template if isinstance(checkpoint.template, ZeroFolder) else None
    if not checkpoint.groups:
        raise no_groups(checkpoint)
    if layout.variant == "elastic":
        raise Unsupported(
            "elastic",
            "saved with elastic_checkpoint: true, which leaves out the optimizer's settings",
            where=checkpoint.path,
            why="lr, betas and weight_decay are not in the files, and current DeepSpeed cannot load its own "
            "elastic checkpoints: whatever was written could not be resumed",
            hint="extract the weights (ckpt extract --weights-only), or save without elastic_checkpoint",
        )
    if template is not None:
        rank_local.refuse(template.unaccounted(), template.rank_files, "group")
    origin = tuple(_origin(template, group) for group in checkpoint.groups)
    groups = tuple(
        _layout(checkpoint, layout, template, group, found)
        for group, found in zip(checkpoint.groups, origin, strict=True)
    )
    pairs = list(zip(checkpoint.groups, groups, strict=True))
    return Target(
        checkpoint=checkpoint,
        layout=layout,
        template=template,
        groups=groups,
        flat=tuple(dict(_vectors(checkpoint, group, flat)) for group, flat in pairs),
        shared=tuple(dict(_shared(checkpoint, g, group)) for g, group in enumerate(checkpoint.groups)),
        origin=origin,
    )


def _origin(template: ZeroFolder | None, group: ParamGroup) -> int | None:
    if template is None:
        return None
    return next((g for g, names in enumerate(template.names) if set(names) == set(group.params)), None)


def _layout(
    checkpoint: Checkpoint, layout: Layout, template: ZeroFolder | None, group: ParamGroup, origin: int | None
) -> FlatGroup:
    """One group over the ranks: round-robin permuted, alignment gaps recomputed."""
    names = tuple(group.params)
    order = tuple(reordered(names, layout.dp_degree)) if layout.round_robin else names
    sizes = tuple(math.prod(group.params[name]) for name in order)
    gaps = (0,) * len(order)
    if layout.aligned:
        gaps = alignment_gaps(sizes, ALIGNED_BYTES // _itemsize(checkpoint, group))
    old = template.groups[origin] if template is not None and origin is not None else None
    multiple = old.alignment // old.ranks if old is not None else 2  # 1 up to DeepSpeed 0.5.1
    return FlatGroup(
        names=order, numels=sizes, gaps=gaps, ranks=layout.dp_degree, alignment=multiple * layout.dp_degree
    )


def _itemsize(checkpoint: Checkpoint, group: ParamGroup) -> int:
    sizes = {checkpoint.tensors[n].dtype.itemsize for n in group.params if n in checkpoint.tensors}
    if len(sizes) != 1:
        raise CkptError(
            "alignment-unknown",
            "parameter_alignment is on, but the model's dtype is not the same everywhere",
            where=checkpoint.path,
            why="the alignment is in bytes, so where a parameter begins depends on its dtype",
        )
    return sizes.pop()


def _vectors(checkpoint: Checkpoint, group: ParamGroup, flat: FlatGroup) -> Iterator[tuple[str, TensorRef]]:
    """The group's flat vectors by kind, master weights first."""
    masters = group.state.get(FP32)
    if masters is None:
        missing = [name for name in group.params if name not in checkpoint.tensors]
        if missing:
            raise _incomplete(checkpoint, FP32, missing[0])
        masters = {name: checkpoint.tensors[name].cast(FLOAT32) for name in group.params}
    yield FP32, _flat(checkpoint, FP32, flat, masters)
    for kind, refs in group.state.items():
        if kind != FP32:
            yield kind, _flat(checkpoint, kind, flat, refs)


def _flat(checkpoint: Checkpoint, kind: str, flat: FlatGroup, refs: Mapping[str, TensorRef]) -> TensorRef:
    """One kind joined in flat order, gaps and tail filled with zeros."""
    lacking = next((name for name in flat.names if name not in refs), None)
    if lacking is not None:
        raise _incomplete(checkpoint, kind, lacking)
    dtypes = {refs[name].dtype for name in flat.names}
    if len(dtypes) > 1 or not all(dtype.is_float for dtype in dtypes):
        raise not_flat(
            checkpoint, kind, f"has the element types {', '.join(sorted(d.short for d in dtypes))}"
        )
    dtype = next(iter(dtypes), FLOAT32)
    chunks: list[Chunk] = []
    for name, numel, gap in zip(flat.names, flat.numels, flat.gaps, strict=True):
        if refs[name].numel != numel:
            raise not_flat(checkpoint, kind, f"of {name} is not of the parameter's shape")
        chunks += refs[name].chunks
        chunks.append(Zeros(gap * dtype.itemsize))
    chunks.append(Zeros((flat.total - flat.used) * dtype.itemsize))
    return TensorRef(dtype, (flat.total,), join_chunks(chunks))


def _shared(checkpoint: Checkpoint, g: int, group: ParamGroup) -> Iterator[tuple[str, Value]]:
    """What stands once for a whole flat group: it must be the same for all of its parameters."""
    for kind, values in group.scalars.items():
        found = [values[name] for name in group.params if name in values]
        if not found:
            continue
        if len(found) < len(group.params):
            lacking = next(name for name in group.params if name not in values)
            raise _incomplete(checkpoint, kind, lacking)
        if any(not equal(found[0], value) for value in found[1:]):
            raise not_flat(checkpoint, kind, f"differs between the parameters of group {g}")
        yield kind, found[0]


def _incomplete(checkpoint: Checkpoint, kind: str, name: str) -> CkptError:
    return Unsupported(
        "state-incomplete",
        f"{escape(name)} has no '{escape(kind)}', which other parameters of its group have",
        where=checkpoint.path,
        why="ZeRO keeps one flat vector for a group: it has no place for a parameter without state",
        hint="never trained, or of a shape for which its class keeps other state? leave the optimizer's "
        "state out, or extract the weights",
    )
