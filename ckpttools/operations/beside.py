"""The optimizer that a framework keeps in a file of its own, beside the weights: its state by number.

    optimizer.pt (transformers' Trainer), optimizer.bin (accelerate): {"state": {0: {...}}, "param_groups"}

Its parameters have numbers and no names. Two such files are compared number by number. With a checkpoint that
knows the names nothing is compared by guess: the file is named as not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from msgspec.structs import replace

from ckpttools import frameworks
from ckpttools.checkpoint import PARAM_NAMES, Checkpoint, ParamGroup
from ckpttools.containers.edit import at
from ckpttools.containers.nodes import decode
from ckpttools.containers.torch_file import read_torch_file
from ckpttools.errors import CkptError, escape
from ckpttools.formats import Source
from ckpttools.plan import SourceCheck
from ckpttools.stores.links import within
from ckpttools.tensors import TensorRef
from ckpttools.training import Place
from ckpttools.tree import Key, Value, dotted, leaves

Opened = tuple[Source, Checkpoint]


def unnamed(source: Source, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The optimizers whose parameters have no names, in its values or in files of their own, and what else is
    kept of an optimizer, and of other weights, that is not read: what a digest by name cannot hold.
    """
    inside = (f"the optimizer under {escape(key)}" for key in checkpoint.unnamed)
    files = (place.file for place in _places(source, checkpoint) if place.file != source.target)
    beside = (escape(file.name) for file in files)
    found = (f"{what} (its parameters have no names)" for what in (*inside, *beside))
    below = (f"the weights in {escape(name)}" for name in checkpoint.below)
    return tuple(dict.fromkeys((*found, *_unjoined(source), *below)))


def _unjoined(source: Source) -> Iterator[str]:
    if source.format.weights_alone:
        kept = f"what {source.format.name} keeps beside the weights"
        yield f"{kept} (the optimizer's state of ranks is not joined)"


def both(one: Opened, two: Opened) -> tuple[Checkpoint, Checkpoint, tuple[str, ...]]:
    """The two checkpoints, with these files' state where neither has another; what cannot be compared.

    Raises CkptError where such a file is damaged.
    """
    known = [list(_places(*side)) for side in (one, two)]
    sides = zip((one, two), known, strict=True)
    found = [[place for place in places if place.file != side[0].target] for side, places in sides]
    if all(found):
        a, b = (_with(side, places) for side, places in zip((one, two), found, strict=True))
        return a, b, ()
    alone = (f"{place.file.name} (its parameters have no names)" for places in known for place in places)
    if not one[1].groups and not two[1].groups:  # in the files themselves they are values like others
        alone = (said for said, place in zip(alone, chain(*known), strict=True) if place in chain(*found))
    unread = chain.from_iterable(_unjoined(source) for source, _ in (one, two))
    return one[1], two[1], tuple(dict.fromkeys((*alone, *unread)))


def _places(source: Source, checkpoint: Checkpoint) -> Iterator[Place]:
    """Where optimizers are that the format does not read: `param_groups` of each."""
    if checkpoint.groups or source.format.tagged:
        return
    try:
        known = frameworks.read(source, checkpoint).optimizers
    except CkptError:
        return  # weights alone, or its framework's files say nothing
    yield from (each.places[0] for each in known)


def _with(side: Opened, places: list[Place]) -> Checkpoint:
    source, checkpoint = side
    groups: list[ParamGroup] = []
    checks: list[SourceCheck] = []
    with within(source.root):
        for place in places:
            file = read_torch_file(place.file)
            held = decode(file, at(file.value, *place.at[:-1]))
            groups += _groups(held, place.file.name)
            checks += file.checks()
    return replace(checkpoint, groups=tuple(groups), checks=(*checkpoint.checks, *checks))


def _groups(held: Value, name: str) -> Iterator[ParamGroup]:
    if not isinstance(held, Mapping) or not isinstance(held.get("param_groups"), list):
        return
    state = held.get("state")
    for group in held["param_groups"]:
        if isinstance(group, Mapping):
            numbers = group.get("params")
            yield _group(group, numbers if isinstance(numbers, list) else [], state, name)


def _group(group: Mapping[Key, Value], numbers: list[Key], state: Value, name: str) -> ParamGroup:
    tensors: dict[str, dict[str, TensorRef]] = {}
    scalars: dict[str, dict[str, Value]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for number in numbers:
        own = f"{name}[{number}]"
        kept = state.get(number) if isinstance(state, Mapping) else None
        shapes[own] = ()
        for path, value in leaves(kept) if isinstance(kept, Mapping) else ():
            if isinstance(value, TensorRef) and value.shape:
                tensors.setdefault(dotted(path), {})[own] = value
                shapes[own] = shapes[own] or value.shape
            else:
                scalars.setdefault(dotted(path), {})[own] = value
    hyper = {str(key): value for key, value in group.items() if key not in ("params", PARAM_NAMES)}
    return ParamGroup(params=shapes, state=tensors, scalars=scalars, hyper=hyper)
