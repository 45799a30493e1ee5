"""What an optimizer keeps, against the parameters that its groups list. Of any container but a DeepSpeed
engine's, whose optimizer files hold every parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ckpttools.checkpoint import FP32, Checkpoint
from ckpttools.checks.incidents import keeps_state
from ckpttools.errors import counted, some
from ckpttools.findings import ERROR, INFO, WARNING, Finding
from ckpttools.tensors import TensorRef
from ckpttools.training import Held, OptimizerSettings, Training
from ckpttools.tree import Value

PARTIAL = "state-partial"
MOMENTS = ("exp_avg", "exp_avg_sq")
# a key of the groups of torch's Adam and SGD, and what they keep in the shape of a parameter
SHAPED = {"amsgrad": MOMENTS, "nesterov": ("momentum_buffer",)}


def check_kept(found: Checkpoint, training: Training) -> Iterator[Finding]:
    """By the names of parameters where they are known, else by their numbers."""
    if found.groups:
        kinds = [(g.scalars, {k: v for k, v in g.state.items() if k != FP32}) for g in found.groups]
        having = {name for pair in kinds for held in pair for values in held.values() for name in values}
        own = [(group.hyper, tuple(group.params)) for group in found.groups]
        yield from _partial(str(found.path), "", own, having)
        yield from sizes(found)
        if found.training.step:
            return  # checks/incidents.py says that all is empty
    for optimizer in training.optimizers:
        held = optimizer.held()
        place = optimizer.places[0]
        file, where = str(place.file), ".".join(map(str, (*place.at[:-1], "state")))
        if _is_empty(held, optimizer) and (made := _made(training)):
            yield _none(file, where, optimizer, made)
        if found.groups:
            continue
        listed = list(zip(optimizer.groups, held.params, strict=False))
        yield from _unlisted(file, where, held)
        yield from _partial(file, where, listed, [i for i, kept in held.state.items() if kept])
        yield from _unlike(file, where, optimizer, held)


def _is_empty(held: Held, optimizer: OptimizerSettings) -> bool:
    return bool(held.params) and not any(held.state.values()) and any(map(keeps_state, optimizer.groups))


def _made(training: Training) -> str:
    """What a run has made as far as it says so; "" where it has not begun."""
    if training.count:
        return f"{training.count} {'updates' if training.unit == 'update' else 'iterations'}"
    counts = (saved.states[0].get("last_epoch") for saved in training.schedules)
    steps = max((each for each in counts if isinstance(each, int)), default=0)
    return f"{steps} steps of its schedule" if steps > 0 and training.count is None else ""


def _none(file: str, where: str, optimizer: OptimizerSettings, made: str) -> Finding:
    return Finding(
        id="optimizer-empty",
        severity=WARNING,
        file=file,
        where=where,
        message=f"settings of {counted(len(optimizer.groups), 'parameter group')} after {made}, and no "
        "state of any parameter",
        why="a resume begins the optimizer anew, and the loss jumps",
        hint="use a checkpoint that holds it, unless it was left out on purpose",
    )


def _unlisted(file: str, where: str, held: Held) -> Iterator[Finding]:
    """torch numbers the parameters of all groups from 0 on, and leaves out no number."""
    every = [number for group in held.params for number in group if isinstance(number, int)]
    listed = set(every)
    if len(listed) != sum(map(len, held.params)):
        return  # names, or a parameter twice
    own = [number for number in held.state if type(number) is int and number not in listed]
    if own:
        message = f"is kept for {counted(len(own), 'parameter')} that no group lists: {some(own)}"
    elif not every or max(every) >= 2 * len(every) or sum(every) == len(every) * (len(every) - 1) // 2:
        return  # the numbers of old torch are addresses
    else:
        message = f"{counted(len(every), 'parameter')} have numbers up to {max(every)}: some are in no group"
    yield Finding(
        id="state-unlisted",
        severity=WARNING,
        file=file,
        where=where,
        message=message,
        why="torch saves no such file: a resume leaves that state out in silence, or fails to load groups",
        hint="it was edited: use another copy",
    )


def _partial(
    file: str,
    where: str,
    groups: Iterable[tuple[Mapping[str, Value], Sequence[Value]]],
    having: Collection[Value],
) -> Iterator[Finding]:
    """No error, and not unusual: parameters that were frozen, or that no loss has reached."""
    held = set(having)
    every = [number for hyper, numbers in groups if keeps_state(hyper) for number in numbers]
    without = [number for number in every if number not in held]
    if not without or len(without) == len(every):
        return
    yield Finding(
        id=PARTIAL,
        severity=INFO,
        file=file,
        where=where,
        message=f"{len(without)} of the {len(every)} parameters of the optimizer have no state: they were "
        "never updated (frozen, unfrozen since, unused), or it was lost",
    )


def _unlike(file: str, where: str, optimizer: OptimizerSettings, held: Held) -> Iterator[Finding]:
    """Two moments of one parameter, which are of its shape."""
    if not all("amsgrad" in group for group in optimizer.groups):
        return  # others keep sums of rows and columns, or one number
    for number, kept in held.state.items():
        one, other = (kept.get(kind) for kind in MOMENTS)
        if isinstance(one, TensorRef) and isinstance(other, TensorRef) and one.shape != other.shape:
            yield _of_shape(file, f"{where}[{number}].exp_avg", one.shape, "exp_avg_sq", other.shape)


def sizes(found: Checkpoint) -> Iterator[Finding]:
    """torch's Adam and SGD load moments of any shape, and fail at their first update."""
    for group in found.groups:
        for kind in (kind for key in SHAPED.keys() & group.hyper.keys() for kind in SHAPED[key]):
            for name, ref in group.scalars.get(kind, {}).items():
                if isinstance(ref, TensorRef) and ref.shape and name in found.tensors:
                    shape = found.tensors[name].shape
                    yield _of_shape(str(found.path), f"{name} ({kind})", ref.shape, "its parameter", shape)


def _of_shape(file: str, where: str, shape: Sequence[int], what: str, other: Sequence[int]) -> Finding:
    return Finding(
        id="moment-size",
        severity=ERROR,
        file=file,
        where=where,
        message=f"is {list(shape)}, and {what} {list(other)}",
        hint="it loads, and the first update fails: use another copy",
    )
