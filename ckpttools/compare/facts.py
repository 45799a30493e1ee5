"""Settings and counters of two checkpoints side by side: what differs, and what only one of them says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from msgspec import Struct

from ckpttools.checkpoint import EXCLUDES_FROZEN, Checkpoint
from ckpttools.compare.content import Keys, holds_tensors, hyper, inside, plain, progress, told
from ckpttools.compare.digests import shown
from ckpttools.formats import counters
from ckpttools.tensors import TensorRef
from ckpttools.tree import Key, Opaque, Value, leaves
from ckpttools.tree import dotted as dotted_path

RANDOM = re.compile(r"(^|[^a-z])(rng|random)", re.IGNORECASE)  # rng_state, random_states, torch_rng ...
HYPER = "hyper-parameters"
CLIENT = "client state"


class _Unknown:
    """What a checkpoint does not say."""

    def __repr__(self) -> str:
        return "?"


UNKNOWN = _Unknown()


class Fact(Struct, frozen=True, kw_only=True):
    """Something that the two say otherwise; UNKNOWN for what one of them does not say."""

    part: str
    name: str
    left: object
    right: object


def differences(a: Checkpoint, b: Checkpoint) -> tuple[Fact, ...]:
    """Every counter, loss, setting and value of training code that is not the same in both."""
    return tuple(_differences(a, b))


def _differences(a: Checkpoint, b: Checkpoint) -> Iterator[Fact]:
    keys = keys_of(a, b)
    left, right = progress(a, shown, keys), progress(b, shown, keys)
    for part in left:
        yield from _unequal(part, left[part], right[part])
    yield from _hyper(a, b, keys)
    for fact in _unequal(CLIENT, dict(_client(a, keys)), dict(_client(b, keys))):
        if not RANDOM.search(fact.name):
            yield fact


def keys_of(a: Checkpoint, b: Checkpoint) -> Keys:
    """10 and '10' are two keys, where the files of both can tell."""
    return str if a.text_keys or b.text_keys else _told_apart


def _told_apart(key: Key) -> str:
    return key if isinstance(key, str) else f"{key} ({type(key).__name__})"


def _hyper(a: Checkpoint, b: Checkpoint, keys: Keys) -> Iterator[Fact]:
    """Groups are matched by the parameters that they share: their order and number may differ."""
    left, right = list(hyper(a, shown, keys)), list(hyper(b, shown, keys))
    if not left or not right:
        return  # the missing optimizer state itself is said
    for i, (names, ours) in enumerate(left):
        for j, (others, theirs) in enumerate(right):
            if names & others or (not names and not others and i == j):
                where = f"group {i}" if i == j else f"group {i}, {j} there"
                yield from _unequal(HYPER, ours, theirs, f"{where}: ")
    yield from grouped(a, b)


def grouped(a: Checkpoint, b: Checkpoint) -> Iterator[Fact]:
    """Parameter groups in another number, order or division, where the files say which there are: files of
    torch.optim and of ZeRO are loaded by position.
    """
    if not a.groups or not b.groups or a.groups_guessed or b.groups_guessed:
        return
    if len(a.groups) != len(b.groups):
        yield Fact(part=HYPER, name="number of groups", left=len(a.groups), right=len(b.groups))
    ours, theirs = ([name for group in side.groups for name in group.params] for side in (a, b))
    both = {*ours} & {*theirs}
    ours, theirs = ([name for name in names if name in both] for names in (ours, theirs))
    moved = next((i for i, (one, two) in enumerate(zip(ours, theirs, strict=True)) if one != two), None)
    if moved is not None:
        name = f"order of the parameters, from place {moved}"
        yield Fact(part=HYPER, name=name, left=ours[moved], right=theirs[moved])
    elif len(a.groups) == len(b.groups):
        for i, pair in enumerate(zip(a.groups, b.groups, strict=True)):
            one, two = (sum(name in both for name in group.params) for group in pair)
            if one != two:
                yield Fact(part=HYPER, name=f"group {i}: number of parameters", left=one, right=two)


def rekeyed(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether the schedules have keys that are numbers on one side and text on the other."""
    keys = keys_of(a, b)
    ours, theirs = (_flat(progress(side, str, keys)["schedule"]).keys() for side in (a, b))
    return ours != theirs


def _unequal(
    part: str, left: Mapping[str, object], right: Mapping[str, object], prefix: str = ""
) -> Iterator[Fact]:
    flat, other = _flat(left), _flat(right)
    for key in dict.fromkeys((*flat, *other)):
        one, two = flat.get(key, UNKNOWN), other.get(key, UNKNOWN)
        unsaid = UNKNOWN in (one, two) and not told({key: two if one is UNKNOWN else one})
        if not _same(one, two) and not (unsaid and part != CLIENT):
            yield Fact(part=part, name=f"{prefix}{key}", left=one, right=two)


def _flat(value: Mapping[str, object]) -> dict[str, object]:
    return {dotted_path(path): leaf for path, leaf in leaves(value) if path and leaf is not None}


def _same(a: object, b: object) -> bool:
    """NaN equals NaN: the same bits were written."""
    return (a == b and type(a) is type(b)) or (a != a and b != b)


def _client(
    checkpoint: Checkpoint, keys: Keys, only: Collection[str] | None = None
) -> Iterator[tuple[str, object]]:
    """What training code saved, and the model beside tensors, but for what the counters say already; of
    `only` these keys, where they are given.
    """
    said = {*_names(checkpoint), EXCLUDES_FROZEN}  # the one is ours: other formats tell it otherwise
    own = ((key, value) for key, value in checkpoint.client.items() if key not in said)
    for key, value in (*checkpoint.extra_state.items(), *own):
        if only is None or key in only:
            yield key, plain(_known(value), shown, keys)


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    """The keys of the client's values that say what the counters and the schedule say, where they lie too."""
    state, client = checkpoint.training, checkpoint.client
    for field, names in counters.NAMES.items():
        said = getattr(state, field)
        yield from (name for name in (field, *names) if said is not None and _same(client.get(name), said))
    yield from (
        name for name in counters.SCHEDULER if state.scheduler and client.get(name) == state.scheduler
    )


def _known(value: Value) -> Value:
    """Without objects that nobody looks into: whether two are equal is not known."""
    if isinstance(value, Opaque):
        return value if inside(value) else None
    if isinstance(value, Mapping):
        return {key: _known(inner) for key, inner in value.items()}
    return [_known(inner) for inner in value] if isinstance(value, list | tuple) else value


def opaque(checkpoint: Checkpoint) -> list[str]:
    """Where objects lie that cannot be compared, keys under which nobody looks, and unread folders."""
    held = (
        checkpoint.extra_state,
        checkpoint.client,
        checkpoint.training.scheduler,
        checkpoint.loss_scaler,
    )
    found = ((path, leaf) for value in held for path, leaf in leaves(value))
    objects = [dotted_path(path) for path, leaf in found if isinstance(leaf, Opaque) and not inside(leaf)]
    below = (f"the weights in {name}" for name in checkpoint.below)
    return [*objects, *checkpoint.unread, *below]


def state_beside(checkpoint: Checkpoint) -> dict[str, bool]:
    """The keys under which the model's state holds something beside tensors, and training code tensors of its
    own (an average of the weights, for instance), with whether all of it can be compared.
    """
    kept = {key: checkpoint.client[key] for key in client_tensors(checkpoint)}
    out: dict[str, bool] = {}
    for key, value in (*checkpoint.extra_state.items(), *kept.items()):
        held = [leaf for _, leaf in leaves(value) if leaf is not None]
        if held:
            known = (not isinstance(leaf, Opaque) or bool(inside(leaf)) for leaf in held)
            out[key] = all(known) and out.get(key, True)
    return out


def client_tensors(checkpoint: Checkpoint) -> list[str]:
    """The keys of training code's own state with tensors in it, but for random states and for optimizers
    without names.
    """
    held, unnamed = checkpoint.client.items(), checkpoint.unnamed
    found = (key for key, value in held if any(_is_tensor(leaf) for _, leaf in leaves(value)))
    return [key for key in found if not RANDOM.search(key) and key not in unnamed]


def _is_tensor(leaf: Value) -> bool:
    return isinstance(leaf, TensorRef) or (isinstance(leaf, Opaque) and holds_tensors(leaf))


def differences_beside(a: Checkpoint, b: Checkpoint) -> tuple[Fact, ...]:
    """What is not the same in both of `state_beside` of either, each tensor by its digest. An empty container
    is nothing: some formats cannot hold one.
    """
    keys, only = keys_of(a, b), (state_beside(a).keys() | state_beside(b).keys()) - {*a.unnamed, *b.unnamed}
    found = _unequal(CLIENT, dict(_client(a, keys, only)), dict(_client(b, keys, only)))
    return tuple(
        fact for fact in found if not all(side in (UNKNOWN, {}, []) for side in (fact.left, fact.right))
    )


def random_states(checkpoint: Checkpoint) -> list[str]:
    """Random states among what training code saved, by the names that lead to them."""
    found = (re.split(r"\[", dotted_path(path))[0] for path, _ in leaves(checkpoint.client))
    return list(dict.fromkeys(name for name in found if RANDOM.search(name)))
