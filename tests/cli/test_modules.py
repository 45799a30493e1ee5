"""Pickled nn.Modules and weights under other names: read as data, with the names that state_dict gives."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Ckpt
from support import FIXTURES, tensor_differences
from torch import nn

from ckpttools.containers.pickles import loads
from ckpttools.errors import UsageError
from ckpttools.formats import Source, open_checkpoint, read
from ckpttools.formats import torch as torch_files

KINDS: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip 4": {"pickle_protocol": 4},
    "legacy": {"_use_new_zipfile_serialization": False},
}


class Net(nn.Module):
    """Tied, nested, shared, absent, non-persistent and half precision members."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.emb.weight
        self.body = nn.Sequential(
            nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
        )
        self.again = self.body[0]
        self.blocks = nn.ModuleList(
            [nn.Conv2d(1, 2, 3), nn.ModuleDict({"a.b".replace(".", "_"): nn.PReLU()})]
        )
        self.register_parameter("absent", None)
        self.register_buffer("kept", torch.arange(3.0).half())
        self.register_buffer("dropped", torch.ones(7), persistent=False)
        self.register_buffer("none", None)
        self.attention = nn.TransformerEncoderLayer(4, 2, 8)
        self.activation = nn.functional.gelu
        self.lonely = nn.Parameter(torch.randn(2, 3).t(), requires_grad=False)


class Wrapped(nn.Module):
    """As DistributedDataParallel and DataParallel hold theirs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def same(path: Path, expected: dict[str, torch.Tensor], key: str | None = None) -> bool:
    checkpoint = read(Source(format=torch_files.FORMAT, target=path, root=path, how="", key=key))
    return list(checkpoint.tensors) == list(expected) and not tensor_differences(checkpoint.tensors, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["module", "under model", "wrapped", "ema"])
def test_names_and_values_are_those_of_state_dict(form: str, kind: str, tmp_path: Path) -> None:
    net = Net()
    path = tmp_path / "a.pt"
    value: dict[str, object] = {"module": net, "under model": {"model": net, "epoch": 3}}
    value |= {"wrapped": Wrapped(net), "ema": {"ema": net}}
    key = "ema" if form == "ema" else None
    torch.save(value[form], path, **KINDS[kind])
    assert same(path, net.state_dict(), key)
    checkpoint = read(Source(format=torch_files.FORMAT, target=path, root=path, how="", key=key))
    assert {"head.weight": "emb.weight", "again.weight": "body.0.weight"}.items() <= checkpoint.shared.items()


def test_a_module_that_cannot_be_imported(tmp_path: Path, ckpt: Ckpt) -> None:
    code = """
import sys, types, torch
made = types.ModuleType("somebodys_code")
class Net(torch.nn.Linear): pass
Net.__module__, made.Net = "somebodys_code", Net
sys.modules["somebodys_code"] = made
torch.manual_seed(1)
torch.save(Net(2, 3), sys.argv[1])
"""
    path = tmp_path / "net.pt"
    subprocess.run([sys.executable, "-c", code, path], check=True)
    torch.manual_seed(1)
    assert same(path, nn.Linear(2, 3).state_dict())
    assert ckpt("verify", path).code == ckpt("inspect", path).code == 0
    assert ckpt("extract", path, tmp_path / "out.safetensors").code == 0


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_module_that_holds_itself(protocol: int, tmp_path: Path, ckpt: Ckpt) -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    net._modules["1"] = net
    path = tmp_path / "a.pt"
    torch.save(net, path, pickle_protocol=protocol)
    assert ckpt("verify", path).code == 1


OTHERS = {
    "gan": ({"net_G": {"w": torch.ones(2)}, "net_D": {"v": torch.ones(3)}, "epoch": 1}, "net_G", ["w"]),
    "second": ({"net_G": {"w": torch.ones(2)}, "net_D": {"v": torch.ones(3)}}, "net_D", ["v"]),
    "dotted": ({"ema": {"shadow": {"a.b": torch.ones(2)}}}, "ema.shadow", ["a.b"]),
    "a key with dots": ({"my.net": {"w": torch.ones(2)}}, "my.net", ["w"]),
    "in a list": ({"nets": [{"w": torch.ones(2)}, {"v": torch.ones(2)}]}, "nets.1", ["v"]),
    "part of a module": ({"m": nn.Sequential(nn.Linear(1, 1))}, "m", ["0.weight", "0.bias"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_under_another_key(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    value, key, names = OTHERS[name]
    path = tmp_path / "a.pt"
    torch.save(value, path)
    refused = ckpt("verify", path)
    assert refused.code == 2 and "[no-weights]" in refused.err
    assert f"--key {({'second': 'net_G', 'in a list': 'nets.0'}).get(name, key)}" in refused.err
    for command in (("verify",), ("verify", "--quick"), ("inspect", "--tensors")):
        done = ckpt(*command, path, "--key", key)
        assert done.code == 0, done.err
    out = tmp_path / "out.safetensors"
    assert ckpt("extract", path, out, "--key", key).code == 0
    assert list(open_checkpoint(out).tensors) == sorted(names) or list(open_checkpoint(out).tensors) == names
    for wrong in ("net_X", "epoch", "net_G.w.x", ""):
        assert ckpt("verify", path, "--key", wrong).code == 2


def test_a_list_of_tensors_is_read_by_place(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save([torch.ones(2), nn.Parameter(torch.zeros(3))], path)
    assert list(open_checkpoint(path).tensors) == ["0", "1"]
    assert ckpt("verify", path).code == 0


def test_a_key_is_for_single_files(tmp_path: Path, ckpt: Ckpt) -> None:
    done = ckpt("verify", FIXTURES / "deepspeed-0.19.8" / "z2_groups_ws2", "--key", "module")
    assert done.code == 2 and "--key" in done.err


class Ordered:
    """Pickled as a call of OrderedDict with a list of pairs, as Python 2 did."""

    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs

    def __reduce__(self) -> Any:
        return collections.OrderedDict, (self.pairs,)


@pytest.mark.parametrize("pair", [list, tuple])
@pytest.mark.parametrize("form", ["bare", "under model", "in groups"])
def test_an_ordered_dict_made_from_a_list(form: str, pair: Any, tmp_path: Path, ckpt: Ckpt) -> None:
    weights = {"w": torch.ones(2), "b": torch.zeros(3)}
    made: Any = Ordered([pair(item) for item in weights.items()])
    if form == "under model":
        made = Ordered([pair(("model", made)), pair(("epoch", 3))])
    if form == "in groups":
        made = {"model": made, "optimizer": Ordered([pair(("state", Ordered([])))])}
    path = tmp_path / "a.pt"
    torch.save(made, path)
    assert same(path, weights)
    assert ckpt("verify", path).code == ckpt("inspect", path).code == 0


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict(), "the state of an optimizer"),
        ({"base_lrs": [0.1], "last_epoch": 3, "_step_count": 4}, "the state of a learning rate scheduler"),
        (collections.Counter("ab"), "a dict whose keys are a, b"),
        (slice(1), "an object of class"),
    ],
    ids=["optimizer.pt", "scheduler.pt", "counter", "object"],
)
def test_files_without_weights_say_what_they_are(value: Any, what: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "optimizer.pt"
    torch.save(value, path)
    for command in ("verify", "inspect"):
        done = ckpt(command, path)
        assert done.code == 2 and what in done.err and "not-a-checkpoint" in done.err


def test_training_arguments(tmp_path: Path, ckpt: Ckpt) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "training_args.bin"
    torch.save(transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), path)
    done = ckpt("verify", path)
    assert done.code == 2 and "an object of class transformers.training_args.TrainingArguments" in done.err


def test_nothing_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(Net(), path)
    code = "import sys; from pathlib import Path; from ckpttools.formats import open_checkpoint\n"
    code += (
        f"assert len(open_checkpoint(Path({str(path)!r})).tensors) > 20\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert loads(b"\x80\x02N.").names == []


def test_the_error_is_one_of_usage(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"net_G": {"w": torch.ones(1)}}, path)
    with pytest.raises(UsageError):
        open_checkpoint(path)
