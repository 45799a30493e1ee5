"""Which tensors leave a checkpoint, and from which copy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from msgspec.structs import replace

from ckpttools.checkpoint import FP32, Checkpoint, ParamGroup, common_dtype
from ckpttools.errors import UsageError, escape
from ckpttools.tensors import BFLOAT16, FLOAT16, FLOAT32

Copy = Literal["master", "model"]
T = TypeVar("T")


def select(
    checkpoint: Checkpoint,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    exclude_frozen: bool = False,
) -> Checkpoint:
    """The tensors whose names match, with what is said about them and the optimizer's state for them.

    `include` and `exclude` are shell patterns. A group of which no parameter is left stays, empty: the
    scheduler keeps a rate for each group. A note says how many are left out.

    Raises UsageError where nothing is left.
    """
    inside, outside = tuple(include), tuple(exclude)
    frozen = checkpoint.frozen if exclude_frozen else frozenset()
    params = (name for group in checkpoint.groups for name in group.params)
    every = dict.fromkeys((*checkpoint.tensors, *params))
    names = {name for name in every if name not in frozen and _wanted(name, inside, outside)}
    if not names:
        raise UsageError(
            "nothing-selected",
            f"none of the {len(every)} tensors is selected",
            where=checkpoint.path,
            why="a checkpoint of nothing loads nowhere",
            hint="ckpt inspect --tensors lists the names; quote the patterns: --include '*.weight'",
        )
    idle = [
        f"{escape(pattern)} matches no tensor" for pattern in (*inside, *outside) if not _any(every, pattern)
    ]
    checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *idle)) if idle else checkpoint
    if len(names) == len(every):
        return checkpoint
    left = len(every) - len(names)
    shared = _ties(checkpoint.shared, names)
    heirs = _heirs(checkpoint, names, shared)
    state = _state(checkpoint, names | heirs.keys())
    places = {name: at for at, name in enumerate(every)}
    return replace(
        checkpoint,
        tensors=_only(checkpoint.tensors, names),
        groups=tuple(_group(group, names, heirs, places) for group in checkpoint.groups),
        shared=shared,
        frozen=checkpoint.frozen & names,
        buffers=checkpoint.buffers & names,
        left_out={n: shape for n, shape in checkpoint.left_out.items() if _wanted(n, inside, outside)},
        extra_state={n: value for n, value in checkpoint.extra_state.items() if _wanted(n, inside, outside)},
        notes=(*checkpoint.notes, f"{left} of {len(every)} tensors are left out, as asked for{state}"),
    )


def _state(checkpoint: Checkpoint, names: Collection[str]) -> str:
    """What else than the weights themselves is left out, for how many of them."""
    held = [(kind, refs.keys() - names) for group in checkpoint.groups for kind, refs in group.state.items()]
    what = [
        words
        for words, master in (("the master weights", True), ("the optimizer's state", False))
        if any(left for kind, left in held if (kind == FP32) is master)
    ]
    count = len({name for _, left in held for name in left})
    return f", and {' and '.join(what)} of {count} of them" if count else ""


def _wanted(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    inside = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return inside and not any(fnmatchcase(name, pattern) for pattern in exclude)


def _any(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _only(values: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    return {name: value for name, value in values.items() if name in names}


def _group(
    group: ParamGroup, names: Collection[str], heirs: Mapping[str, str], places: Mapping[str, int]
) -> ParamGroup:
    """An heir stands where an optimizer that is made from what is left has it: in the model's order, where
    the group is in that order.
    """
    known = [places[name] for name in group.params]
    sorts = known == sorted(known) and not heirs.keys().isdisjoint(group.params)

    def only(values: Mapping[str, T]) -> dict[str, T]:
        held = _only({heirs.get(name, name): value for name, value in values.items()}, names)
        return {name: held[name] for name in sorted(held, key=places.__getitem__)} if sorts else held

    return replace(
        group,
        params=only(group.params),
        state={kind: only(values) for kind, values in group.state.items()},
        scalars={kind: only(values) for kind, values in group.scalars.items()},
    )


def _heirs(checkpoint: Checkpoint, names: Collection[str], shared: Mapping[str, str]) -> dict[str, str]:
    """Owners that are left out -> the name that has their master weights and state now."""
    out: dict[str, str] = {}
    trained = {name for group in checkpoint.groups for name in group.params}
    for alias, owner in checkpoint.shared.items():
        if owner not in names and alias in names and alias not in shared.keys() | trained:
            out.setdefault(owner, alias)
    return out


def _ties(shared: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Where the owner is gone, the first of its other names owns the rest."""
    owners: dict[str, str] = {}
    out: dict[str, str] = {}
    for alias, owner in shared.items():
        if alias in names:
            new = owner if owner in names else owners.setdefault(owner, alias)
            if new != alias:
                out[alias] = new
    return out


def weights_only(checkpoint: Checkpoint, source: Copy | None = None) -> Checkpoint:
    """One copy of each weight and buffer, and no optimizer.

    `source` is "master" for the fp32 master weights (the default where there are any), with frozen
    parameters and buffers of 16 bits, which have no master, as fp32 too; or "model" for the weights as
    trained with.

    Raises UsageError where master weights are asked for and there are none, or no weights at all.
    """
    has_master = any(FP32 in group.state for group in checkpoint.groups)
    if source == "master" and not has_master:
        raise UsageError(
            "no-master",
            "the checkpoint has no fp32 master weights",
            where=checkpoint.path,
            why="there is one copy of each weight, in the dtype that the model was saved in",
            hint="leave out --source, or use --source model",
        )
    notes = list(checkpoint.notes)
    tensors = dict(checkpoint.tensors)
    if has_master and source != "model":
        best, master, shared = checkpoint.best_copies(), checkpoint.master, checkpoint.shared
        without = [
            name
            for name, ref in best.items()
            if name not in master and shared.get(name) not in master and ref.dtype.is_float
        ]
        if without:
            notes.append(
                f"{len(without)} tensors have no master weights (frozen parameters and buffers): "
                f"taken as trained with, the first {escape(without[0])}"
            )
        short = (BFLOAT16, FLOAT16)
        tensors = {name: ref.cast(FLOAT32) if ref.dtype in short else ref for name, ref in best.items()}
    if not tensors:
        raise without_weights(checkpoint)
    if checkpoint.groups:
        scaler = " and the loss scaler" if checkpoint.loss_scaler else ""
        notes.append(f"not carried: the optimizer's state{scaler} (weights only)")
    return replace(
        checkpoint,
        tensors=tensors,
        groups=(),
        optimizer=None,
        loss_scaler={},
        layout=replace(checkpoint.layout, dtype=common_dtype(tensors)),
        notes=tuple(notes),
    )


def without_weights(checkpoint: Checkpoint) -> UsageError:
    return UsageError(
        "nothing-selected",
        "the checkpoint holds no weights, only the optimizer's state",
        where=checkpoint.path,
        why="weights lie in other files of the same save",
        hint="name the folder or the file that holds the model",
    )
