"""Plain data (from YAML) to frozen dataclasses, once; an error names the path into the data."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ckpttools.errors import UsageError

T = TypeVar("T")


def decode(cls: type[T], data: object, path: str = "") -> T:
    """A dataclass from a mapping, field by field; a field that is left out keeps its default.

    Field types: bool, int, float, str, Literal, X | None, tuple[str, ...], dict, nested dataclass.
    """
    if not isinstance(data, Mapping):
        raise bad(path or "the config", "a mapping of settings", data)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]  # T is a dataclass
    for key in data:
        if key not in names:
            others = [alias.partition(".")[2] for alias in ALIASES if alias.startswith(f"{path}.")]
            close = difflib.get_close_matches(str(key), [*names, *others], n=1)
            raise UsageError(
                "train-config",
                f"{_join(path, key)}: no such setting",
                why="a setting that is silently ignored would train something other than what was asked for",
                hint=f"did you mean {_join(path, close[0])}?" if close else f"known here: {', '.join(names)}",
            )
    return cls(**{key: _value(hints[key], value, _join(path, key)) for key, value in data.items()})


# other names that training guides use -> the setting
ALIASES = {
    "training.save_steps": "save.save_steps",
    "training.weight_decay": "optimizer.weight_decay",
    "training.max_keep_ckpts": "training.save_total_limit",
}


def unaliased(data: object) -> object:
    """The same settings under their own names. Raises UsageError where both names are given."""
    if not isinstance(data, dict):
        return data
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for alias, name in ALIASES.items():
        section, _, key = alias.partition(".")
        there = data.get(section)
        if not isinstance(there, dict) or key not in there:
            continue
        value = there.pop(key)
        own_section, _, own_key = name.partition(".")
        own = data.get(own_section)
        if isinstance(own, dict) and own_key in own and own[own_key] != value:
            raise UsageError(
                "train-config",
                f"{alias} is {value!r} and {name} is {own[own_key]!r}",
                why="these are two names of one setting",
                hint=f"leave one of them out, or override with --set {name}=...",
            )
        assign(data, name, value)
    return data


def assign(data: dict[str, Any], dotted: str, value: object) -> None:
    """`assign(d, "zero.stage", 1)` is `d["zero"]["stage"] = 1`, making the sections on the way."""
    *sections, last = dotted.split(".")
    for i, key in enumerate(sections):
        section = data.setdefault(key, {})
        if section is None:  # an empty section in the file
            section = data[key] = {}
        if not isinstance(section, dict):
            raise bad(".".join(sections[: i + 1]), "a mapping of settings", section)
        data = section
    data[last] = value


def bad(path: str, wanted: str, got: object) -> UsageError:
    """The error for a value of the wrong kind."""
    return UsageError(
        "train-config",
        f"{path}: expected {wanted}, got {got!r}",
        why="training cannot start from a setting that has no clear meaning",
        hint=f"correct {path} in the config, or override it with --set",
    )


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _value(want: Any, value: object, path: str) -> object:
    origin, args = typing.get_origin(want), typing.get_args(want)
    if dataclasses.is_dataclass(want):
        return decode(typing.cast(type[object], want), {} if value is None else value, path)
    if origin is types.UnionType:
        return None if value is None else _value(args[0], value, path)
    if origin is typing.Literal:
        if value not in args:
            raise bad(path, "one of " + ", ".join(map(str, args)), value)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(v, args[0]) for v in value):
            raise bad(path, "a list of text", value)
        return tuple(value)
    if origin is dict:
        if not isinstance(value, dict):
            raise bad(path, "a mapping", value)
        return value
    if want is float:
        return _float(value, path)
    if not isinstance(value, want) or (want is int and isinstance(value, bool)):
        kinds = {bool: "true or false", int: "a whole number", str: "text"}
        raise bad(path, kinds[want], value)
    return value


def _float(value: object, path: str) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 3e-4, which has no dot, as text
        except ValueError:
            pass
    raise bad(path, "a number", value)
