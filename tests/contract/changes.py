"""Changes of a checkpoint that every format must write, and the comparison of two checkpoints by content."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from msgspec.structs import replace

from ckpttools import tree
from ckpttools.checkpoint import Checkpoint, ParamGroup
from ckpttools.passes.read import load
from ckpttools.tensors import TensorRef

Change = Callable[[Checkpoint], Checkpoint]


def renamed(checkpoint: Checkpoint) -> Checkpoint:
    """Every tensor under another name, wherever names stand."""

    def name(old: str) -> str:
        return f"net.{old}"

    def keys(old: Mapping[str, object]) -> dict[str, object]:
        return {name(key): value for key, value in old.items()}

    def group(old: ParamGroup) -> ParamGroup:
        return replace(
            old,
            params=keys(old.params),
            state={kind: keys(refs) for kind, refs in old.state.items()},
            scalars={kind: keys(values) for kind, values in old.scalars.items()},
        )

    return replace(
        checkpoint,
        tensors=keys(checkpoint.tensors),
        groups=tuple(map(group, checkpoint.groups)),
        shared={name(alias): name(owner) for alias, owner in checkpoint.shared.items()},
        frozen=frozenset(map(name, checkpoint.frozen)),
        buffers=frozenset(map(name, checkpoint.buffers)),
        left_out=keys(checkpoint.left_out),
    )


def stepped(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, training=replace(checkpoint.training, step=999))


def sampled(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, training=replace(checkpoint.training, samples=12_345, skipped_steps=3))


def epoch(checkpoint: Checkpoint) -> Checkpoint:
    keys = {**checkpoint.training.keys, "epoch": ("epoch",), "val_loss": ("val_loss",)}
    return replace(checkpoint, training=replace(checkpoint.training, epoch=41, val_loss=0.125, keys=keys))


def learning_rate(checkpoint: Checkpoint) -> Checkpoint:
    groups = tuple(replace(group, hyper={**group.hyper, "lr": 123.0}) for group in checkpoint.groups)
    return replace(checkpoint, groups=groups)


def cast(checkpoint: Checkpoint) -> Checkpoint:
    """Weights of another dtype, made from the masters."""
    from ckpttools.tensors import DTYPES, FLOAT32

    half, shared = DTYPES["float16"], checkpoint.shared
    master = {name: ref.cast(half) for name, ref in checkpoint.master.items() if ref.dtype is FLOAT32}
    tensors = {name: master.get(shared.get(name, name), ref) for name, ref in checkpoint.tensors.items()}
    layout = replace(checkpoint.layout, dtype="fp16")
    return replace(checkpoint, tensors=tensors, layout=layout)


def frozen_name(checkpoint: Checkpoint) -> Checkpoint:
    """One buffer-less tensor more, frozen: a copy of the first trainable one under a new name."""
    name = next(iter(checkpoint.groups[0].params))
    ref = checkpoint.tensors.get(name)
    if ref is None:
        return checkpoint
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, "added.frozen": ref.flat(0, ref.numel).view((ref.numel, 1))},
        frozen=checkpoint.frozen | {"added.frozen"},
    )


def tied_pair(checkpoint: Checkpoint) -> Checkpoint:
    name = next(n for n in checkpoint.groups[0].params if n in checkpoint.tensors)
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, "added.alias": checkpoint.tensors[name]},
        shared={**checkpoint.shared, "added.alias": name},
    )


def client(checkpoint: Checkpoint) -> Checkpoint:
    added = {"note": "by hand", "pair": (1, [2.5, None]), "nested": {"a": {"b": True}}, 7: "seven"}
    return replace(checkpoint, client={**checkpoint.client, "added": added})


def settings(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, settings={**checkpoint.settings, "gradient_clipping": 0.25})


def scheduler(checkpoint: Checkpoint) -> Checkpoint:
    """Another state of the scheduler, under DeepSpeed's own key."""
    state = checkpoint.training
    keys = {**state.keys, "scheduler": ("lr_scheduler",)}
    return replace(checkpoint, training=replace(state, scheduler={"last_batch_iteration": 77}, keys=keys))


def reordered(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, groups=tuple(reversed(checkpoint.groups)))


CHANGES: tuple[Change, ...] = (
    renamed, stepped, sampled, epoch, learning_rate, cast, frozen_name, tied_pair, client, settings,
    scheduler, reordered,
)  # fmt: skip


# --- comparison by content ------------------------------------------------------------------------------

SAME_FIELDS = ("shared", "frozen", "buffers", "left_out", "optimizer")
VALUES = ("loss_scaler", "client", "settings", "extra_state")


def content_differences(a: Checkpoint, b: Checkpoint, *, but: tuple[str, ...] = ()) -> Iterator[str]:
    """Where two checkpoints differ in what they hold, by bytes; `but` names fields that may."""
    for field in SAME_FIELDS:
        if field not in but and getattr(a, field) != getattr(b, field):
            yield f"{field}: {getattr(a, field)} != {getattr(b, field)}"
    for field in VALUES:
        if field not in but:
            yield from _values(field, getattr(a, field), getattr(b, field))
    for name in a.training.__struct_fields__:
        if name not in but and name != "saved_batch":
            yield from _values(name, getattr(a.training, name), getattr(b.training, name))
    yield from _refs("tensors", a.tensors, b.tensors)
    if len(a.groups) != len(b.groups):
        yield f"{len(a.groups)} groups != {len(b.groups)}"
        return
    for g, (one, two) in enumerate(zip(a.groups, b.groups, strict=True)):
        if list(one.params.items()) != list(two.params.items()):
            yield f"groups[{g}].params"
        yield from _values(f"groups[{g}].hyper", one.hyper, two.hyper)
        if dict(one.paths) != dict(two.paths):
            yield f"groups[{g}].paths: {one.paths} != {two.paths}"
        if set(one.state) != set(two.state) or set(one.scalars) != set(two.scalars):
            yield f"groups[{g}]: {[*one.state, *one.scalars]} != {[*two.state, *two.scalars]}"
            continue
        for kind in one.state:
            yield from _refs(f"groups[{g}].{kind}", one.state[kind], two.state[kind])
        for kind in one.scalars:
            yield from _values(f"groups[{g}].{kind}", dict(one.scalars[kind]), dict(two.scalars[kind]))


def _refs(what: str, a: Mapping[str, TensorRef], b: Mapping[str, TensorRef]) -> Iterator[str]:
    if list(a) != list(b):
        yield f"{what}: names {sorted(set(a) ^ set(b)) or 'in another order'}"
    for name in a.keys() & b.keys():
        yield from _values(f"{what}.{name}", a[name], b[name])


def _values(what: str, a: tree.Value, b: tree.Value) -> Iterator[str]:
    one, two = dict(tree.leaves(a)), dict(tree.leaves(b))
    if one.keys() != two.keys():
        yield f"{what}: {sorted(map(str, one.keys() ^ two.keys()))[:4]}"
    for path in one.keys() & two.keys():
        x, y = one[path], two[path]
        if isinstance(x, TensorRef) and isinstance(y, TensorRef):
            same = (x.dtype, x.shape) == (y.dtype, y.shape) and load(x).tobytes() == load(y).tobytes()
        elif isinstance(x, tree.Opaque) and isinstance(y, tree.Opaque):
            same = str(x) == str(y)
        else:
            same = tree.same(x, y)
        if not same:
            yield f"{what}{tree.dotted(path) and '.' + tree.dotted(path)}: {x!r:.200} != {y!r:.200}"
