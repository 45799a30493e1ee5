"""Plain data (from YAML) to frozen values, once, by msgspec; an error names the path into the data.

Their classes say in their annotations what a value may be; a `Meta` also says it in words.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from ckpttools.errors import UsageError

T = TypeVar("T")
Meta = msgspec.Meta


def decode(cls: type[T], data: object, path: str = "") -> T:
    """A Struct from a mapping, field by field; a field that is left out keeps its default, and so does a
    section that is left empty. Numbers may be text: YAML 1.1 reads 3e-4, which has no dot, so.
    """
    if not isinstance(data, Mapping):
        raise bad(path or "the config", "a mapping of settings", data)
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in data:
        if key not in hints:
            others = [alias.partition(".")[2] for alias in ALIASES if alias.startswith(f"{path}.")]
            close = difflib.get_close_matches(str(key), [*hints, *others], n=1)
            raise UsageError(
                "train-config",
                f"{_join(path, key)}: no such setting",
                why="a setting that is silently ignored would train something other than what was asked for",
                hint=f"did you mean {_join(path, close[0])}?" if close else f"known here: {', '.join(hints)}",
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
    if isinstance(want, type) and issubclass(want, msgspec.Struct):
        return decode(want, {} if value is None else value, path)
    try:
        return msgspec.convert(value, want, strict=False)
    except msgspec.ValidationError:
        raise bad(path, _wanted(msgspec.inspect.type_info(want)), value) from None


def _wanted(kind: msgspec.inspect.Type) -> str:
    """What a value may be, in words."""
    match kind:
        case msgspec.inspect.Metadata():
            return str((kind.extra_json_schema or {})["description"])
        case msgspec.inspect.UnionType():
            return _wanted(kind.types[0])  # or nothing
        case msgspec.inspect.LiteralType():
            return "one of " + ", ".join(map(str, kind.values))
    return _WORDS[type(kind)]


_WORDS: dict[type[msgspec.inspect.Type], str] = {
    msgspec.inspect.BoolType: "true or false",
    msgspec.inspect.IntType: "a whole number",
    msgspec.inspect.FloatType: "a number",
    msgspec.inspect.StrType: "text",
    msgspec.inspect.VarTupleType: "a list of text",
    msgspec.inspect.DictType: "a mapping",
}
