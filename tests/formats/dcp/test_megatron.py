"""What Megatron-Core saves (`torch_dist`): read as it meant it, checked, and not taken for what it is not."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import run
from support import FIXTURES, as_torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from ckpttools.checks import verify
from ckpttools.errors import Unsupported
from ckpttools.formats import open_checkpoint
from ckpttools.operations.convert import convert

RUN = FIXTURES / "megatron/iter_0000003"
TRUTH = torch.load(FIXTURES / "megatron/truth.pt", weights_only=True)
MOMENTS = {"fp32_param": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def ids(path: Path) -> set[str]:
    return {f.id for f in verify(path).findings if f.severity != "info"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(RUN, tmp_path / RUN.name)


def test_every_tensor_is_what_the_ranks_held() -> None:
    """The state's names have the kind before the parameter's name, without planner_data to say so."""
    found = open_checkpoint(RUN)
    (group,) = found.groups
    held = {name: as_torch(ref) for name, ref in found.tensors.items()}
    for saved, kind in MOMENTS.items():
        held |= {f"optimizer.state.{saved}.{n}": as_torch(ref) for n, ref in group.state[kind].items()}
    assert held.keys() == TRUTH.keys() and all(torch.equal(held[name], TRUTH[name]) for name in TRUTH)
    assert found.training.step == 3 and found.layout.ranks == 2
    assert found.client["common"]["num_floating_point_operations_so_far"] == 12  # type: ignore[index,call-overload]


def test_inspect_and_verify() -> None:
    shown = json.loads(run("inspect", RUN, "--json").out)
    assert (shown["step"], shown["variant"], shown["parameters"]) == (3, "megatron", 228)
    assert {Path(file["path"]).name for file in shown["files"]} == {path.name for path in RUN.iterdir()}
    assert run("inspect", RUN).out.splitlines()[1] == "step 3"
    ran = run("verify", RUN)
    assert ran.code == 0 and "warning" not in ran.out and "class-unknown" not in ran.out, ran


@dataclass
class MCoreMetadata(Metadata):
    mcore_data: dict[str, dict[str, object]] = field(default_factory=dict)


def test_the_metadata_of_another_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.15 saves a class of its own, which has one field more."""
    module = ModuleType("megatron.core.dist_checkpointing.strategies.torch")
    module.MCoreMetadata = MCoreMetadata  # type: ignore[attr-defined]
    monkeypatch.setattr(MCoreMetadata, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "megatron", ModuleType("megatron"))
    saved = vars(FileSystemReader(folder).read_metadata())
    names = [each.name for each in fields(MCoreMetadata)]
    made = MCoreMetadata(**{name: saved[name] for name in names if name in saved})
    made.mcore_data = {
        "decoder.layers.mlp.linear_fc1.weight": {"nd_reformulated_orig_global_shape": (2, 12, 4)}
    }
    (folder / ".metadata").write_bytes(pickle.dumps(made))
    assert b"MCoreMetadata" in (folder / ".metadata").read_bytes()
    one, two = open_checkpoint(RUN), open_checkpoint(folder)
    assert [(n, r.shape) for n, r in one.tensors.items()] == [(n, r.shape) for n, r in two.tensors.items()]
    assert ids(folder) == set() and two.training.step == 3


@pytest.mark.parametrize("name", [path.name for path in RUN.iterdir()])
def test_a_file_that_is_gone_or_damaged(name: str, folder: Path) -> None:
    path = folder / name
    data = path.read_bytes()
    if name != "metadata.json":
        path.write_bytes(data[: len(data) // 2])
        assert ids(folder), name
    path.unlink()
    assert ids(folder) & {"shard-missing", "metadata-missing"}, name
    path.write_bytes(data)
    assert ids(folder) == set()


def test_somebody_elses_files_are_no_concern(folder: Path) -> None:
    other = FIXTURES / "dcp/fsdp2_ws2"
    shutil.copytree(other, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("x"))
    for path in folder.iterdir():
        if not (other / path.name).exists():
            path.unlink()
    (folder / "metadata.json").write_text('["a list"]')
    assert ids(folder) == set()


@pytest.mark.parametrize("to", ["zero0", "zero2", "universal"])
def test_deepspeed_needs_settings_that_are_in_no_file(to: str, tmp_path: Path) -> None:
    """Which parameter is in which group is not saved: a folder without lr stops at its first step."""
    with pytest.raises(Unsupported) as caught:
        convert(RUN, tmp_path / "out", to=to)  # type: ignore[arg-type]
    assert caught.value.id == "state-incomplete" and list(tmp_path.iterdir()) == []
    made = convert(RUN, tmp_path / "anew", to=to, reset_optimizer=True)  # type: ignore[arg-type]
    found = open_checkpoint(made.destination)
    assert {
        n: torch.equal(as_torch(r), TRUTH[f"optimizer.state.fp32_param.{n}"]) for n, r in found.master.items()
    }


def test_what_the_result_is_not_is_said(tmp_path: Path) -> None:
    made = convert(RUN, tmp_path / "out", to="dcp")
    notes = " ".join(made.plan.notes)
    assert "Megatron does not load the result" in notes and "no optimizer settings" in notes
    found = open_checkpoint(made.destination)
    one, two = (checkpoint.client["common"] for checkpoint in (found, open_checkpoint(RUN)))
    assert isinstance(one, dict) and isinstance(two, dict) and "Namespace" in str(one["args"])
    assert {**one, "args": None} == {**two, "args": None}
    ran = run("extract", RUN, tmp_path / "w.safetensors")
    assert ran.code == 0 and "common" in ran.err, ran
