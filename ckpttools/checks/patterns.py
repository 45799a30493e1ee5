"""Values that training does not leave, tensor by tensor: constant weights, moments of zero, denormals.

The pass says which blocks look so; here a whole tensor must. A constant weight counts where it was trained,
its own moments say so, and it has two dimensions: norms begin as ones and biases as zeros, and a layer that
no loss reached stays what it was. Moments of rows that are never seen fade into denormals: there, only
weights count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from ckpttools.checkpoint import FP32, Checkpoint, ParamGroup
from ckpttools.errors import CkptError, escape, some
from ckpttools.findings import WARNING, Finding
from ckpttools.location import Location
from ckpttools.passes.looks import RUN
from ckpttools.passes.read import load
from ckpttools.passes.tasks import Constant, Denormal, Pattern
from ckpttools.tensors import ByteRange, TensorRef

LEAST_NUMEL = 16  # fewer may be equal by chance
LEAST_STEPS = 2  # a warmup may begin with a learning rate of zero
FLOOD = 0.1  # the share of denormals above which they are no accident
LOOKED = 1 << 16  # elements of a moment
MOST = 1000  # weights of so short parts that are looked at


def check_patterns(found: Checkpoint, seen: Sequence[Pattern]) -> Iterator[Finding]:
    """Warnings, one for each file and kind of pattern."""
    short = _short(found)
    if not seen and not short:
        return
    constant, denormal = short | _constant(found, seen), _denormal(found, seen)
    trained = {name for group in found.groups for name in group.params}
    suspects = {
        name: place
        for name, place in constant.items()
        if name in found.tensors and len(found.tensors[name].shape) > 1 and name in trained
    }
    kinds = {kind for group in found.groups for kind in group.state} - {FP32}
    zeros = kinds and found.layout.zero_stage is None  # ZeRO's are looked at file by file
    if (suspects or zeros) and _steps(found) < LEAST_STEPS:
        suspects, zeros = {}, False
    yield from _weights(found, suspects)
    if zeros:
        yield from _moments(found, constant)
    for path, names in _by_file(denormal).items():
        yield Finding(
            id="denormal-flood",
            severity=WARNING,
            file=str(path),
            where=names[0],
            message=f"{some(names)}: a tenth of the elements or more are denormals, around 1e-40",
            why="weights that were trained are not that small: memory that was never filled, or bytes read "
            "as another type, looks like this",
            hint="compare with an older checkpoint: ckpt diff",
        )


def _constant(found: Checkpoint, seen: Sequence[Pattern]) -> dict[str, tuple[Location, float]]:
    """The tensors that have one value throughout, weights by their own names, others by that of the pass."""
    counts: dict[str, int] = {}
    values: dict[str, set[float]] = {}
    places: dict[str, Location] = {}
    for each in seen:
        if isinstance(each, Constant):
            counts[each.name] = counts.get(each.name, 0) + each.count
            values.setdefault(each.name, set()).add(each.value)
            places.setdefault(each.name, each.path)
    return {
        _weight(found, name): (places[name], next(iter(values[name])))
        for name, count in counts.items()
        if len(values[name]) == 1 and count > _numel(found, name) - RUN  # a last block may be shorter
    }


def _short(found: Checkpoint) -> dict[str, tuple[Location, float]]:
    """Weights of one value that many ranks hold in parts which are too short for the pass."""
    out: dict[str, tuple[Location, float]] = {}
    for name, ref in islice(_cut_small(found), MOST):
        try:
            first = load(ref.flat(0, RUN))
            values = load(ref).reshape(-1) if (first == first[0]).all() else first
        except CkptError:
            continue
        chunk = ref.chunks[0]
        if len(values) == ref.numel and (values == values[0]).all() and isinstance(chunk, ByteRange):
            out[name] = (chunk.path, float(values[0]))
    return out


def _cut_small(found: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    for group in found.groups:
        for name, ref in group.state.get(FP32, {}).items():
            if len(ref.chunks) < 2 or len(ref.shape) < 2 or not LEAST_NUMEL <= ref.numel <= LOOKED:
                continue
            if (
                sum(c.nbytes for c in ref.chunks if c.nbytes < RUN * ref.dtype.itemsize)
                >= RUN * ref.dtype.itemsize
            ):
                yield name, ref


def _denormal(found: Checkpoint, seen: Sequence[Pattern]) -> dict[str, Location]:
    counts: dict[str, int] = {}
    places: dict[str, Location] = {}
    for each in seen:
        name = _weight(found, each.name)
        if isinstance(each, Denormal) and name in found.tensors:
            counts[name] = counts.get(name, 0) + each.count
            places.setdefault(name, each.path)
    return {
        name: places[name] for name, count in counts.items() if count >= max(8, FLOOD * _numel(found, name))
    }


def _weight(found: Checkpoint, label: str) -> str:
    """A weight's own name where the pass saw only its master."""
    name = label.removesuffix(f" ({FP32})")
    return name if name in found.tensors else label


def _numel(found: Checkpoint, label: str) -> int:
    """The elements of a tensor as the pass names it: `name`, or `name (kind)`."""
    if label in found.tensors:
        return found.tensors[label].numel
    name, _, kind = label.removesuffix(")").rpartition(" (")
    for group in found.groups:
        if name in group.params and kind in group.state:
            return group.state[kind][name].numel if name in group.state[kind] else 1 << 62
    return 1 << 62  # of client code: nobody knows what it should be


def _weights(
    found: Checkpoint,
    suspects: dict[str, tuple[Location, float]],
) -> Iterator[Finding]:
    group_of = {name: group for group in found.groups for name in group.params}
    bad: dict[str, Location] = {}
    for name, (path, _) in suspects.items():
        group = group_of[name]
        moments = [group.state[kind][name] for kind in _kinds(group, name) if kind != FP32]
        if found.tensors[name].numel >= LEAST_NUMEL and any(map(_moved, moments)):
            bad[name] = path
    for path, names in _by_file(bad).items():
        value = suspects[names[0]][1]
        yield Finding(
            id="constant-weight",
            severity=WARNING,
            file=str(path),
            where=names[0],
            message=f"{some(names)}: every element is {value:g}, though the moments say that gradients came",
            why="a weight that was updated is not constant: it was overwritten, or never gathered",
            hint="use an older checkpoint, or another copy of this one",
        )


def _moments(found: Checkpoint, constant: dict[str, tuple[Location, float]]) -> Iterator[Finding]:
    """A moment that is zero for every parameter."""
    for kind in sorted({kind for group in found.groups for kind in group.state.keys() - group.idle} - {FP32}):
        refs = {n: ref for group in found.groups for n, ref in group.state.get(kind, {}).items() if ref.numel}
        large = [f"{name} ({kind})" for name, ref in refs.items() if ref.numel >= RUN]
        small = [ref for ref in refs.values() if ref.numel < RUN]
        if not large or sum(ref.numel for ref in refs.values()) < LEAST_NUMEL:
            continue
        zero = all(constant.get(label, (None, 1.0))[1] == 0 for label in large)
        if zero and not any(map(_moved, small)):
            yield Finding(
                id="moments-zero",
                severity=WARNING,
                file=str(constant[large[0]][0]),
                message=f"all of its {escape(kind)} are zero after {_steps(found)} steps",
                hint="a resume begins the moments anew there: use another copy, unless they were reset",
            )


def _moved(moment: TensorRef) -> bool:
    """Whether gradients came, as far as the first elements of a moment say."""
    try:
        return bool(load(moment.flat(0, min(moment.numel, LOOKED))).any())
    except CkptError:
        return False


def _kinds(group: ParamGroup, name: str) -> list[str]:
    return [kind for kind, refs in group.state.items() if name in refs]


def _steps(found: Checkpoint) -> int:
    """The updates that were made, as far as anything says so."""
    state = found.training
    if state.step is not None:
        return state.step - (state.skipped_steps or 0)
    for group in found.groups:
        for value in group.scalars.get("step", {}).values():
            if isinstance(value, TensorRef) and value.numel == 1:
                try:
                    return int(load(value).reshape(-1)[0])
                except (CkptError, ValueError, OverflowError):
                    return 0
            return int(value) if isinstance(value, int | float) and value == value else 0
    return 0


def _by_file(names: dict[str, Location]) -> dict[Location, list[str]]:
    out: dict[Location, list[str]] = {}
    for name, path in names.items():
        out.setdefault(path, []).append(name)
    return out
