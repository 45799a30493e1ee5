"""Checkpoints of real torch: read as exactly what its ranks held when they saved them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from commands import run
from support import FIXTURES, as_torch, identical, name_of
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import lr_scheduler

from ckpttools.checks import verify
from ckpttools.errors import CkptError, Unsupported, UsageError
from ckpttools.findings import INFO
from ckpttools.formats import locate, open_checkpoint
from ckpttools.operations.convert import convert
from ckpttools.operations.rebase import rebase
from ckpttools.tensors import TensorRef, Tiles

from .compare import edited, unlike

SAMPLES = sorted(p for p in (FIXTURES / "dcp").iterdir() if p.name != "truth")
PER_PARAMETER = ("flat", "titan")


@pytest.mark.parametrize("path", SAMPLES, ids=name_of)
def test_every_sample_is_what_the_ranks_held(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    truth = torch.load(path.parent / "truth" / f"{path.name}.pt", weights_only=True)
    assert unlike(checkpoint, truth, groups=checkpoint.layout.variant not in PER_PARAMETER) == []
    assert {"count", "mask"} <= checkpoint.buffers <= {"count", "mask"}
    verdict = verify(path, workers=1)
    assert [f for f in verdict.findings if f.severity != INFO] == []
    assert verdict.format == "dcp"


def test_layouts() -> None:
    found = {path.name: open_checkpoint(path).layout for path in SAMPLES}
    assert {name: layout.variant for name, layout in found.items()} == {
        "accelerate_ws2": "accelerate",
        "app_ws2": "nested",
        "ddp_ws2": "nested",
        "flat_ws2": "flat",
        "fsdp2-bf16_ws4": "nested",
        "fsdp2_ws2": "nested",
        "hsdp_ws4": "nested",
        "plain-sgd_ws1": "nested",
        "step-3": "titan",
        "tp_ws4": "nested",
    }
    shards = {"ddp_ws2": 1, "plain-sgd_ws1": 1, "fsdp2-bf16_ws4": 4, "tp_ws4": 4}
    assert {name: layout.dp_degree for name, layout in found.items()} == {
        name: shards.get(name, 2) for name in found
    }


def test_columns_are_tiles_and_rows_are_ranges() -> None:
    tensors = open_checkpoint(FIXTURES / "dcp/tp_ws4").tensors
    assert [type(chunk) for chunk in tensors["down.weight"].chunks] == [Tiles, Tiles]
    assert not any(isinstance(chunk, Tiles) for chunk in tensors["up.weight"].chunks)


def test_what_is_saved_beside_them() -> None:
    checkpoint = open_checkpoint(FIXTURES / "dcp/fsdp2_ws2")
    assert (checkpoint.training.step, checkpoint.training.epoch) == (3, 1)
    assert checkpoint.training.val_loss == 0.25
    meta = checkpoint.client["meta"]
    assert (meta["name"], meta["sizes"], meta["list"]) == ("run", (1, 2), [1, "a"])
    assert identical(as_torch(meta["rng"]), torch.arange(5, dtype=torch.uint8))


def app() -> dict[str, object]:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.named_parameters(), lr=0.5)
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    names = ["weight", "bias"]
    state["state"] = {names[i]: each for i, each in state["state"].items()}
    state["param_groups"][0]["params"] = names
    return {"model": layer.state_dict(), "optim": state, "scheduler": {"last_epoch": 1}}


def test_counters_beside_the_application(tmp_path: Path) -> None:
    """torch's tutorial saves {"app": ...}; training code adds its counters beside it."""
    held = app()
    dcp.save({"app": held, "step": 5, "epoch": 2}, checkpoint_id=tmp_path / "in", no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "in")
    assert set(checkpoint.tensors) == {"weight", "bias"}
    assert [list(group.params) for group in checkpoint.groups] == [["weight", "bias"]]
    assert (checkpoint.training.step, checkpoint.training.epoch) == (5, 2)
    convert(tmp_path / "in", tmp_path / "out", to="dcp")
    found = {"app": app(), "step": 0, "epoch": 0}
    dcp.load(found, checkpoint_id=tmp_path / "out", no_dist=True)
    assert (found["step"], found["epoch"]) == (5, 2)
    assert torch.equal(found["app"]["model"]["weight"], held["model"]["weight"])  # type: ignore[index]


def test_an_optimizer_that_numbers_its_parameters_is_no_absent_one(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5)
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    held = {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    dcp.save(held, checkpoint_id=tmp_path / "in", no_dist=True)
    ran = run("resume-check", tmp_path / "in")
    assert "none is saved here" not in ran.out and "the state of 1 optimizer" in ran.out
    assert "learning rate 0.5 for the first update" in ran.out
    assert run("inspect", tmp_path / "in").out.splitlines()[1] == "step 1, lr 0.5 (1 group)"


def test_two_applications_are_not_taken_for_none(tmp_path: Path) -> None:
    dcp.save({"one": app(), "two": app(), "step": 5}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(UsageError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.id == "no-weights" and "one, two" in caught.value.message


def test_tied_and_frozen_weights_are_found_by_their_bytes_and_groups(tmp_path: Path) -> None:
    """torch writes a tied weight under both names, and the optimizer's state under the first."""
    checkpoint = open_checkpoint(FIXTURES / "dcp/fsdp2_ws2")
    assert checkpoint.shared == {"head.weight": "emb.weight"}
    assert checkpoint.tensors["head.weight"] == checkpoint.tensors["emb.weight"]
    assert checkpoint.frozen == {"frozen", "mean"}  # a float buffer looks like a frozen weight
    assert checkpoint.buffers == {"count", "mask"}
    weight = torch.randn(4, 4)
    model = {"a.weight": weight, "b.weight": weight.clone(), "c.weight": torch.randn(4, 4)}
    group = {"lr": 0.1, "params": ["a.weight"]}
    for state, tied in (({}, {}), ({"a.weight": {"momentum_buffer": weight * 0}}, {"b.weight": "a.weight"})):
        made = {"model": model, "optimizer": {"state": state, "param_groups": [group]}}
        dcp.save(made, checkpoint_id=tmp_path / str(len(state)), no_dist=True)
        assert (
            open_checkpoint(tmp_path / str(len(state))).shared == tied
        )  # before a step, copies may be equal


def test_torchtitan() -> None:
    checkpoint = open_checkpoint(FIXTURES / "dcp/step-3")
    assert checkpoint.training.step == 3
    assert checkpoint.training.scheduler == {"last_epoch": 3, "base_lrs": [0.01, 0.01]}
    assert set(checkpoint.client["dataloader"]) == {"dp_rank_0", "dp_rank_1"}
    assert len(checkpoint.groups) == 2 and "same settings make one" in checkpoint.notes[0]


def test_a_part_leads_to_its_folder(tmp_path: Path) -> None:
    for name in (".metadata", "__0_0.distcp"):
        assert locate(FIXTURES / "dcp/fsdp2_ws2" / name).target == FIXTURES / "dcp/fsdp2_ws2"
    shutil.copytree(FIXTURES / "dcp/step-3", tmp_path / "run/step-3")
    assert locate(tmp_path / "run").target == tmp_path / "run/step-3"
    shutil.copytree(FIXTURES / "dcp/step-3", tmp_path / "run/step-10")
    with pytest.raises(CkptError) as caught:
        locate(tmp_path / "run")
    assert caught.value.id == "several-checkpoints"


def test_rank_files_of_accelerate_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model_fsdp_0_rank0.bin").write_bytes(b"x")
    with pytest.raises(Unsupported) as caught:
        locate(tmp_path)
    assert caught.value.id == "layout-unsupported" and "SHARDED_STATE_DICT" in caught.value.hint


# --- made here ----------------------------------------------------------------------------------------


def saved(tmp_path: Path, state: dict[str, object], **settings: object) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "made", **settings), no_dist=True)  # type: ignore[arg-type]
    return tmp_path / "made"


def test_pathological_tensors(tmp_path: Path) -> None:
    names = ["a.b/c d", "ü" * 100, "n" * 300, "model", "0", "state.x.exp_avg"]
    kinds = [torch.bool, torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bfloat16]
    model = {name: torch.arange(6).to(kind).reshape(2, 3) for name, kind in zip(names, kinds, strict=True)}
    model |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "ones": torch.ones(1, 1, 1),
        "turned": torch.arange(12.0).reshape(3, 4).T,
        "view": torch.arange(100.0)[10:13],
    }
    path = saved(tmp_path, {"model": model})
    found = open_checkpoint(path)
    assert list(found.tensors) == list(model)
    assert [n for n in model if not identical(as_torch(found.tensors[n]), model[n])] == []
    assert verify(path, workers=1).ok


@pytest.mark.parametrize("settings", [{}, {"single_file_per_rank": False}, {"thread_count": 3}])
def test_many_small_tensors(settings: dict[str, object], tmp_path: Path) -> None:
    """Each item is proven by its own header, whether or not one like it was seen before."""
    model = {f"layer.{i}.weight": torch.full((1 + i % 3, 2), float(i)) for i in range(120)}
    found = open_checkpoint(saved(tmp_path, {"model": model}, **settings))
    assert [n for n in model if not identical(as_torch(found.tensors[n]), model[n])] == []
    assert len(found.checks) == 120


def test_a_bare_state_dict_and_one_without_paths(tmp_path: Path) -> None:
    model = {"l.0.weight": torch.ones(3, 2), "l.0.bias": torch.zeros(3)}
    assert list(open_checkpoint(saved(tmp_path, dict(model))).tensors) == list(model)
    optimizer = {
        "state": {"l.0.weight": {"exp_avg": torch.ones(3, 2), "step": torch.tensor(4.0)}},
        "param_groups": [{"lr": 0.5, "params": ["l.0.weight"]}],
    }
    shutil.rmtree(tmp_path / "made")
    path = saved(tmp_path, {"model": model, "optimizer": optimizer})
    with edited(path) as metadata:
        metadata.planner_data = None
    found = open_checkpoint(path)
    assert list(found.tensors) == list(model)
    (group,) = found.groups
    assert group.params == {"l.0.weight": (3, 2)} and group.hyper == {"lr": 0.5}
    assert list(group.state) == ["exp_avg"] and list(group.scalars) == ["step"]


def test_state_of_a_parameter_without_dimensions(tmp_path: Path) -> None:
    """Its step and its moments have the same shape as it; only the step is a scalar."""
    weight = torch.nn.Parameter(torch.tensor(1.5))
    optimizer = torch.optim.Adam([weight])
    weight.backward()
    optimizer.step()
    state = {"state": {"scale": dict(optimizer.state[weight])}, "param_groups": [{"params": ["scale"]}]}
    found = open_checkpoint(saved(tmp_path, {"model": {"scale": weight.data}, "optimizer": state}))
    assert set(found.groups[0].state) == {"exp_avg", "exp_avg_sq"}
    assert set(found.groups[0].scalars) == {"step"}


def test_numbered_optimizer_state_is_kept_and_said(tmp_path: Path) -> None:
    """What torch's format_utils torch_to_dcp makes of a .pt file."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    path = saved(tmp_path, {"model": {"w": weight.data}, "optimizer": optimizer.state_dict()})
    found = open_checkpoint(path)
    assert found.groups == () and "numbered" in found.notes[0]
    assert isinstance(found.client["optimizer"]["state"][0]["momentum_buffer"], TensorRef)
    assert run("reshard", path, tmp_path / "two", "--world-size", 2).code == 0
    ours = [dcp.FileSystemReader(each).read_metadata().planner_data for each in (path, tmp_path / "two")]
    assert ours[0] == ours[1]


def test_items_in_the_older_serialization(tmp_path: Path) -> None:
    """torch loads them, so they are read."""
    path = saved(tmp_path, {"model": {"w": torch.arange(4.0), "v": torch.ones(2, 2)}, "epoch": 2})
    data = (path / "__0_0.distcp").read_bytes()
    out = b""
    with edited(path) as metadata:
        for info in metadata.storage_data.values():
            item = torch.load(io.BytesIO(data[info.offset : info.offset + info.length]), weights_only=True)
            buffer = io.BytesIO()
            torch.save(item, buffer, _use_new_zipfile_serialization=False)
            info.offset, info.length = len(out), buffer.tell()
            out += buffer.getvalue()
    (path / "__0_0.distcp").write_bytes(out)
    found = open_checkpoint(path)
    assert as_torch(found.tensors["w"]).equal(torch.arange(4.0)) and found.training.epoch == 2
    assert found.checks == () and verify(path, workers=1).ok


def test_a_frozen_copy_of_a_network_is_no_tie(tmp_path: Path) -> None:
    """A target network, equal at the save: its tensors are its own."""
    online = {"0.weight": torch.randn(4, 4), "0.bias": torch.randn(4)}
    model = {
        f"{net}.{name}": tensor.clone() for net in ("online", "target") for name, tensor in online.items()
    }
    trained = [name for name in model if name.startswith("online")]
    state = {name: {"momentum_buffer": model[name] * 0} for name in trained}
    made = {"model": model, "optimizer": {"state": state, "param_groups": [{"lr": 0.1, "params": trained}]}}
    dcp.save(made, checkpoint_id=tmp_path / "d", no_dist=True)
    found = open_checkpoint(tmp_path / "d")
    assert found.shared == {} and found.frozen == {"target.0.weight", "target.0.bias"}


def test_a_tie_that_may_be_a_frozen_copy_is_said(tmp_path: Path) -> None:
    """One matrix alone cannot be told from a tied one: nothing in the files is different."""
    weight = torch.randn(4, 4)
    model = {"online.weight": weight, "target.weight": weight.clone()}
    optimizer = {
        "state": {"online.weight": {"momentum_buffer": weight * 0}},
        "param_groups": [{"lr": 0.1, "params": ["online.weight"]}],
    }
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path / "d", no_dist=True)
    found = open_checkpoint(tmp_path / "d")
    assert found.shared == {"target.weight": "online.weight"}
    assert any("target.weight is taken for another name of online.weight" in note for note in found.notes)
    again = convert(tmp_path / "d", tmp_path / "e", to="dcp").destination
    assert not [note for note in open_checkpoint(again).notes if "taken for" in note]  # there they are one


@pytest.mark.parametrize("nested", [False, True])
def test_milestones_that_torch_saved_as_text_are_numbers(nested: bool, tmp_path: Path) -> None:
    """torch's planner makes text of every key, and a schedule with text for milestones keeps its rate."""
    model = torch.nn.Linear(3, 2)

    def anew() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        steps = lr_scheduler.MultiStepLR(optimizer, [3, 5, 5], 0.5)
        if not nested:
            return optimizer, steps
        return optimizer, lr_scheduler.SequentialLR(
            optimizer, [lr_scheduler.ConstantLR(optimizer), steps], [2]
        )

    def rates(
        optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, steps: int
    ) -> list[float]:
        found = []
        for _ in range(steps):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, scheduler = anew()
    rates(optimizer, scheduler, 4)
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "scheduler": scheduler.state_dict(), "step": 4}
    dcp.save(saved, checkpoint_id=tmp_path / "torchs")
    assert verify(tmp_path / "torchs", workers=1).findings == ()
    _, changed = rebase(tmp_path / "torchs", tmp_path / "half", new_bs=4, old_bs=8)
    assert any("milestones" in said for said in changed.outside)
    (state,) = open_checkpoint(tmp_path / "half").schedules
    made = open_checkpoint(tmp_path / "half").client[state]
    assert (made["_schedulers"][1] if nested else made)["milestones"] == {6: 1, 10: 2}
    convert(tmp_path / "torchs", tmp_path / "run.pt", to="pt")
    back = convert(tmp_path / "run.pt", tmp_path / "back", to="dcp")
    assert [note for note in back.notes if "milestones" in note] == []
    assert keys(tmp_path / "back") >= {key for key in keys(tmp_path / "torchs") if key.startswith("sched")}
    fresh, again = anew()
    held = torch.load(tmp_path / "run.pt", weights_only=True)
    assert held["scheduler"] == scheduler.state_dict()
    fresh.load_state_dict(held["optimizer_state_dict"])
    again.load_state_dict(held["scheduler"])
    assert rates(fresh, again, 6) == rates(optimizer, scheduler, 6)


def keys(folder: Path) -> set[str]:
    return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
