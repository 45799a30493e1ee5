"""Pickles as data: Python's own module is the oracle, and nothing but Reject comes out of bad bytes."""

from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import decimal
import enum
import io
import math
import pathlib
import pickle
import pickletools
import random
import struct
import sys
import tracemalloc
import types
import uuid
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from work import at_most

from ckpttools.containers.pickles import (
    Dict,
    Global,
    Object,
    Persistent,
    Reject,
    Set,
    as_mapping,
    dumps,
    loads,
    machine,
    opcodes,
    plain,
    read,
    walk,
)

PROTOCOLS = range(6)


# --- values against the oracle ------------------------------------------------------------------------


def plainly(node: object) -> object:
    """Nodes as the Python values that they stand for (only those that need no class)."""
    match node:
        case Dict():
            return {plainly(k): plainly(v) for k, v in node.pairs}
        case Set():
            return (frozenset if node.frozen else set)(plainly(m) for m in node.members)
        case list():
            return [plainly(x) for x in node]
        case tuple():
            return tuple(plainly(x) for x in node)
        case Object() if node.is_a("_codecs", "encode"):
            return str(node.args[0]).encode("latin1")
        case Object() if node.is_a("__builtin__", "bytes") or node.is_a("builtins", "bytes"):
            return b""
        case Object() if str(node.cls) in ("__builtin__.bytearray", "builtins.bytearray"):
            return bytearray(
                plainly(node.args[0])
                if len(node.args) == 1
                else node.args[0].encode("latin1")
                if node.args
                else b""
            )
        case Object() if str(node.cls) in ("__builtin__.set", "builtins.set", "__builtin__.frozenset"):
            kind = frozenset if "frozen" in str(node.cls) else set
            return kind(plainly(x) for x in node.args[0])
        case Object() if str(node.cls) == "builtins.frozenset":
            return frozenset(plainly(x) for x in node.args[0])
    return node


def same(a: object, b: object) -> bool:
    """Equal in type and value; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    return a == b


TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=300)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**4000), 2**4000)
    | st.floats(allow_nan=False)
    | st.just(float("nan"))  # payloads are lost in text, with Python's own pickle too
    | TEXT
    | st.binary(max_size=300)
)
KEYS = st.booleans() | st.integers() | TEXT | st.binary(max_size=20)
VALUES = st.recursive(
    SCALARS | st.binary(max_size=300).map(bytearray) | st.sets(KEYS) | st.frozensets(KEYS),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=30,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(VALUES, st.sampled_from(PROTOCOLS), st.booleans())
def test_python_values_round_trip(value: object, protocol: int, old_pickler: bool) -> None:
    if old_pickler:  # the one in Python, which frames and memoizes differently
        out = io.BytesIO()
        pickle._Pickler(out, protocol).dump(value)  # type: ignore[attr-defined]
        data = out.getvalue()
    else:
        data = pickle.dumps(value, protocol)
    read = loads(data)
    assert same(plainly(read.value), value)
    assert read.end == len(data) and read.protocol == (protocol if protocol >= 2 else 0)
    assert same(pickle.loads(dumps(read.value)), value)  # noqa: S301
    again = loads(dumps(read.value))
    assert same(plainly(again.value), value)
    assert dumps(again.value) == dumps(read.value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_long_values(protocol: int) -> None:
    value = {"text": "é" * 70_000, "bytes": bytes(70_000), "list": list(range(5000)), "int": -(2**3000)}
    assert same(pickle.loads(dumps(loads(pickle.dumps(value, protocol)).value)), value)  # noqa: S301


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_and_cyclic_values_keep_their_identity(protocol: int) -> None:
    shared, key = [1], "k" * 10
    loop: list[Any] = [shared, shared, (shared, key), {key: shared}]
    loop.append(loop)
    book: dict[str, Any] = {"loop": loop}
    book["self"] = book
    back: Any = pickle.loads(dumps(loads(pickle.dumps(book, protocol)).value))  # noqa: S301
    assert back["self"] is back
    inner = back["loop"]
    assert inner[4] is inner
    assert inner[0] is inner[1] is inner[2][0] is inner[3][key]
    assert inner[0] == [1]


def test_shared_tuples_and_bytes_are_written_once() -> None:
    big = (bytes(1000), "x" * 100)
    data = pickle.dumps([big] * 50 + [big[0]] * 50, 5)
    written = dumps(loads(data).value)
    assert len(written) < 2000
    back = pickle.loads(written)  # noqa: S301
    assert back[0] is back[49] and back[0][0] is back[99]


def test_a_tuple_in_a_cycle_is_read_and_refused_for_writing() -> None:
    items: list[Any] = []
    value = (items,)
    items.append(value)
    read = loads(pickle.dumps(value, 4)).value
    assert isinstance(read, tuple) and isinstance(read[0], list)
    again = loads(pickle.dumps(items, 4)).value  # begins at the list: writable
    back: Any = pickle.loads(dumps(again))  # noqa: S301
    assert back[0][0] is back


HAND_MADE = {
    "INT bool": (b"I01\nI00\n\x86.", (True, False)),
    "INT": (b"I-17\n.", -17),
    "LONG": (b"L123456789012345678901234567890L\n.", 123456789012345678901234567890),
    "LONG1 empty": (b"\x80\x02\x8a\x00.", 0),
    "LONG4": (b"\x80\x02\x8b\x03\x00\x00\x00\xff\xff\x7f.", 0x7FFFFF),
    "FLOAT": (b"F-1.5e3\n.", -1500.0),
    "STRING": (b"S'abc'\n.", "abc"),
    "STRING double": (b'S"a b"\n.', "a b"),
    "UNICODE": (b"Va\\u20acb\n.", "a€b"),
    "BINSTRING": (b"T\x03\x00\x00\x00abc.", "abc"),
    "SHORT_BINSTRING": (b"U\x02\xff\xfe.", b"\xff\xfe"),
    "BINBYTES8": (b"\x80\x04\x8e\x02\x00\x00\x00\x00\x00\x00\x00hi.", b"hi"),
    "BINUNICODE8": (b"\x80\x04\x8d\x02\x00\x00\x00\x00\x00\x00\x00hi.", "hi"),
    "BYTEARRAY8": (b"\x80\x05\x96\x02\x00\x00\x00\x00\x00\x00\x00hi.", bytearray(b"hi")),
    "DICT": (b"(S'a'\nI1\nd.", {"a": 1}),
    "LIST": (b"(I1\nI2\nl.", [1, 2]),
    "TUPLE": (b"(I1\nI2\nt.", (1, 2)),
    "POP": (b"I1\nI2\n0.", 1),
    "POP_MARK": (b"I1\n(I2\nI3\n1.", 1),
    "POP of a MARK": (b"I1\n(0.", 1),
    "DUP": (b"I1\n2\x86.", (1, 1)),
    "PUT GET": (b"I7\np300\ng300\n\x86.", (7, 7)),
    "LONG_BINPUT": (b"K\x07r\x00\x00\x00\x80j\x00\x00\x00\x80\x86.", (7, 7)),
    "duplicate key": (b"}(U\x01aK\x01U\x01aK\x02u.", {"a": 2}),
    "FROZENSET": (b"\x80\x04(K\x01K\x02\x91.", frozenset({1, 2})),
    "ADDITEMS": (b"\x80\x04\x8f(K\x01\x90.", {1}),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_opcodes_that_python_no_longer_writes(name: str) -> None:
    data, value = HAND_MADE[name]
    assert same(plainly(loads(data).value), value)


def test_every_opcode_is_known_or_refused_on_purpose() -> None:
    refused = {"PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
    for op in pickletools.opcodes:
        known = opcodes.TABLE[ord(op.code)] is not None
        assert known == (op.name not in refused), op.name


# --- objects ------------------------------------------------------------------------------------------


class HistoryBuffer:
    """As mmengine's: its statistics methods are saved by getattr."""

    def __init__(self, max_length: int = 10) -> None:
        self.max_length = max_length
        self._statistics_methods = {"mean": HistoryBuffer.mean}

    def mean(self) -> float:
        return float(self.max_length)


class OldEnum(enum.Enum):
    """As Python 3.11.0 to 3.11.3 saved every enum member."""

    A = 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (self.__class__, self._name_)


class Slots:
    __slots__ = ("a", "b")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slots) and self.a == other.a and self.b == other.b  # type: ignore[attr-defined]


class WithArgs:
    def __init__(self, a: int, *, b: int) -> None:
        self.a, self.b = a, b

    def __new__(cls, a: int = 0, *, b: int = 0) -> WithArgs:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (self.a,), {"b": self.b}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithArgs) and (self.a, self.b) == (other.a, other.b)


class Items(list[int]):
    note = ""


@pytest.fixture(autouse=True, scope="module")
def owner() -> Any:
    """A module that owns the classes above, as a library would."""
    module = types.ModuleType("library_of_classes")
    for kind in (HistoryBuffer, OldEnum, Slots, WithArgs, Items):
        kind.__module__ = module.__name__
        setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def slots() -> Slots:
    made = Slots()
    made.a, made.b = 1, [2]  # type: ignore[attr-defined]
    return made


def items() -> Items:
    made = Items([1, 2])
    made.note = "state"
    return made


OBJECTS: dict[str, Any] = {
    "namespace": lambda: argparse.Namespace(lr=0.1, betas=(0.9, 0.99), name="x"),
    "ordered": lambda: collections.OrderedDict(b=1, a=[2]),
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "counter": lambda: collections.Counter("hello"),
    "deque": lambda: collections.deque([1, 2, 3], 5),
    "simple": lambda: types.SimpleNamespace(a=1),
    "datetime": lambda: datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC),
    "timedelta": lambda: datetime.timedelta(days=1, seconds=2),
    "path": lambda: pathlib.PurePosixPath("/a/b"),
    "decimal": lambda: decimal.Decimal("1.25"),
    "uuid": lambda: uuid.UUID(int=5),
    "complex": lambda: 1 + 2j,
    "range": lambda: range(3, 9, 2),
    "type of None": lambda: type(None),
    "np scalar": lambda: np.float64(1.5),
    "np bool": lambda: np.bool_(True),
    "np array": lambda: np.arange(6, dtype=np.int16).reshape(2, 3),
    "np strings": lambda: np.array(["a", "bc"]),
    "np structured": lambda: np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "np fortran": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "np random": lambda: np.random.default_rng(3),
    "np random state": lambda: np.random.RandomState(3),
    "slots": slots,
    "newobj_ex": lambda: WithArgs(3, b=4),
    "items and state": items,
    "enum by getattr": lambda: OldEnum.A,
    "function by name": lambda: math.sqrt,
    "method by name": lambda: HistoryBuffer.mean,
    "history": lambda: HistoryBuffer(7),
}


def callable_name(call: Object) -> str:
    return str(call.cls) if isinstance(call.cls, Global) else "computed"


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.strides == b.strides and bool((a == b).all())
    if isinstance(a, np.random.Generator):
        return bool((a.random(5) == b.random(5)).all())
    if isinstance(a, np.random.RandomState):
        return bool((a.rand(5) == b.rand(5)).all())
    if isinstance(a, HistoryBuffer):
        return vars(a) == vars(b)
    return bool(a == b)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_come_back_in_the_library_that_owns_them(name: str, protocol: int) -> None:
    value = OBJECTS[name]()
    try:
        data = pickle.dumps(value, protocol)
    except (TypeError, ValueError, pickle.PicklingError) as error:
        pytest.skip(f"Python cannot either: {error}")
    read = loads(data)
    back = pickle.loads(dumps(read.value))  # noqa: S301
    assert type(back) is type(value)
    assert alike(pickle.loads(data), back)  # noqa: S301
    twice = loads(dumps(read.value))
    assert list(map(callable_name, twice.calls)) == list(map(callable_name, read.calls))
    if name == "items and state":
        assert back.note == "state"


@pytest.mark.parametrize(
    "data",
    [b"(iargparse\nNamespace\n(S'a'\nI1\ndb.", b"(cargparse\nNamespace\no(S'a'\nI1\ndb."],
    ids=["INST", "OBJ"],
)
def test_python_2_instances(data: bytes) -> None:
    read = loads(data)
    assert isinstance(read.value, Object) and read.value.is_a("argparse", "Namespace")
    back = pickle.loads(dumps(read.value))  # noqa: S301
    assert back == argparse.Namespace(a=1)


def test_numpy_1_names_are_kept() -> None:
    data = pickle.dumps(np.float32(2), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    read = loads(data)
    assert isinstance(read.value, Object) and read.value.is_a("numpy.core.multiarray", "scalar")
    assert b"numpy.core.multiarray\nscalar" in dumps(read.value)


def test_objects_keep_their_parts() -> None:
    value = loads(pickle.dumps(items(), 2)).value
    assert isinstance(value, Object)
    assert value.how == "newobj" and str(value.cls) == "library_of_classes.Items"
    assert value.items == [1, 2] and plain(value.state) == {"note": "state"}
    ex = loads(pickle.dumps(WithArgs(3, b=4), 4)).value
    assert isinstance(ex, Object) and ex.how == "newobj_ex" and ex.kwargs.get("b") == 4


def test_shared_objects_and_cycles_through_state() -> None:
    a = argparse.Namespace()
    a.me, a.peers = a, [a, a]
    back = pickle.loads(dumps(loads(pickle.dumps(a, 2)).value))  # noqa: S301
    assert back.me is back and back.peers[1] is back


def test_calls_name_every_callable_once_and_those_that_matter_every_time() -> None:
    data = pickle.dumps([argparse.Namespace(), argparse.Namespace(), OldEnum.A, HistoryBuffer(1)], 2)
    names = [str(c.cls) for c in loads(data).calls]
    assert names.count("argparse.Namespace") == 1
    assert names.count("__builtin__.getattr") == 2
    popped = b"\x80\x02cos\nsystem\nU\x02id\x85R0N."
    assert [str(c.cls) for c in loads(popped).calls] == ["os.system"]
    twice = b"\x80\x02](c_codecs\nencode\nU\x01aU\x06latin1\x86Rc_codecs\nencode\nU\x01aU\x05rot13\x86Re."
    assert len(loads(twice).calls) == 2


def test_deepspeed_classes() -> None:
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    dynamic = loss_scaler.DynamicLossScaler(2.0**16, 5, 1, 2, False, True, torch.float16)
    value = [loss_scaler.LossScaler(4.0), dynamic, ZeroStageEnum(2), fragment_address(numel=3, start=4)]
    for protocol in PROTOCOLS:
        back = pickle.loads(dumps(loads(pickle.dumps(value, protocol)).value))  # noqa: S301
        assert [type(x) for x in back] == [type(x) for x in value]
        assert [vars(x) for x in back[:2]] == [vars(x) for x in value[:2]]
        assert back[2:] == value[2:]
    by_name = (
        b"\x80\x02c__builtin__\ngetattr\ncdeepspeed.runtime.zero.config\nZeroStageEnum\nU\x09gradients\x86R."
    )
    assert pickle.loads(dumps(loads(by_name).value)) is ZeroStageEnum.gradients  # noqa: S301


class Address:
    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


def test_addresses_of_parameters_are_written_as_python_writes_them() -> None:
    """An object with integers by name, of which DeepSpeed has one for each parameter: in one go, and byte by
    byte what the long way makes; one whose state is shared, or holds anything else, goes the long way.
    """
    plain = [Address(i, 70_000 * i) for i in range(300)]
    sharing = Address(1, 2)
    sharing.__dict__ = plain[0].__dict__
    odd = Address(True, 2.5)  # type: ignore[arg-type]
    addresses = {f"layer.{i}": each for i, each in enumerate([*plain, sharing, odd, plain[3]])}
    data = pickle.dumps(addresses, 2)
    assert dumps(loads(data).value) == data


def test_persistent_ids() -> None:
    data = b"\x80\x02](U\x01aQU\x01bQe."
    assert loads(data).value[0].pid == "a"  # type: ignore[index]
    assert loads(data, persistent=lambda pid: pid).value == ["a", "b"]
    assert isinstance(loads(dumps(loads(data).value)).value[1], Persistent)  # type: ignore[index]


def test_several_pickles_in_a_row() -> None:
    data = pickle.dumps(1, 2) + pickle.dumps([2], 2) + b"rest"
    first = loads(data, exact=False)
    second = loads(data, start=first.end, exact=False)
    assert (first.value, second.value, data[second.end :]) == (1, [2], b"rest")


def test_lookups() -> None:
    data = b"\x80\x02}(U\x01aK\x01K\x01U\x03intU\x01aK\x02\x88U\x04boolu."
    node = loads(data).value
    assert isinstance(node, Dict)
    assert (node.get("a"), node.get(1), node.get("1"), node.get("i1")) == (2, "int", None, None)
    assert node.names() == ["a"] and "a" in node and "b" not in node
    changed = node.replace({"a": 3, "new": 4})
    assert plainly(changed)["a"] == 3 and changed.get("new") == 4 and changed.get(1) == "int"  # type: ignore[index]
    assert "a" not in node.replace({}, drop=["a"])


@pytest.mark.parametrize("make", [collections.OrderedDict, collections.Counter, dict])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_mappings(make: Any, protocol: int) -> None:
    pairs = as_mapping(loads(pickle.dumps(make({"a": 1, "b": 2}), protocol)).value)
    assert pairs is not None and [pairs.get("a"), pairs.get("b")] == [1, 2]


# --- what is refused ----------------------------------------------------------------------------------

P = b"\x80\x02"
REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "no STOP": P + b"N",
    "only PROTO": P,
    "empty stack at STOP": P + b".",
    "two values": P + b"NN.",
    "open MARK": P + b"N(.",
    "MARK over value": P + b"(N.",
    "bytes after STOP": P + b"N.N.",
    "protocol 6": b"\x80\x06N.",
    "PROTO twice": P + P + b"N.",
    "PROTO in the middle": b"N0" + P + b"N.",
    "unknown opcode": P + b"\xff.",
    "PERSID": P + b"Pabc\n.",
    "EXT1": P + b"\x82\x01.",
    "EXT2": P + b"\x83\x01\x00.",
    "EXT4": P + b"\x84\x01\x00\x00\x00.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "READONLY_BUFFER": b"\x80\x05N\x98.",
    "FRAME past the end": b"\x80\x04\x95\xff\x00\x00\x00\x00\x00\x00\x00N.",
    "FRAME of 2**63": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x80N.",
    "FRAME split": b"\x80\x04\x95\x02\x00\x00\x00\x00\x00\x00\x00NX\x01\x00\x00\x00a0.",
    "FRAME nested": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x95\x01\x00\x00\x00\x00\x00\x00\x00NN.",
    "BINUNICODE too long": P + b"X\xff\xff\xff\x7fabc.",
    "BINUNICODE8 of 2**62": P + b"\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "BINBYTES8 of 2**63": P + b"\x8e" + struct.pack("<Q", 2**63) + b"abc.",
    "BYTEARRAY8 of 2**62": P + b"\x96" + struct.pack("<Q", 2**62) + b"abc.",
    "BINSTRING negative": P + b"T\xff\xff\xff\xffabc.",
    "BINUNICODE not UTF-8": P + b"X\x02\x00\x00\x00\xff\xfe.",
    "LONG4 negative": P + b"\x8b\xff\xff\xff\xff.",
    "LONG4 of 20,000 bytes": P + b"\x8b" + struct.pack("<i", 20_000) + bytes(20_000) + b".",
    "LONG1 past the end": P + b"\x8a\xff\x00.",
    "INT of 100,000 digits": b"I" + b"9" * 100_000 + b"\n.",
    "LONG of 100,000 digits": b"L" + b"9" * 100_000 + b"L\n.",
    "INT with underscore": b"I1_0\n.",
    "INT with blanks": b"I 1\n.",
    "INT of letters": b"Iabc\n.",
    "INT in Arabic digits": "I٣\n.".encode(),
    "FLOAT of letters": b"Fabc\n.",
    "FLOAT of dots": b"F1.2.3\n.",
    "STRING unquoted": b"Sabc\n.",
    "STRING half": b"S'\n.",
    "STRING escaped": b"S'a\\x41'\n.",
    "UNICODE bad escape": b"V\\uZZZZ\n.",
    "line without end": b"I" + b"1" * 50,
    "BINGET of nothing": P + b"h\x05.",
    "GET of nothing": b"g5\n.",
    "GET negative": b"Np-1\n.",
    "PUT of 2**32": b"Np4294967296\n.",
    "BINPUT on nothing": P + b"q\x00N.",
    "MEMOIZE on nothing": b"\x80\x04\x94N.",
    "POP on nothing": P + b"0N.",
    "DUP on nothing": P + b"2.",
    "POP_MARK without MARK": P + b"N1N.",
    "TUPLE without MARK": P + b"Nt.",
    "TUPLE1 on nothing": P + b"\x85.",
    "TUPLE2 on one": P + b"N\x86.",
    "TUPLE3 on two": P + b"NN\x87.",
    "TUPLE2 across a MARK": P + b"N(N\x86.",
    "DICT odd": P + b"(Nd.",
    "SETITEM on a list": P + b"]NNs.",
    "SETITEM on a name": P + b"cos\nenviron\nNNs.",
    "SETITEMS odd": P + b"}(Nu.",
    "APPEND on a dict": P + b"}Na.",
    "APPEND on nothing": P + b"Na.",
    "APPENDS on a tuple": P + b")(Ne.",
    "ADDITEMS on a list": b"\x80\x04](N\x90.",
    "ADDITEMS on a frozenset": b"\x80\x04(\x91(N\x90.",
    "BUILD on a dict": P + b"}}b.",
    "BUILD on a name": P + b"cos\nsystem\n}b.",
    "BUILD twice": P + b"ca\nb\n)R}b}b.",
    "items after the state": P + b"cargparse\nNamespace\n)R}U\x06appendcos\nsystem\nsbU\x02ida.",
    "pairs after the state": P + b"cargparse\nNamespace\n)R}bNNs.",
    "REDUCE without a tuple": P + b"cos\nsystem\nNR.",
    "REDUCE on one": P + b")R.",
    "NEWOBJ without a tuple": P + b"ca\nb\nN\x81.",
    "NEWOBJ_EX without a dict": b"\x80\x04ca\nb\n)N\x92.",
    "OBJ without a class": P + b"(o.",
    "GLOBAL empty": P + b"c\n\n.",
    "GLOBAL one line": P + b"cos.",
    "GLOBAL long": P + b"c" + b"a" * 3000 + b"\nb\n.",
    "GLOBAL not UTF-8": P + b"c\xff\nb\n.",
    "STACK_GLOBAL of ints": b"\x80\x04K\x01K\x02\x93.",
    "STACK_GLOBAL of a Global": b"\x80\x04cos\nsystem\nU\x01a\x93.",
    "STACK_GLOBAL on one": b"\x80\x04U\x01a\x93.",
    "STACK_GLOBAL of a long name": b"\x80\x04U\x01aX\x00\x10\x00\x00" + b"a" * 4096 + b"\x93.",
    "BINPERSID on nothing": P + b"Q.",
    "MARK flood": P + b"(" * 200_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_pickles_are_refused(name: str) -> None:
    with pytest.raises(Reject) as caught, at_most(2_000_000):
        loads(REFUSED[name])
    assert caught.value.id == "pickle-damaged" and len(str(caught.value)) < 500


def dag(levels: int = 60) -> bytes:
    """Lists of two references to the level below: 2**levels leaves."""
    out = [P, b"](K\x01K\x01eq\x00"]
    for i in range(levels):
        out.append(b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]))
    return b"".join(out) + b"."


def deep(n: int = 200_000) -> bytes:
    return P + b"]" * n + b"a" * (n - 1) + b"."


def wide_dag() -> bytes:
    """Ten levels of a thousand references: 10**30 leaves."""
    out = [P, b"](" + b"N" * 1000 + b"eq\x00"]
    for i in range(10):
        out.append(b"0](" + (b"h" + bytes([i])) * 1000 + b"eq" + bytes([i + 1]))
    return b"".join(out) + b"."


BOMBS = {
    "dag": dag(),
    "wide dag": wide_dag(),
    "deep lists": deep(),
    "deep tuples": P + b")" + b"\x85" * 200_000 + b".",
    "deep dicts": P + b"}" + b"U\x01k}" * 100_000 + b"s" * 100_000 + b".",
    "deep calls": P + b"N" + b"\x85q\x000cset\na\nh\x00R" * 20_000 + b".",
    "itself": P + b"]q\x00h\x00a.",
    "dup flood": P + b"](N" + b"2" * 200_000 + b"e.",
    "memoize flood": b"\x80\x04N" + b"\x94" * 200_000 + b".",
    "colliding ints": P + b"}(" + b"".join(
        b"\x8a\x08" + struct.pack("<q", i * (2**61 - 1)) + b"N" for i in range(1, 4)
    ) + b"u.",
    "big int shared": P + b"\x8b\x00\x02\x00\x00" + b"\x7f" * 512 + b"q\x000](" + b"h\x00" * 300_000 + b"e.",
    "big bytes shared": P + b"B\x00\x00\x10\x00" + bytes(1 << 20) + b"q\x000](" + b"h\x00" * 20_000 + b"e.",
}  # fmt: skip


MULTIPLYING = {"dag", "wide dag", "big bytes shared"}  # the others cannot grow beyond their opcodes


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_bounded_time_and_memory(name: str) -> None:
    data = BOMBS[name]
    if name in MULTIPLYING:
        tracemalloc.start()
    with at_most(30_000_000):
        try:
            value = loads(data).value
            sum(1 for _ in walk(value))
            plain(value)
            dumps(value)
        except Reject:
            assert name == "big int shared"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 512 << 20


def test_a_pickle_over_the_limit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_BYTES", 100)
    with pytest.raises(Reject):
        loads(b"N" * 101)


WORK = {
    "pushed and popped": b"N0" * 50_000_000,
    "marked and popped": b"(NN1" * 25_000_000,
    "marks": b"(1" * 50_000_000,
    "names": b"ca\nb\n0" * 10_000_000,
}


@pytest.mark.parametrize("name", WORK)
def test_work_that_leaves_nothing_is_refused_at_once(name: str) -> None:
    with pytest.raises(Reject, match="throws away most") as caught:
        loads(P + WORK[name] + b"N.")
    assert int(str(caught.value.message).rpartition(" ")[2]) < 100_000  # the byte at which it stops


def test_limits_of_opcodes_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_OPCODES", 1000)
    monkeypatch.setattr(machine, "MAX_CALLS", 100)
    for data in (b"N" + b"q\0" * 2000, b"]" + b"Na" * 1000, b"ca\nb\n" * 101, b"]ca\nb\n" + b")R" * 100):
        with pytest.raises(Reject, match="more than"):
            loads(P + data + b".")


def test_long_logs_are_read() -> None:
    log = {"loss": [0.5 + i for i in range(200_000)], "lr": [np.float64(i) for i in range(20_000)]}
    value = loads(pickle.dumps(log, 2)).value
    assert isinstance(value, Dict)
    assert value.get("loss") == log["loss"]


def test_limits_of_stack_and_memo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MAX_STACK", 1000)
    monkeypatch.setattr(machine, "MAX_MEMO", 1000)
    for data in (P + b"N" * 2000 + b".", b"\x80\x04N" + b"\x94" * 2000 + b"."):
        with pytest.raises(Reject, match="limit"):
            loads(data)


def test_what_cannot_be_written() -> None:
    for value in (object(), [object()], Global("a\nb", "c"), {1: 2}):
        with pytest.raises(Reject):
            dumps(value)
    loop: list[Any] = []
    made = Object("reduce", Global("a", "b"), (loop,))
    loop.append(made)
    with pytest.raises(Reject):
        dumps(made)


# --- fuzzing ------------------------------------------------------------------------------------------


def real_pickles() -> list[bytes]:
    """data.pkl of files with everything that real checkpoints hold."""
    value = {
        "module": collections.OrderedDict(w=torch.zeros(2, 3), b=torch.zeros(3, dtype=torch.bfloat16)),
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("/a")),
        "numpy": [np.float64(1), np.arange(3)],
        "meta": {"epoch": 3, "time": datetime.datetime(2026, 1, 1), "names": {"a", "b"}},
        "counter": collections.Counter("abc"),
        "param": torch.nn.Parameter(torch.ones(2)),
        "f8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    out = []
    for protocol in (2, 4):
        file = io.BytesIO()
        torch.save(value, file, pickle_protocol=protocol)
        import zipfile

        with zipfile.ZipFile(file) as archive:
            out.append(archive.read("archive/data.pkl"))
    return [*out, *(pickle.dumps(value["meta"], p) for p in PROTOCOLS)]


REAL = real_pickles()


def only_reject(data: bytes) -> None:
    try:
        with at_most(20_000_000):
            value = loads(data).value
            plain(value)
            for _ in walk(value):
                pass
            again = loads(dumps(value)).value
            assert dumps(again) == dumps(value)
    except Reject:
        pass


def mutate(data: bytes, rng: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw))
        match rng.randrange(6):
            case 0:
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at] = rng.choice(b"(.012]})lestdbaQRcoi\x81\x85\x86\x87\x93\x94\x90\x91\x92")
            case 2:
                del raw[at : at + rng.randint(1, 8)]
            case 3:
                raw[at:at] = rng.randbytes(rng.randint(1, 4))
            case 4:
                end = at + rng.randint(1, 40)
                raw[at:at] = raw[at:end]
            case _:
                raw[at] = rng.randrange(256)
        if not raw:
            return b""
    return bytes(raw)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 5))
def test_random_bytes(data: bytes, protocol: int) -> None:
    only_reject(data)
    only_reject(b"\x80" + bytes([protocol]) + data + b".")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes]), max_size=30),
    st.binary(max_size=8),
)
def test_random_opcodes(ops: list[bytes], tail: bytes) -> None:
    only_reject(P + b"".join(ops) + tail + b".")


def test_mutations_of_real_pickles() -> None:
    rng = random.Random(7)
    for _ in range(1500):
        only_reject(mutate(rng.choice(REAL), rng))


@pytest.mark.heavy
def test_many_mutations_of_real_pickles() -> None:
    rng = random.Random()
    for _ in range(100_000):
        only_reject(mutate(rng.choice(REAL), rng))


def test_every_truncation_of_real_pickles() -> None:
    for data in REAL:
        for n in range(len(data)):
            with pytest.raises(Reject):
                loads(data[:n])


def test_many_tensors_cost_as_much_as_each() -> None:
    storage = Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 4))
    name = Global("torch._utils", "_rebuild_tensor_v2")

    def work(tensors: int) -> float:
        value = Dict.of(
            (f"layer.{i}.weight", Object("reduce", name, (storage, 0, (2, 2), (2, 1), False)))
            for i in range(tensors)
        )
        data = dumps(value)
        with at_most(20_000_000) as lines:
            loads(data)
        return lines.count / tensors

    assert work(10_000) < 1.1 * work(1000)
    assert work(10_000) < 1000


def test_copyreg_is_left_alone() -> None:
    # reading never registers or resolves anything
    before = dict(copyreg.dispatch_table)
    loads(P + b"ccopyreg\nadd_extension\nU\x01aU\x01bK\x05\x87R.")
    assert copyreg.dispatch_table == before


@pytest.mark.parametrize("data", [b"\x80\x02}q\x00h\x00Ns.", b"\x80\x02N" + b")R" * 2000 + b"."])
def test_plain_of_a_dict_that_is_its_own_key_and_of_calls_of_calls(data: bytes) -> None:
    assert plain(loads(data).value) is not None
