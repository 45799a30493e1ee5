"""Other names for the tensors of a checkpoint, and for everything that it says about them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from msgspec.structs import replace

from ckpttools.checkpoint import Checkpoint, ParamGroup
from ckpttools.errors import UsageError, escape

T = TypeVar("T")


def unwrapped(checkpoint: Checkpoint, prefixes: Iterable[str]) -> tuple[Checkpoint, str]:
    """The checkpoint without what wrappers put before every name, and what that was; "" where nothing is."""
    removed, more = "", True
    while more:
        names = [name.removeprefix(removed) for name in checkpoint.tensors]
        more = False
        for prefix in prefixes:
            if names and all(name.startswith(prefix) and name != prefix for name in names):
                removed, more = removed + prefix, True
                break
    return (rename(checkpoint, lambda name: name.removeprefix(removed)) if removed else checkpoint), removed


def rename(checkpoint: Checkpoint, new_name: Callable[[str], str]) -> Checkpoint:
    """The checkpoint with `new_name(name)` for every name of a weight, a buffer or a parameter.

    Raises UsageError where two names become one, or none.
    """
    params = (name for group in checkpoint.groups for name in group.params)
    old = dict.fromkeys(
        (*checkpoint.tensors, *checkpoint.shared, *params, *checkpoint.left_out, *checkpoint.extra_state)
    )
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in old:
        new = names[name] = new_name(name)
        other = taken.setdefault(new, name)
        if other != name or not new:
            raise UsageError(
                "names-collide",
                f"'{escape(other)}' and '{escape(name)}' would both be called '{escape(new)}'"
                if other != name
                else f"'{escape(name)}' would have no name",
                where=checkpoint.path,
                why="one would overwrite the other" if other != name else "nothing could load it",
                hint="choose names that stay apart",
            )

    def keys(values: Mapping[str, T]) -> dict[str, T]:
        return {names.get(name, name): value for name, value in values.items()}

    def group(one: ParamGroup) -> ParamGroup:
        return replace(
            one,
            params=keys(one.params),
            state={kind: keys(values) for kind, values in one.state.items()},
            scalars={kind: keys(values) for kind, values in one.scalars.items()},
        )

    return replace(
        checkpoint,
        tensors=keys(checkpoint.tensors),
        groups=tuple(map(group, checkpoint.groups)),
        shared={names[alias]: names.get(owner, owner) for alias, owner in checkpoint.shared.items()},
        frozen=frozenset(keys(dict.fromkeys(checkpoint.frozen))),
        buffers=frozenset(keys(dict.fromkeys(checkpoint.buffers))),
        left_out=keys(checkpoint.left_out),
        extra_state=keys(checkpoint.extra_state),
    )
