"""`dataclass` for values that are never changed: dataclasses' own, made in a sixth of the time.

A command is over in tenths of a second, and half of what it imports are frozen dataclasses, for each of which
dataclasses compiles six functions. Here all of them share one `__eq__`, `__hash__` and `__repr__`, and
`__init__` is compiled when the first instance is made; of most classes there will be none. Everything else,
slots and fields and `replace`, is dataclasses' own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, fields
from functools import partial
from operator import attrgetter
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]


def _compared(values: Callable[[Any], tuple[Any, ...]]) -> dict[str, Any]:
    def __eq__(self: Any, other: object) -> bool:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: Any) -> int:
        return hash(values(self))

    return {"__eq__": __eq__, "__hash__": __hash__}


def _repr(self: Any) -> str:
    shown = (f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if field.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _set(self: Any, name: str, value: object) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _put(name: str, self: object, value: object) -> None:
    object.__setattr__(self, name, value)


def _delete(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _state(self: Any) -> list[Any]:
    return [getattr(self, field.name) for field in fields(self)]


def _restore(self: Any, state: list[Any]) -> None:
    for field, value in zip(fields(self), state, strict=True):
        object.__setattr__(self, field.name, value)


def _compiled(cls: type) -> Callable[..., None]:
    """The `__init__` that dataclasses would have made. What is not the fields' names is in `scope`."""
    scope: dict[str, Any] = {"_none": MISSING}
    first: list[str] = []
    named: list[str] = []
    body: list[str] = []
    for field in fields(cls):
        name, value = field.name, field.name
        parameter = name
        if field.default is not MISSING:
            scope[f"_of_{name}"], parameter = field.default, f"{name}=_of_{name}"
        elif field.default_factory is not MISSING:
            scope[f"_of_{name}"], parameter = field.default_factory, f"{name}=_none"
            value = f"_of_{name}() if {name} is _none else {name}"
        (named if field.kw_only else first).append(parameter)
        slot = getattr(cls, name, None)
        if isinstance(slot, MemberDescriptorType):  # faster than by name
            scope[f"_put_{name}"] = slot.__set__
        else:
            scope[f"_put_{name}"] = partial(_put, name)
        body.append(f" _put_{name}(self, {value})")
    if hasattr(cls, "__post_init__"):
        body.append(" self.__post_init__()")
    parameters = ", ".join(["self", *first, *(["*", *named] if named else [])])
    text = f"def __init__({parameters}):\n" + "\n".join(body or [" pass"])
    exec(compile(text, __file__, "exec"), scope)
    made: Callable[..., None] = scope["__init__"]
    made.__qualname__ = f"{cls.__qualname__}.__init__"
    return made


def _made(cls: Any, eq: bool, repr: bool, options: dict[str, Any]) -> Any:
    own = dataclasses.dataclass(init=False, eq=False, repr=False, **options)(cls)
    names = [field.name for field in fields(own)]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        own.__init__ = _compiled(own)
        own.__init__(self, *args, **kwargs)

    methods: dict[str, Any] = {"__init__": __init__, "__setattr__": _set, "__delattr__": _delete}
    # of one name it gives no tuple
    methods |= (
        _compared(attrgetter(*names) if len(names) > 1 else lambda self: tuple(_state(self))) if eq else {}
    )
    methods |= {"__repr__": _repr} if repr else {}
    methods |= {"__getstate__": _state, "__setstate__": _restore} if options["slots"] else {}
    for name, method in methods.items():
        if name not in cls.__dict__:
            setattr(own, name, method)
    return own


if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen=False, slots=False, kw_only=False, eq=True, repr=True):
        """As dataclasses.dataclass, which makes what is not frozen."""
        options = {"slots": slots, "kw_only": kw_only}
        if not frozen:
            return dataclasses.dataclass(eq=eq, repr=repr, **options)
        return lambda cls: _made(cls, eq, repr, options)
