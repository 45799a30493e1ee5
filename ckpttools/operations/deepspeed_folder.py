"""A Checkpoint as a new DeepSpeed folder: fp32 masters, a plain layout, a tag, and the file that names it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import compress

from msgspec.structs import replace

from ckpttools.checkpoint import FP32, PARAM_NAMES, STEP, Checkpoint, Layout, ParamGroup, common_dtype
from ckpttools.errors import Unsupported, escape, some
from ckpttools.formats import PLANS
from ckpttools.formats.deepspeed import LR_SCHEDULER, NEW_SCALER, OWN_KEYS, SLICED
from ckpttools.formats.engine import number_of
from ckpttools.plan import Literal, OutputFile, Plan
from ckpttools.tensors import BFLOAT16, FLOAT16, FLOAT32, DType, TensorRef
from ckpttools.transforms.cast import cast, castable
from ckpttools.tree import Value, at, put

UNIVERSAL = "universal"
# of zero_optimization: what decides the order and the gaps in flat groups, and is off in what is written
ORDERS = ("round_robin_gradients", "parameter_alignment")
_ROUNDED = (
    "master weights are made from those of {}, as the source has no others: verify warns of it until "
    "training changes them"
)
PER_GROUP = {
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "max_lrs",
    "min_lrs",
}  # in torch's schedulers


def prepared(checkpoint: Checkpoint, to: str, ranks: int, dtype: DType | None) -> tuple[Checkpoint, Layout]:
    """What the folder's format is to write, and how: masters from the best copy, weights in `dtype`."""
    checkpoint = _counted(_whole(_of_32_bits(_of_the_client(checkpoint))))
    best, old = checkpoint.best_copies(), checkpoint.layout
    odd = (n for group in checkpoint.groups for n in group.params if not castable(best[n].dtype))
    if to != "zero0" and (name := next(odd, None)) is not None:
        raise Unsupported(
            "dtype-odd",
            f"{escape(name)}, which is trained, is {best[name].dtype}",
            where=checkpoint.path,
            why="DeepSpeed trains floating point numbers of 16 or 32 bits, with masters of 32",
            hint="pt and dcp keep it as it is; --exclude leaves it out",
        )
    groups = tuple(
        replace(
            group,
            state={FP32: {n: _master(best[n]) for n in group.params}, **moments(group)},
            # an optimizer that has names keeps its own, and here they would be a setting of each group
            hyper={key: value for key, value in group.hyper.items() if key != PARAM_NAMES},
        )
        for group in checkpoint.groups
        # DeepSpeed leaves out groups without any, and loads as many as are left; stage 3 keeps those that are
        # frozen whole
        if group.params or (to == "zero3" and old.zero_stage == 3)
    )
    if empty := len(checkpoint.groups) - len(groups):
        note = f"{empty} parameter groups without parameters are left out, as DeepSpeed does"
        every = [bool(group.params) for group in checkpoint.groups]
        state = replace(checkpoint.training, scheduler=_of_groups(checkpoint.training.scheduler, every))
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note), training=state)
    if rounded := {best[n].dtype.short for group in groups for n in group.params} & {"bf16", "fp16"}:
        note = _ROUNDED.format(" and ".join(sorted(rounded)))
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    trained = {name for group in groups for name in group.params}
    if dtype is not None:
        checkpoint = _cast(checkpoint, dtype, trained)
    if to in ("zero0", "zero3"):
        checkpoint = _of_one_dtype(checkpoint, trained)
    stage = None if to == UNIVERSAL else int(to.removeprefix("zero"))
    settings = checkpoint.settings
    if stage is not None and at(settings, "zero_optimization", "stage") is not None:
        settings = put(settings, ("zero_optimization", "stage"), stage)
    for key in ORDERS:
        if at(settings, "zero_optimization", key) is True:
            settings = put(settings, ("zero_optimization", key), False)
    state = checkpoint.training
    if old.zero_stage is None:
        if stage is not None:  # no number of ranks to keep the batch of
            old = replace(old, dp_degree=ranks)
        if (
            isinstance(state.scheduler, Mapping) and state.scheduler
        ):  # from there the engine loads whichever scheduler it was given
            state = replace(state, keys={**state.keys, "scheduler": LR_SCHEDULER})
    engine = common_dtype({n: ref for n, ref in checkpoint.tensors.items() if n in trained})
    checkpoint = _scaled(checkpoint, to, old.dtype, engine)
    made = replace(checkpoint, groups=groups, settings=settings, layout=old, training=state, template=None)
    tag = f"global_step{state.step or 0}{'_universal' if stage is None else ''}"
    layout = Layout(
        format=to,
        zero_stage=stage,
        dp_degree=ranks,
        tag=tag,
        dtype=engine,
        writer=old.writer,
    )
    return made, layout


def _of_the_client(checkpoint: Checkpoint) -> Checkpoint:
    """Without values of training code under names that the engine has for its own: it would load these."""
    taken = [key for key in checkpoint.client if key in OWN_KEYS and key != SLICED]
    if not taken:
        return checkpoint
    client = {key: value for key, value in checkpoint.client.items() if key not in taken}
    note = f"not written: {some(taken)} among the client's values, as DeepSpeed keeps its own under the name"
    return replace(checkpoint, client=client, notes=(*checkpoint.notes, note))


def _whole(checkpoint: Checkpoint) -> Checkpoint:
    """With the weights of which masters alone are there: what was frozen after the engine was built, and left
    out (exclude_frozen_parameters).
    """
    masters = {n: ref for n, ref in checkpoint.best_copies().items() if n not in checkpoint.tensors}
    if not masters:
        return checkpoint
    engine = next((each for each in (BFLOAT16, FLOAT16) if each.short == checkpoint.layout.dtype), FLOAT32)
    note = f"{len(masters)} weights are made from their masters, the first {escape(next(iter(masters)))}"
    tensors = {**checkpoint.tensors, **{n: ref.cast(engine) for n, ref in masters.items()}}
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _counted(checkpoint: Checkpoint) -> Checkpoint:
    """With the updates that the optimizer has counted as the engine's, where nothing else says how many: the
    engine loads no folder without.
    """
    first = ([*group.scalars.get(STEP, {}).values()][:1] for group in checkpoint.groups)
    steps = [n for values in first for value in values if (n := number_of(value)) is not None]
    if checkpoint.training.step is not None or not steps or not 0 <= max(steps) < 2**53:
        return checkpoint
    step = int(max(steps))
    note = f"global_steps is {step}, which the optimizer has counted: nothing else says it"
    state = replace(checkpoint.training, step=step)
    return replace(checkpoint, training=state, notes=(*checkpoint.notes, note))


def _of_groups(value: Value, kept: Sequence[bool]) -> Value:
    """A scheduler's state without the rates of groups that are left out: they go to groups by their place."""
    if isinstance(value, list):
        return [_of_groups(inner, kept) for inner in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: list(compress(inner, kept))
        if key in PER_GROUP and isinstance(inner, list) and len(inner) == len(kept)
        else _of_groups(inner, kept)
        for key, inner in value.items()
    }


def _scaled(checkpoint: Checkpoint, to: str, before: str | None, dtype: str | None) -> Checkpoint:
    """With the loss scaler of an engine of the dtype: it takes the file's, whatever its configuration says,
    and one that does not scale lets the gradients of fp16 vanish.
    """
    known = checkpoint.loss_scaler
    dynamic = known.get("dynamic") is True
    if dtype == "fp16" and (not known or (before != "fp16" and not dynamic)):
        made: Mapping[str, Value] = {} if to == "zero0" else NEW_SCALER  # it fills in the same
        note = "the loss scale begins at 65536, DeepSpeed's default: a load takes it over ds_config's"
    elif dtype in ("bf16", "fp32") and dynamic:
        made, note = {}, "not kept: the loss scale, which DeepSpeed has in fp16 alone"
    else:
        return checkpoint
    return replace(checkpoint, loss_scaler=made, notes=(*checkpoint.notes, note))


def _of_32_bits(checkpoint: Checkpoint) -> Checkpoint:
    """Masters have 32 bits at most: weights of 64 that are trained become as wide."""
    trained = {name for group in checkpoint.groups for name in group.params}
    wide = {
        name: ref.cast(FLOAT32)
        for name, ref in checkpoint.tensors.items()
        if ref.dtype.name == "float64" and checkpoint.shared.get(name, name) in trained
    }
    if not wide:
        return checkpoint
    note = f"{len(wide)} weights of 64 bits become fp32, as masters are: the first {escape(next(iter(wide)))}"
    tensors = {**checkpoint.tensors, **wide}
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _cast(checkpoint: Checkpoint, dtype: DType, trained: Collection[str]) -> Checkpoint:
    """Parameters in the engine's dtype, everything else as it is: engines keep buffers in their own."""
    made = cast(checkpoint, dtype)
    params = {*trained, *checkpoint.frozen, *checkpoint.shared}
    tensors = {n: made.tensors[n] if n in params else ref for n, ref in checkpoint.tensors.items()}
    return replace(made, tensors=tensors)


def _of_one_dtype(checkpoint: Checkpoint, trained: Collection[str]) -> Checkpoint:
    """ZeRO-3 keeps masters alone of what is trained, which the engine rounds to the one dtype that it has:
    that of the first. Stage 0 has masters or none, by that dtype.
    """
    tensors, best = checkpoint.tensors, checkpoint.best_copies()
    own = [name for name in tensors if checkpoint.shared.get(name, name) in trained]
    one = tensors[own[0]].dtype if own else FLOAT32
    other = [name for name in own if tensors[name].dtype is not one]
    if not other:
        return checkpoint
    note = (
        f"{len(other)} weights become {one.short}, the engine's one dtype (their masters stay fp32): the "
        f"first, {escape(other[0])}, is {tensors[other[0]].dtype.short}; --dtype chooses it"
    )
    made = {name: best[name].cast(one) for name in other}
    return replace(checkpoint, tensors={**tensors, **made}, notes=(*checkpoint.notes, note))


def plan(checkpoint: Checkpoint, layout: Layout) -> Plan:
    """The folder with the tag's files in it, and `latest` or `latest_universal`."""
    inner = PLANS[layout.format](checkpoint, layout)
    tag = layout.tag or ""
    pointer = "latest_universal" if layout.format == UNIVERSAL else "latest"
    files = tuple(replace(file, path=f"{tag}/{file.path}") for file in inner.files)
    return replace(inner, files=(*files, OutputFile(path=pointer, segments=(Literal(tag.encode()),))))


def _master(ref: TensorRef) -> TensorRef:
    return ref.cast(FLOAT32) if castable(ref.dtype) else ref


def moments(group: ParamGroup) -> dict[str, dict[str, TensorRef]]:
    """The optimizer's state without the master weights."""
    return {kind: dict(refs) for kind, refs in group.state.items() if kind != FP32}
