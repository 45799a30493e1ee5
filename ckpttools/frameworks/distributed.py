"""A torch distributed checkpoint, whoever wrote it: counters and schedules among the client's values.

    {"model": ..., "optimizer": ..., "scheduler": {...}, "step": 300}        dcp.save of plain training code
    {..., "lr_scheduler": {...}, "train_state": {"step": 300}}               torchtitan

The values lie in the Checkpoint, not at places of files: a rebase changes them there, and the format writes
the folder anew. What its `step` counts is not saved; how many ranks trained is not either.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, ParamGroup
from ckpttools.containers.edit import packed
from ckpttools.containers.torch_file import FORMS, scalar
from ckpttools.errors import Unsupported
from ckpttools.formats.counters import DATASET, EPOCH, PLACES, SCHEDULER, STEP, TOTAL
from ckpttools.frameworks.framework import Framework, Saved
from ckpttools.frameworks.parts import MARKER
from ckpttools.frameworks.rules import Rule
from ckpttools.location import Location
from ckpttools.tensors import Literal, TensorRef
from ckpttools.training import Counter, Edit, OptimizerSettings, Place, Role, SavedSchedule, Training
from ckpttools.tree import Path as Keys
from ckpttools.tree import Value, at, put

CLIENT, GROUPS = "client", "groups"  # the first key of a place


def is_distributed(saved: Saved) -> bool:
    """One with training state: weights alone have neither groups nor counters."""
    held = saved.values
    return held is not None and bool(held.groups or held.unnamed or next(_counters(held), None))


def read(saved: Saved) -> Training:
    """What the Checkpoint itself says."""
    assert saved.values is not None
    held = saved.values
    counts = tuple(_counters(held))
    client = _place(held, CLIENT)
    marked = _plain(held.client.get(MARKER))
    code = "your training code"
    return Training(
        framework=FRAMEWORK.name,
        unit="update",
        count=counts[0].value if counts else None,
        epochs_done=next((n for _, n in _whole(held, EPOCH)), None),
        size=next((n for _, n in _whole(held, DATASET) if n), None),
        counters=(*counts, *_counters(held, TOTAL, "total")),
        optimizers=tuple(_optimizers(held)),
        schedules=tuple(_schedules(held)),
        batch_names=(
            ("micro", "the data loader's batch_size", code),
            ("accumulation", "gradient accumulation", code),
        ),
        outside=(*_built(held), "whatever else in your training code counts steps"),
        marker=client.below(MARKER),
        marked=marked if isinstance(marked, Mapping) else None,
    )


def _place(held: Checkpoint, *keys: str | int) -> Place:
    return Place(file=held.path, at=keys)


def _whole(held: Checkpoint, names: Iterable[str]) -> Iterator[tuple[Keys, int]]:
    """The whole numbers under such names, and where they are."""
    for within in PLACES:
        for name in names:
            number = _plain(at(held.client, *within, name))
            if isinstance(number, int) and not isinstance(number, bool):
                yield (*within, name), number


def _counters(held: Checkpoint, names: Iterable[str] = STEP, role: Role = "position") -> Iterator[Counter]:
    for keys, number in _whole(held, names):
        place = _place(held, CLIENT, *keys)
        yield Counter(name=".".join(map(str, keys)), value=number, unit="update", places=(place,), role=role)


def _optimizers(held: Checkpoint) -> Iterator[OptimizerSettings]:
    if not held.groups:
        yield from _numbered(held)
        return
    groups = tuple({key: _plain(value) for key, value in group.hyper.items()} for group in held.groups)
    yield OptimizerSettings(
        name="the optimizer",
        groups=groups,
        places=(_place(held, GROUPS),),
        counts=partial(_counts, held),
    )


def _numbered(held: Checkpoint) -> Iterator[OptimizerSettings]:
    """Optimizers as torch.optim saves them, whose parameters have numbers for names."""
    for key in held.unnamed:
        saved = _plain(at(held.client, key, "param_groups"))
        if isinstance(saved, list) and all(isinstance(group, Mapping) for group in saved):
            yield OptimizerSettings(
                name=key,
                groups=tuple({k: value for k, value in group.items() if k != "params"} for group in saved),
                places=(_place(held, CLIENT, key, "param_groups"),),
                counts=partial(_counts_of, at(held.client, key, "state")),
            )


def _counts_of(states: Value) -> list[int | float]:
    held = states.values() if isinstance(states, Mapping) else ()
    found = (_plain(state.get("step")) for state in held if isinstance(state, Mapping))
    return [number for number in found if isinstance(number, int | float)]


def _counts(held: Checkpoint) -> list[int | float]:
    found = (_plain(value) for group in held.groups for value in group.scalars.get("step", {}).values())
    return [number for number in found if isinstance(number, int | float)]


def _schedules(held: Checkpoint) -> Iterator[SavedSchedule]:
    for key in SCHEDULER:
        state = _plain(held.client.get(key))
        if isinstance(state, Mapping) and state:
            place = _place(held, CLIENT, key)
            yield SavedSchedule(name=key, framework="torch", states=(state,), places=(place,))
            return


def _built(held: Checkpoint) -> Iterator[str]:
    """What a schedule must be built with, as torch asks the files for the keys of the one that it fills."""
    if any(_has_milestones(held.client.get(key)) for key in SCHEDULER):
        yield "MultiStepLR's milestones, as they are now: torch finds what was saved by their numbers"


def _has_milestones(value: Value) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return isinstance(value, collections.Counter) or any(map(_has_milestones, inner))


def _plain(value: Value) -> object:
    """With tensors of one element as numbers; what is none of these stays as it is."""
    if isinstance(value, TensorRef):
        number = scalar(value)
        return value if number is None else number
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


# --- changed ------------------------------------------------------------------------------------------


def edited(held: Checkpoint, edits: Iterable[Edit]) -> Checkpoint:
    """The Checkpoint with the edits made, each value of the type that it had."""
    client: Value = dict(held.client)
    groups = list(held.groups)
    for edit in edits:
        first, *keys = edit.place.at
        if first == CLIENT:
            client = put(client, tuple(keys), _like(held.path, at(client, *keys), edit.new))
        else:
            g, *inner = keys
            assert first == GROUPS and isinstance(g, int)
            groups[g] = _with(held.path, groups[g], tuple(inner), edit.new)
    assert isinstance(client, Mapping)
    # the client's values are where the counters are: what was read of them before does not hold any more
    state = Training(saved_batch=held.training.saved_batch)
    return replace(held, client=client, groups=tuple(groups), training=state)


def _with(path: Location, group: ParamGroup, keys: Keys, new: object) -> ParamGroup:
    hyper = put(group.hyper, keys, _like(path, at(group.hyper, *keys), new))
    assert isinstance(hyper, Mapping)
    return replace(group, hyper=hyper)


def _like(path: Location, old: Value, new: object) -> Value:
    """A new number as what the old one was: a tensor stays a tensor."""
    if not isinstance(old, TensorRef):
        return new
    if not isinstance(new, int | float) or scalar(old) is None:
        raise Unsupported(
            "value-kind",
            "a value that is to change is saved as a tensor of a kind that is not written",
            where=path,
            why="the library would find another type than it saved",
            hint="--counters-only leaves schedules alone",
        )
    raw = packed(path, FORMS[old.dtype.name], new)
    return TensorRef(old.dtype, old.shape, (Literal(raw),))


FRAMEWORK = Framework(
    name="distributed",
    title="torch.distributed.checkpoint",
    recognise=is_distributed,
    read=read,
    rule=Rule(
        batch="the saved schedule and counters go on in old steps",
        constants="the checkpoint, where the code loads it",
        prefix=False,
    ),
    launch=lambda dst, n, tag: (
        f"torchrun --nproc-per-node {n} ...: dcp.load(state, checkpoint_id={str(dst)!r})"
    ),
)
