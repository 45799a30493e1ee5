"""`records.dataclass` makes the classes that dataclasses makes, but for the time that it takes."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from ckpttools import records

MAKERS: list[Callable[..., Any]] = [dataclasses.dataclass, records.dataclass]


def classes(maker: Callable[..., Any]) -> tuple[Any, Any, Any]:
    @maker(frozen=True, slots=True, kw_only=True)
    class Parent:
        name: str
        parts: list[int] = dataclasses.field(default_factory=list, repr=False)

        def __post_init__(self) -> None:
            assert self.name

    @maker(frozen=True, slots=True, kw_only=True)
    class Child(Parent):
        more: float = 0.5

    @maker(frozen=True)
    class Alone:
        value: object

        def __repr__(self) -> str:
            return "alone"

    return Parent, Child, Alone


@pytest.mark.parametrize("maker", MAKERS, ids=["dataclasses", "records"])
def test_what_dataclasses_does(maker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child, alone = classes(maker)
    made = child(name="a", more=2)
    assert repr(made).endswith("Child(name='a', more=2)") and made.parts == []
    assert made.parts is not child(name="a").parts
    assert made == child(name="a", more=2) != child(name="a") and made != parent(name="a")
    assert dataclasses.replace(made, name="b") == child(name="b", more=2)
    assert [field.name for field in dataclasses.fields(child)] == ["name", "parts", "more"]
    assert (
        not hasattr(made, "__dict__") and parent.__match_args__ == () and alone.__match_args__ == ("value",)
    )
    assert hash(alone(1)) == hash(alone(1)) and alone(1) == alone(1) != alone(2) and repr(alone(1)) == "alone"
    nan = float("nan")
    assert alone(nan) == alone(nan)
    for each in (parent, child, alone):
        monkeypatch.setitem(globals(), each.__name__, each)
        each.__qualname__ = each.__name__
    for same in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301
        assert same == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.name = "b"
    with pytest.raises(dataclasses.FrozenInstanceError):
        del made.name
    for wrong in ({}, {"name": "a", "other": 1}):
        with pytest.raises(TypeError, match="__init__"):
            child(**wrong)
    with pytest.raises(TypeError):
        child("a")
    with pytest.raises(AssertionError):
        parent(name="")
