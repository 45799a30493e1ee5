"""A checkpoint in the shape of another one: that run's names, parameter groups, settings and tensor roles.

Values stay: weights, optimizer state, counters, schedule and the client's own. What the other run has no
place for is named, what it needs and does not get is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from ckpttools.checkpoint import STEP, Checkpoint, ParamGroup
from ckpttools.errors import CkptError, UsageError, escape, some
from ckpttools.tensors import TensorRef
from ckpttools.transforms.optimizers import counted
from ckpttools.transforms.rename import rename
from ckpttools.tree import Value

Shape = tuple[int, ...]
BLOCK = 1 << 22  # elements


def like(checkpoint: Checkpoint, other: Checkpoint, *, fresh: bool = False) -> Checkpoint:
    """The checkpoint as the run of `other` would have saved it; `fresh`: with its groups even where this one
    has no optimizer with names.

    Raises UsageError where the two are of different models, or names fit in more than one way.
    """
    names = matched_names(checkpoint, other)
    if any(old != new for old, new in names.items()):
        checkpoint = rename(checkpoint, lambda name: names.get(name, name))
    left = [name for name in checkpoint.tensors if name not in other.tensors]
    for name, ref in other.tensors.items():
        have = checkpoint.tensors.get(name)
        if have is None:
            raise _apart(checkpoint, other, f"{escape(name)} is not in it")
        if have.shape != ref.shape:
            raise _apart(checkpoint, other, f"{escape(name)} is {list(have.shape)}, there {list(ref.shape)}")
    _refuse_untied(checkpoint, other)
    notes = list(_notes(checkpoint, other, names, left))
    groups = tuple(_group(checkpoint, g) for g in other.groups) if checkpoint.groups or fresh else ()
    if groups and other.groups:
        there = escape(other.path.name)
        notes.append(f"{len(groups)} parameter groups and their settings are those of {there}")
    state = checkpoint.training
    place = other.training.keys.get("scheduler")
    if place is not None and state.scheduler:
        state = replace(state, keys={**state.keys, "scheduler": place})
    return replace(
        checkpoint,
        tensors={name: checkpoint.tensors[name] for name in other.tensors},
        groups=groups or checkpoint.groups,
        shared=other.shared,
        frozen=other.frozen,
        buffers=other.buffers,
        roles_guessed=other.roles_guessed,
        groups_guessed=(other if groups else checkpoint).groups_guessed,
        left_out=other.left_out,
        excludes_frozen=other.excludes_frozen,
        settings=other.settings or checkpoint.settings,
        optimizer=other.optimizer or checkpoint.optimizer,
        training=state,
        notes=(*checkpoint.notes, *notes),
        template=None,
    )


def _refuse_untied(checkpoint: Checkpoint, other: Checkpoint) -> None:
    """Names that are one tensor there must be equal here: one of two would be lost. Reads their bytes."""
    best = checkpoint.best_copies()
    for alias, owner in other.shared.items():
        if alias in best and owner in best and not _equal(best[alias], best[owner]):
            raise _apart(
                checkpoint, other, f"{escape(alias)} and {escape(owner)} are one tensor there, two here"
            )


def _equal(one: TensorRef, two: TensorRef) -> bool:
    """Whether two tensors have the same type, shape and bytes: read a block at a time."""
    from ckpttools.passes.read import load  # numpy: needed for ties alone

    if (one.dtype, one.shape) != (two.dtype, two.shape) or one.chunks == two.chunks:
        return (one.dtype, one.shape) == (two.dtype, two.shape)
    blocks = ((at, min(BLOCK, one.numel - at)) for at in range(0, one.numel, BLOCK))
    return all(load(one.flat(*each)).tobytes() == load(two.flat(*each)).tobytes() for each in blocks)


def matched_names(checkpoint: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """What each tensor is called there: the same name, one with a common prefix more or less, or the one
    place of its shape.
    """
    ours, theirs = checkpoint.tensors, other.tensors
    if theirs.keys() <= ours.keys():
        return {name: name for name in ours}
    for prefix in _prefixes(ours, theirs):
        if all(prefix + name in theirs for name in ours):
            return {name: prefix + name for name in ours}
    for prefix in _prefixes(theirs, ours):
        if all(prefix + name in ours for name in theirs):
            return {prefix + name: name for name in theirs}
    made = {name: name for name in ours if name in theirs}
    rest = _by_shape({n: r for n, r in ours.items() if n not in made})
    wanted = _by_shape({n: r for n, r in theirs.items() if n not in ours})
    for shape, names in wanted.items():
        found = rest.get(shape, [])
        if len(names) != 1 or len(found) != 1:
            count = f"{len(found)} of ours fit {len(names)} of theirs"
            raise UsageError(
                "names-ambiguous",
                f"which tensor is {escape(names[0])} of {escape(other.path.name)}? {count}, by their shape",
                where=checkpoint.path,
                why=f"of the shape {list(shape)} there are {some(found, 3) or 'none'} here and "
                f"{some(names, 3) or 'none'} there",
                hint=r"give their names: --rename 'PATTERN=REPLACEMENT' (repeatable)",
            )
        made[found[0]] = names[0]
    return made


def _prefixes(short: Mapping[str, TensorRef], long: Mapping[str, TensorRef]) -> Iterator[str]:
    """What may stand before every name of `short`: what does before the first of them."""
    first = next(iter(short), "")
    for name in long:
        if name.endswith("." + first):
            yield name.removesuffix(first)


def _by_shape(tensors: Mapping[str, TensorRef]) -> dict[Shape, list[str]]:
    out: dict[Shape, list[str]] = {}
    for name, ref in tensors.items():
        out.setdefault(ref.shape, []).append(name)
    return out


def _apart(checkpoint: Checkpoint, other: Checkpoint, problem: str) -> CkptError:
    return UsageError(
        "model-differs",
        f"not the model of {escape(other.path.name)}: {problem}",
        where=checkpoint.path,
        why="--like takes a checkpoint of the run that will load the result",
        hint="ckpt diff shows what differs; --rename gives other names, --exclude leaves tensors out",
    )


def _group(checkpoint: Checkpoint, wanted: ParamGroup) -> ParamGroup:
    """A group of the other run with the state that is kept here, steps as it counts them."""
    state: dict[str, dict[str, TensorRef]] = {}
    scalars: dict[str, dict[str, Value]] = {}
    paths = dict(wanted.paths)
    for group in checkpoint.groups:
        for name in (each for each in wanted.params if each in group.params):
            for kind, refs in group.state.items():
                if name in refs:
                    state.setdefault(kind, {})[name] = refs[name]
            for kind, values in group.scalars.items():
                if name in values:
                    scalars.setdefault(kind, {})[name] = values[name]
        paths |= group.paths

    def in_order(values: Mapping[str, object]) -> dict[str, object]:
        return {name: values[name] for name in wanted.params if name in values}

    theirs = wanted.scalars.get(STEP, {})
    if STEP in scalars and theirs:
        tensor = isinstance(next(iter(theirs.values())), TensorRef)
        scalars[STEP] = counted(scalars[STEP], tensor=tensor)
    return replace(
        wanted,
        state={kind: in_order(refs) for kind, refs in state.items()},
        scalars={kind: in_order(values) for kind, values in scalars.items()},
        paths=paths,
    )


def _notes(
    checkpoint: Checkpoint, other: Checkpoint, names: Mapping[str, str], left: list[str]
) -> Iterator[str]:
    there = escape(other.path.name)
    changed = [(old, new) for old, new in names.items() if old != new]
    if changed:
        old, new = map(escape, changed[0])
        yield f"{len(changed)} names are those of {there}: the first, {old}, is {new} there"
    if left:
        yield f"not carried: {some(left)}, which {there} does not have"
    if checkpoint.groups and other.groups:
        trained = {name for group in checkpoint.groups for name in group.params}
        wanted = {name for group in other.groups for name in group.params}
        dropped, fresh = sorted(trained - wanted), sorted(wanted - trained)
        if dropped:
            yield f"not carried: the optimizer's state of {some(dropped)}, which that run does not train"
        if fresh:
            yield f"without optimizer state: {some(fresh)}, which that run trains and this one did not"
