"""Verdicts on what a pickle would call: nothing real is dangerous, everything that runs something is."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import functools
import io
import logging
import math
import os
import pathlib
import pickle
import sys
import uuid
import zipfile
import zoneinfo
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch

from ckpttools.containers.pickles import Dict, Global, Object, Reject, loads
from ckpttools.containers.pickles.arguments import CHECKS
from ckpttools.containers.pickles.judge import Verdict, dangers, judge, judge_calls
from ckpttools.containers.pickles.known import ARGUMENTS_DECIDE, BY_ARGUMENTS, KNOWN
from ckpttools.containers.pickles.names import STORAGE
from ckpttools.containers.torch_file import read_torch_file

FIXTURES = Path(__file__).parents[2] / "fixtures"
SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".tar"}


def verdicts(data: bytes) -> dict[str, Verdict]:
    return {j.name: j.verdict for j in judge(loads(data))}


def call(name: str, *args: object) -> Object:
    module, _, last = name.rpartition(".")
    return Object("reduce", Global(module, last), args)


# --- nothing real is dangerous ------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "namespace": argparse.Namespace(a=1),
    "numpy": [np.float64(1), np.arange(3), np.array(["a"]), np.dtype("f4"), np.bool_(True), np.zeros(0)],
    "numpy structured": np.zeros(2, dtype=[("a", "i4")]),
    "numpy masked": np.ma.array([1, 2], mask=[0, 1]),
    "numpy random": [np.random.default_rng(1), np.random.RandomState(1), np.random.PCG64(3)],
    "datetime": [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), datetime.date(2026, 1, 1)],
    "time zone": datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
    "path": [pathlib.Path("/a"), pathlib.PurePosixPath("b"), pathlib.PureWindowsPath("c")],
    "collections": [collections.Counter("ab"), collections.deque([1]), collections.OrderedDict(a=1)],
    "defaultdict": [collections.defaultdict(kind) for kind in (list, int, bytes)],
    "nested defaultdict": collections.defaultdict(functools.partial(collections.defaultdict, list)),
    "sets": [{1, 2}, frozenset("a"), 1j, range(3), slice(1), b"bytes", b"", bytearray(b"a"), type(None)],
    "numbers": [decimal.Decimal("1"), uuid.UUID(int=1)],
    "partial": functools.partial(torch.optim.AdamW, lr=0.1),
    "logger": logging.getLogger("x"),
    "torch": [torch.ones(2), torch.Size([1]), torch.device("cpu"), torch.float16],
    "parameter": torch.nn.Parameter(torch.ones(1)),
    "torch odd": [torch.eye(2).to_sparse(), torch.max(torch.ones(2, 2), dim=0), torch.__version__],
    "module": torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU()),
    "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]),
    "exception": ValueError("x"),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", VALUES)
def test_ordinary_values_are_not_dangerous(name: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"value": VALUES[name]}, path, pickle_protocol=protocol)
    judged = judge(read_torch_file(path).pickle)
    assert [j for j in judged if j.verdict is Verdict.DANGEROUS] == []
    if name not in ("module", "optimizer", "partial", "torch odd"):
        assert [j for j in judged if j.verdict is Verdict.UNKNOWN] == []
    assert judge_calls([]) == ()


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(FIXTURES.rglob("*")) if p.suffix in SUFFIXES and p.is_file()][::7] or [None],
    ids=lambda p: str(p.relative_to(FIXTURES)) if p else "none",
)
def test_no_fixture_is_dangerous(path: Path | None) -> None:
    if path is None:
        pytest.skip("no fixtures")
    if path.name == "training_args.bin":
        return
    judged = judge(read_torch_file(path).pickle)
    assert [j for j in judged if j.verdict is Verdict.DANGEROUS] == []


HELD = {
    "function of torch": torch.nn.functional.relu,
    "builtin of torch": torch.nn.functional.gelu,
    "function of Python": math.sqrt,
    "class": torch.optim.AdamW,
    "partial": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "partial of a class": functools.partial(torch.nn.LayerNorm, eps=1e-6),
    "partial of partials": functools.partial(functools.partial(max, 1), 2),
    "defaultdict of a partial": collections.defaultdict(functools.partial(dict, a=1), x={"a": 1}),
    "layer": torch.nn.TransformerEncoderLayer(4, 1, 8, activation=torch.nn.functional.gelu),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", HELD)
def test_what_is_only_held_runs_nothing(name: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"value": HELD[name]}, path, pickle_protocol=protocol)
    assert read_torch_file(path).dangers == ()
    assert torch.load(path, weights_only=False)  # and it loads


def test_what_a_partial_holds_is_named() -> None:
    data = pickle.dumps({"at_end": functools.partial(os.system, "id")})
    (judged,) = [j for j in judge(loads(data)) if j.verdict is Verdict.DANGEROUS]
    assert judged.what == "would import and hold posix.system, which it does not call"


class Around:
    """Reached again from its own constructor's arguments and from a tuple: picklers pop what they began."""

    def __init__(self, inside: list[object]) -> None:
        self.inside = inside

    def __reduce__(self) -> Any:
        return Around, (self.inside,)


def test_objects_that_contain_themselves_are_not_dangerous() -> None:
    inside: list[object] = []
    made, looped = Around(inside), (inside, Around)
    inside += [made, looped]
    for protocol in range(2, 6):
        data = pickle.dumps((made, looped), protocol)
        assert b"0" in data
        assert {j.verdict for j in judge(loads(data))} == {Verdict.UNKNOWN}


def test_mmengine_and_deepspeed_by_getattr() -> None:
    history = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
    stage = b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n"
    one_cycle = b"cmmengine.optim.scheduler.param_scheduler\nOneCycleParamScheduler\n"
    old_torch = b"ctorch.optim.lr_scheduler\nOneCycleLR\n"
    annealing = ((one_cycle, "_annealing_cos"), (old_torch, "_annealing_linear"))
    for owner, name in ((history, "mean"), (history, "statistics"), (stage, "gradients"), *annealing):
        for module in ("__builtin__", "builtins"):
            data = hostile.P + hostile.call(module, "getattr", owner, hostile.text(name)) + b"."
            assert verdicts(data) == {"builtins.getattr": Verdict.KNOWN}


def test_another_private_attribute_is_dangerous() -> None:
    data = hostile.P + hostile.call(
        "builtins", "getattr", b"ctorch.optim.lr_scheduler\nOneCycleLR\n", hostile.text("_annealing_x")
    )
    assert verdicts(data + b".") == {"builtins.getattr": Verdict.DANGEROUS}


def test_library_classes_are_unknown() -> None:
    names = [
        "omegaconf.dictconfig.DictConfig",
        "__main__.Config",
        "timm.utils.ModelEma",
        "lightning.fabric.X",
    ]
    for name in names:
        (judged,) = judge_calls([call(name, 1)])
        assert (judged.verdict, judged.what) == (Verdict.UNKNOWN, f"unknown class {name}, shown as data")
    nested = Object("reduce", call("builtins.getattr", Global("lib.mod", "Outer"), "Inner"), ())
    assert [j.verdict for j in judge_calls([nested])] == [Verdict.UNKNOWN]


# --- what runs something is dangerous -----------------------------------------------------------------


@pytest.mark.parametrize("name", hostile.payloads(Path()))
def test_payloads_are_dangerous(name: str) -> None:
    judged = judge(loads(hostile.payloads(Path("/x"))[name]))
    bad = [j for j in judged if j.verdict is Verdict.DANGEROUS]
    assert bad, judged
    for j in bad:
        assert j.what.startswith("would ") and j.what.isprintable() and len(j.what) < 400


def test_the_text_names_the_call() -> None:
    (judged,) = judge_calls([call("os.system", "id")])
    assert judged.what == "would run os.system('id')"
    (judged,) = judge_calls([call("os.system", "a" * 10_000, *range(100))])
    assert len(judged.what) < 250
    (judged,) = judge_calls([call("posix.system", "\x1b[2J\u202e\n")])
    assert judged.what.isprintable() and "\x1b" not in judged.what
    shared: list[object] = []
    for _ in range(100):
        shared = [shared, shared]
    (judged,) = judge_calls([call("os.system", shared, Dict(), 2**4000, b"x" * 1000, None)])
    assert len(judged.what) < 250


def test_equal_judgements_are_given_once() -> None:
    assert len(judge_calls([call("os.system", "id"), call("os.system", "id"), call("os.system", "ls")])) == 2


DANGEROUS = """
os.system posix.system nt.system subprocess.Popen subprocess.run builtins.exec builtins.open
builtins.input builtins.__import__ builtins.compile builtins.map builtins.filter builtins.setattr
builtins.globals builtins.vars importlib.import_module runpy.run_module pty.spawn shutil.rmtree
socket.socket ctypes.CDLL code.InteractiveInterpreter bdb.Bdb.run pdb.run timeit.timeit profile.run
cProfile.run asyncio.run multiprocessing.Process threading.Thread webbrowser.open
urllib.request.urlopen tempfile.mktemp operator.methodcaller operator.attrgetter operator.itemgetter
functools.reduce types.FunctionType types.CodeType marshal.loads shelve.open sqlite3.connect
zipfile.ZipFile commands.getoutput cPickle.loads pip.main pip._internal.main torch.load
torch.hub.load torch.jit.load torch.utils.cpp_extension.load_inline torch.serialization.load
torch.fx.graph_module.reduce_graph_module torch.distributed.rpc.rpc_sync torch.ops.load_library
numpy.load numpy.f2py.crackfortran.myeval numpy.testing._private.utils.runstring pandas.read_pickle
joblib.load cloudpickle.loads dill.loads sklearn.utils.deprecation.load some.library.os.system
some.library.subprocess.Popen six.moves.builtins.eval torch.storage._load_from_bytes
test.support.script_helper.run
"""


@pytest.mark.parametrize("name", DANGEROUS.split())
def test_dangerous_names(name: str) -> None:
    assert [j.verdict for j in judge_calls([call(name, "x")])] == [Verdict.DANGEROUS]


def test_every_function_of_the_standard_library_outside_the_table() -> None:
    for module in sys.stdlib_module_names:
        assert judge_calls([call(f"{module}.something", "x")])[0].verdict is Verdict.DANGEROUS


def test_tables_agree() -> None:
    # the reader keeps every call of those whose arguments decide
    assert {*CHECKS, STORAGE} == BY_ARGUMENTS
    for name in CHECKS:
        assert any(name.endswith("." + last) for last in ARGUMENTS_DECIDE), name
    assert not KNOWN & set(CHECKS)


def test_known_names_exist() -> None:
    # a misspelt name would make a real file dangerous; old and foreign ones cannot be looked up
    import importlib

    for name in sorted(KNOWN):
        module, _, last = name.rpartition(".")
        if module.split(".")[0] in (
            "collections",
            "datetime",
            "argparse",
            "decimal",
            "uuid",
            "torch",
            "types",
        ):
            assert hasattr(importlib.import_module(module), last), name


def test_a_real_bomb_of_python() -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return exec, ("1/0",)

    for protocol in range(6):
        judged = judge(loads(pickle.dumps(Bomb(), protocol)))
        assert [j.what for j in judged] == ["would run builtins.exec('1/0')"]


def test_methods_put_into_a_state_are_refused() -> None:
    with pytest.raises(Reject):
        loads(hostile.damaged_pickles()["method in state"])


def test_pickles_of_torch_in_other_protocols() -> None:
    for protocol in (2, 3, 4, 5):
        out = io.BytesIO()
        torch.save({"a": torch.ones(2, dtype=torch.uint16)}, out, pickle_protocol=protocol)
        with zipfile.ZipFile(out) as archive:
            assert set(verdicts(archive.read("archive/data.pkl")).values()) == {Verdict.KNOWN}


def test_a_tensor_in_a_plain_pickle() -> None:
    """Its storage is what torch.save wrote before zips, which loading unpickles again."""

    class Run:
        def __reduce__(self) -> object:
            return print, ("ran",)

    saved = {"mean": torch.arange(3.0), "std": torch.ones(2, dtype=torch.bfloat16)}
    for protocol in (2, 4):
        assert dangers(judge(loads(pickle.dumps(saved, protocol)))) == ()
    inner = io.BytesIO()
    torch.save({"w": Run()}, inner, _use_new_zipfile_serialization=False)
    for raw in (inner.getvalue(), inner.getvalue()[:40], b"PK\x03\x04", pickle.dumps(saved)):
        (judged,) = judge_calls([call("torch.storage._load_from_bytes", raw)])
        assert judged.verdict is Verdict.DANGEROUS
