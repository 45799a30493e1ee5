"""Writing a stage 0 folder: one file, from the Checkpoint alone.

DeepSpeed reads on load: `module` (strictly), `optimizer`, `lr_scheduler`, the counters, dp_world_size and
mp_world_size. `param_shapes` and `frozen_param_shapes`, which it keeps for the other stages, say here
which parameters the optimizer's numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from ckpttools.checkpoint import FP32, Checkpoint, Layout, ParamGroup
from ckpttools.containers.nodes import encode, encode_tensor
from ckpttools.containers.pickles import Dict, Node
from ckpttools.containers.torch_file import write_torch_file
from ckpttools.errors import escape
from ckpttools.formats.cutting import equal, no_groups, not_flat
from ckpttools.formats.deepspeed import frozen_shapes, kept_batch, new_root, shapes_node
from ckpttools.formats.notes import unsaid
from ckpttools.formats.rank_files import MODEL_NAME
from ckpttools.formats.torch_optimizer import separate, state_of
from ckpttools.formats.zero0.read import INNER, MASTERS, first_scaler
from ckpttools.plan import OutputFile, Plan
from ckpttools.tensors import DTYPES, FLOAT32, Chunk, TensorRef, join_chunks
from ckpttools.tree import Value

FLAT = "FusedAdam"  # the one class whose parameters the wrapper of 16 bits joins to a vector
SIXTEEN = (DTYPES["bfloat16"], DTYPES["float16"])
# fp16/loss_scaler.py: what DeepSpeed begins with
SCALE: Mapping[str, Value] = {"cur_scale": 65536.0, "last_overflow_iter": -1, "scale_factor": 2.0}
WINDOW = 1000


def plan(checkpoint: Checkpoint, layout: Layout) -> Plan:
    """The file of a tag folder; `layout.variant` is the optimizer class that will load it, where it is known.
    Raises Unsupported for state that a flat vector has no place for.
    """
    if not checkpoint.groups:
        raise no_groups(checkpoint)
    batch, notes = kept_batch(checkpoint, layout)
    settings = {**checkpoint.settings, **batch}
    trained = [name for group in checkpoint.groups for name in group.params]
    wrapped = any(checkpoint.tensors[name].dtype in SIXTEEN for name in trained if name in checkpoint.tensors)
    frozen = frozen_shapes(checkpoint)
    root = new_root(
        checkpoint,
        checkpoint.tensors if wrapped else checkpoint.best_copies(),
        ranks=layout.dp_degree,
        settings=settings,
        optimizer=_wrapper(checkpoint, layout) if wrapped else _optimizer(checkpoint),
        frozen_param_shapes=shapes_node(frozen) if frozen else None,
        frozen_param_fragments=None,
    )
    file: OutputFile = write_torch_file(MODEL_NAME, root)
    return Plan(files=(file,), notes=(*_notes(checkpoint, layout, wrapped), *notes), checks=checkpoint.checks)


def _notes(checkpoint: Checkpoint, layout: Layout, wrapped: bool) -> Iterator[str]:
    yield from unsaid(checkpoint)
    if wrapped and layout.variant != FLAT:
        yield (
            "the masters are a list of tensors, as every class but FusedAdam has them in stage 0: "
            "--optimizer-class FusedAdam joins them to a vector for each group"
        )
    kept = {"class", "dtype", "dynamic", "cur_scale", "cur_iter", "scale_window", *SCALE}
    first = first_scaler(checkpoint.settings.get("fp16"))
    other = {key for key, value in checkpoint.loss_scaler.items() if value != first.get(key)}
    if wrapped and (lost := other - kept):
        yield f"not kept of the loss scaler: {', '.join(map(escape, sorted(lost)))}"
    if checkpoint.loss_scaler and not wrapped and checkpoint.loss_scaler.get("dynamic") is not False:
        yield "not kept: the loss scaler, which stage 0 has in 16 bits alone"


def _optimizer(checkpoint: Checkpoint) -> Dict:
    """The state dict of the torch optimizer: numbers count on over the groups."""
    states: list[tuple[Node, Node]] = []
    groups: list[Node] = []
    first = 0
    for group in checkpoint.groups:
        for number, name in enumerate(group.params, first):
            if state := state_of(group, name):
                states.append((number, separate(state)))
        numbers: list[Value] = list(range(first, first + len(group.params)))
        groups.append(encode({**group.hyper, "params": numbers}))
        first += len(numbers)
    return Dict.of([("state", Dict.of(states)), ("param_groups", groups)])


def _wrapper(checkpoint: Checkpoint, layout: Layout) -> Dict:
    """The wrapper of 16 bits: the masters are the optimizer's parameters."""
    joined = layout.variant == FLAT
    masters = [_masters(checkpoint, group) for group in checkpoint.groups]
    values: list[tuple[Node, Node]] = [*_scale(checkpoint, layout).items()]
    if joined:
        kept = [_flat_state(checkpoint, group) for group in checkpoint.groups]
        groups: list[Node] = [encode({**g.hyper, "params": [i]}) for i, g in enumerate(checkpoint.groups)]
        states: list[tuple[Node, Node]] = [(i, separate(state)) for i, state in enumerate(kept) if state]
        inner = Dict.of([("state", Dict.of(states)), ("param_groups", groups)])
        flat: list[Node] = [encode_tensor(_join(refs.values()), {}) for refs in masters]
        clip = checkpoint.settings.get("gradient_clipping")
        values += [(INNER, inner), (MASTERS[1], flat)]
        values.append(("clip_grad", clip if isinstance(clip, float | int) else 0.0))
    else:
        lists: list[Node] = [[encode_tensor(ref, {}) for ref in refs.values()] for refs in masters]
        values += [(INNER, _optimizer(checkpoint)), (MASTERS[0], lists)]
    return Dict.of(values)


def _masters(checkpoint: Checkpoint, group: ParamGroup) -> dict[str, TensorRef]:
    kept = group.state.get(FP32, {})
    return {name: kept.get(name) or checkpoint.tensors[name].cast(FLOAT32) for name in group.params}


def _scale(checkpoint: Checkpoint, layout: Layout) -> dict[str, Node]:
    """The loss scale's fields as the wrapper has them; it fails to load without them."""
    known, steps = checkpoint.loss_scaler, checkpoint.training.step or 0
    if not known and layout.dtype != "fp16":
        known = {"dynamic": False, "cur_scale": 1.0}
    dynamic = known.get("dynamic") is not False
    found: dict[str, Value] = {"cur_iter": steps, "scale_window": WINDOW, **SCALE, **known}
    keys = ["cur_scale", "cur_iter", *(["last_overflow_iter", "scale_factor", "scale_window"] * dynamic)]
    return {"dynamic_loss_scale": dynamic, **{key: encode(found[key]) for key in keys}}


def _flat_state(checkpoint: Checkpoint, group: ParamGroup) -> dict[str, Value]:
    """What one vector for the whole group has for state: the parameters' one after another, one of each
    number."""
    out: dict[str, Value] = {}
    for kind, values in group.scalars.items():
        one = next(iter(values.values()))
        if values.keys() != group.params.keys() or any(not equal(one, each) for each in values.values()):
            raise not_flat(checkpoint, kind, "is not the same for all parameters of a group")
        out[kind] = one
    for kind, refs in group.state.items():
        whole = all(n in refs and refs[n].numel == math.prod(s) for n, s in group.params.items())
        if not whole or len({ref.dtype for ref in refs.values()}) > 1:
            raise not_flat(checkpoint, kind, "is not of the shape of all parameters of a group")
        if kind != FP32:
            out[kind] = _join(refs[name] for name in group.params)
    return out


def _join(refs: Iterable[TensorRef]) -> TensorRef:
    """One vector of some tensors, one after another."""
    found = list(refs)
    chunks: list[Chunk] = [chunk for ref in found for chunk in ref.flat(0, ref.numel).chunks]
    dtype = found[0].dtype if found else FLOAT32
    return TensorRef(dtype, (sum(ref.numel for ref in found),), join_chunks(chunks))
