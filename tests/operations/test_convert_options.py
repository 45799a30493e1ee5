"""ckpt convert: --like, --reset-optimizer, --optimizer-class, and the lines that it ends with."""

from __future__ import annotations

import copy
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run
from safetensors.torch import save_file
from support import FIXTURES, as_torch, identical
from torch import nn

from ckpttools.checks import verify
from ckpttools.errors import CkptError, UsageError
from ckpttools.findings import ERROR, WARNING
from ckpttools.formats import open_checkpoint
from ckpttools.operations.convert import convert
from ckpttools.operations.digest import digest
from ckpttools.operations.request import TARGETS
from ckpttools.operations.reshard import reshard
from ckpttools.operations.writing import Writing
from ckpttools.tensors import TensorRef

SAMPLES = FIXTURES / "deepspeed-0.19.8"
PT = FIXTURES / "monolithic/full/epoch_2_step_40.pt"
FOLDERS = [to for to in TARGETS if to.startswith("zero") or to == "universal"]


def net(bias: bool = True) -> nn.Module:
    """Two parameters of one shape in the middle: by shape alone their order in a group is not known."""
    sizes = ((4, 3), (3, 3), (3, 3), (3, 2))
    return nn.Sequential(*(nn.Linear(*size, bias=bias) for size in sizes))


def trained(optimizer: Any, model: nn.Module, steps: int = 2) -> list[float]:
    losses = []
    for step in range(steps):
        x = torch.arange(8.0).reshape(2, 4) / (step + 3)
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def saved(path: Path, model: nn.Module, optimizer: Any, **more: Any) -> Path:
    state = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), **more}
    torch.save({**state, "global_step": 2}, path)
    return path


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices backwards, so that the order of the optimizer is not that of the model."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [{"params": matrices[::-1]}, {"params": [p for p in model.parameters() if p.ndim < 2]}]


# --- --like ---------------------------------------------------------------------------------------------


def test_an_ambiguous_order_is_refused_and_like_gives_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.1)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    with pytest.raises(CkptError) as caught:
        convert(source, tmp_path / "z", to="zero2")
    assert caught.value.id == "no-groups" and "--like" in caught.value.hint
    named = [(n, p) for n, p in model.named_parameters()]
    matrices = [(n, p) for n, p in named if p.ndim == 2][::-1]
    other = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": [(n, p) for n, p in named if p.ndim < 2]}],
        lr=0.5,
    )
    target = saved(tmp_path / "b.pt", model, other)
    made = convert(source, tmp_path / "z", to="zero2", like=target, world_size=3)
    found = open_checkpoint(made.destination)
    assert [group.hyper["weight_decay"] for group in found.groups] == [0.3, 0.01]
    assert [group.hyper["lr"] for group in found.groups] == [0.5, 0.5]
    assert list(found.groups[0].params) == [name for name, _ in matrices]
    state = {id(p): s for p, s in optimizer.state.items()}
    for name, p in named:
        group = next(group for group in found.groups if name in group.params)
        assert identical(as_torch(group.state["exp_avg"][name]), state[id(p)]["exp_avg"])
        assert identical(as_torch(group.state["fp32"][name]), p.detach())
    assert any("parameter groups and their settings are those of b.pt" in note for note in made.notes)


def test_like_says_whose_order_is_taken(tmp_path: Path) -> None:
    """Two orders fit: that of the other run is taken, and what helps where it is the wrong one is true."""
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    named = list(model.named_parameters())
    swapped = [*named[:2], *named[4:6], *named[2:4], *named[6:]]  # two layers of one shape
    target = saved(tmp_path / "b.pt", model, torch.optim.AdamW(swapped, lr=0.1))
    made = convert(source, tmp_path / "made.pt", to="pt", like=target)
    said = [note for note in made.notes if "order" in note]
    assert [note.split(",")[0] for note in said] == [
        "the optimizer numbers its 8 parameters: taken in the order of b.pt",
        "careful: they fit the model's order",
    ]
    first = convert(source, tmp_path / "first", to="dcp")
    again = convert(first.destination, tmp_path / "again.pt", to="pt", like=target)
    assert not any("order" in note for note in again.notes)
    (group,) = open_checkpoint(again.destination).groups
    assert list(group.params) == [name for name, _ in swapped]
    for name, p in named:
        assert identical(as_torch(group.state["exp_avg"][name]), optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize("to", ["pt", "zero2"])
def test_like_with_names_or_without_state(to: Any, tmp_path: Path) -> None:
    """An optimizer that numbers its parameters: its order is read for the names that they get, and its state
    stays away where that is asked for.
    """
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.1)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    named = [(f"new.{n}", p) for n, p in model.named_parameters()]
    matrices = [pair for pair in named if pair[1].ndim == 2][::-1]
    other = torch.optim.AdamW([{"params": matrices}, {"params": [x for x in named if x[1].ndim < 2]}])
    other.param_groups[0] |= {"lr": 0.1, "initial_lr": 0.5}
    wrapped = nn.ModuleDict({"new": model})
    target = saved(tmp_path / "b.pt", wrapped, other)
    rename = [("^3.bias", "new.3.bias"), (r"^(\d)", r"new.\1")]  # two shapes are there twice
    made = convert(source, tmp_path / "made", to=to, like=target, rename=rename).destination
    state = {name: optimizer.state[p]["exp_avg"] for name, p in named}
    groups = open_checkpoint(made).groups
    kept = {name: as_torch(ref) for group in groups for name, ref in group.state["exp_avg"].items()}
    assert kept.keys() == state.keys() and all(identical(kept[name], state[name]) for name in state)
    fresh = convert(
        source, tmp_path / "fresh", to=to, like=target, rename=rename, reset_optimizer=True
    ).destination
    groups = open_checkpoint(fresh).groups
    assert list(groups[0].params) == [name for name, _ in matrices]
    assert groups[0].hyper["lr"] == 0.5
    assert not any(group.scalars or group.state.keys() - {"fp32"} for group in groups)


@pytest.mark.parametrize("to", ["pt", "dcp"])
def test_the_masters_stay_where_the_run_has_masters(to: Any, tmp_path: Path) -> None:
    """The dtype of the other run is that of its engine, and one copy of each weight is the master."""
    source = SAMPLES / "z2_bf16_ws2"
    made = convert(source, tmp_path / "made", to=to, like=source)
    assert not any("master" in note and "left out" in note for note in made.notes)
    masters = open_checkpoint(source).master
    found = open_checkpoint(made.destination).tensors
    assert masters and all(identical(as_torch(found[n]), as_torch(ref)) for n, ref in masters.items())


def test_names_of_the_run_that_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    wrapped = nn.ModuleDict({"backbone": net()})
    target = saved(tmp_path / "b.pt", wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    made = convert(source, tmp_path / "c.pt", to="pt", like=target)
    held = torch.load(made.destination, weights_only=True)["model_state_dict"]
    assert list(held) == list(wrapped.state_dict())
    assert torch.equal(held["backbone.0.weight"], model.state_dict()["0.weight"])
    assert any("the first, 0.weight, is backbone.0.weight there" in note for note in made.notes)


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    model, other = net(), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    target = saved(tmp_path / "b.pt", other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(UsageError) as caught:
        convert(source, tmp_path / "c.pt", to="pt", like=target)
    assert caught.value.id == "model-differs"
    renamed = {f"x{i}": value for i, value in enumerate(model.state_dict().values())}
    torch.save({"model_state_dict": renamed}, tmp_path / "d.pt")
    with pytest.raises(UsageError) as caught:
        convert(source, tmp_path / "c.pt", to="pt", like=tmp_path / "d.pt")
    assert caught.value.id == "names-ambiguous" and "--rename" in caught.value.hint
    assert not (tmp_path / "c.pt").exists()


def test_roles_of_tensors_come_from_the_run(tmp_path: Path) -> None:
    """A single file of training code does not say what is a buffer; ZeRO-3 must know."""
    source = convert(SAMPLES / "z3_groups_ws2", tmp_path / "a.pt", to="pt").destination
    tree = torch.load(source, weights_only=False)
    assert "scale" in tree.pop("buffer_names")
    torch.save(tree, source)
    done = run("convert", source, tmp_path / "z", "--to", "zero3")
    assert done.code == 2 and "tensor-unknown" in done.err
    made = convert(source, tmp_path / "z", to="zero3", like=SAMPLES / "z3_groups_ws2", world_size=2)
    assert open_checkpoint(made.destination).buffers == open_checkpoint(SAMPLES / "z3_groups_ws2").buffers
    assert open_checkpoint(made.destination).layout.dtype == "bf16"


@pytest.mark.parametrize("more", [["--to", "hf"], ["--to", "pt", "--optimizer-class", "AdamW"]])
def test_like_and_what_contradicts_it(more: list[str], tmp_path: Path) -> None:
    assert run("convert", PT, tmp_path / "x", "--like", PT, *more).code == 2
    assert not (tmp_path / "x").exists()


# --- --reset-optimizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FOLDERS)
def test_an_optimizer_that_starts_anew_is_no_lost_one(to: Any, tmp_path: Path) -> None:
    made = convert(SAMPLES / "z2_bf16_ws2", tmp_path / "z", to=to, reset_optimizer=True)
    found = open_checkpoint(made.destination)
    assert all(group.state.keys() == {"fp32"} and not group.scalars for group in found.groups)
    assert found.training.step == 0 and found.training.scheduler == {"last_batch_iteration": -1}
    assert [f.id for f in verify(made.destination).findings if f.severity == ERROR] == []
    assert any("start anew" in note for note in made.notes)


def test_a_file_of_its_own_format_keeps_no_state_of_before(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    convert(source, tmp_path / "b.pt", to="pt", reset_optimizer=True)
    made = torch.load(tmp_path / "b.pt", weights_only=True)
    assert made["optimizer_state_dict"]["state"] == {}
    assert made["optimizer_state_dict"]["param_groups"] == optimizer.state_dict()["param_groups"]


def test_state_stays_with_its_parameter_where_ids_move(tmp_path: Path) -> None:
    """The first of a group is left out, the second was never trained: it gets the id, and not the state."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": named[:2]}, {"params": named[2:], "lr": 0.5}])
    model[3](model[2](model[0](torch.ones(2, 3)))).sum().backward()
    optimizer.step()
    convert(saved(tmp_path / "a.pt", model, optimizer), tmp_path / "b.pt", to="pt", exclude=["0.weight"])
    made = torch.load(tmp_path / "b.pt", weights_only=True)["optimizer_state_dict"]
    assert [group["params"] for group in made["param_groups"]] == [[0], [1, 2]]
    before = optimizer.state_dict()["state"]
    assert made["state"].keys() == {1, 2}
    for new, old in ((1, 2), (2, 3)):
        assert identical(made["state"][new]["exp_avg"], before[old]["exp_avg"])


def unnamed(path: Path, **more: Any) -> Path:
    """Four parameters of one shape, spread over two groups: nobody can tell which is which."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    params = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": params[::2]}, {"params": params[1::2]}])
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return saved(path, model, optimizer, **more)


def test_an_optimizer_without_names_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    last = {"last_epoch": 1}
    source = unnamed(
        tmp_path / "a.pt", lr_scheduler=last, scheduler=last, discriminator={"scheduler": [last]}
    )
    made = convert(source, tmp_path / "b.pt", to="pt", reset_optimizer=True)
    assert torch.load(tmp_path / "b.pt", weights_only=True).keys() == {"model_state_dict", "global_step"}
    assert any("not carried" in n and "optimizer_state_dict" in n and "scheduler" in n for n in made.notes)


def test_lightnings_two_optimizers_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    state = torch.load(unnamed(tmp_path / "a.pt"), weights_only=True)
    two = [state["optimizer_state_dict"]] * 2
    torch.save({"state_dict": state["model_state_dict"], "optimizer_states": two}, tmp_path / "l.ckpt")
    convert(tmp_path / "l.ckpt", tmp_path / "b.ckpt", to="pt", reset_optimizer=True)
    assert torch.load(tmp_path / "b.ckpt", weights_only=True).keys() == {"state_dict"}


def test_an_optimizer_without_names_is_carried_to_the_same_tensors_only(tmp_path: Path) -> None:
    source = unnamed(tmp_path / "a.pt")
    made = convert(source, tmp_path / "whole.pt", to="pt")
    assert any(note.startswith("carried as it is: the optimizer's state under") for note in made.notes)
    before, after = (torch.load(p, weights_only=True) for p in (source, tmp_path / "whole.pt"))
    assert repr(before["optimizer_state_dict"]) == repr(after["optimizer_state_dict"])
    for more in (["--exclude", "0.*"], ["--include", "0.*"], ["--rename", "^0=9"]):
        for to in ("pt", "dcp"):
            refused = run("convert", source, tmp_path / "x", "--to", to, *more)
            assert refused.code == 2 and "error[no-groups]" in refused.err and "--like" in refused.err
            assert not (tmp_path / "x").exists()
    done = run("convert", source, tmp_path / "y", "--to", "pt", "--exclude", "0.*", "--reset-optimizer")
    assert done.code == 0


CYCLES: dict[str, Any] = {
    "onecycle": (torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR, {"total_steps": 20}),
    "cyclic": (
        lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
        torch.optim.lr_scheduler.CyclicLR,
        {"base_lr": 0.001, "step_size_up": 10},
    ),
}


@pytest.mark.parametrize("kind", CYCLES)
def test_cycled_momentum_and_counts_in_groups_start_anew(kind: str, tmp_path: Path) -> None:
    """As before the first step: what the schedule made of the settings, and no count of an older Adam."""
    make, schedule, options = CYCLES[kind]
    model = net()
    optimizer = make(model.parameters(), lr=0.01)
    scheduler = schedule(optimizer, max_lr=0.01, **options)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    for _ in range(5):
        trained(optimizer, model)
        scheduler.step()
    assert optimizer.state_dict()["param_groups"] != before
    optimizer.param_groups[0]["step"] = 500
    optimizer.param_groups[0]["weight_sum"] = 0.5
    made = convert(
        saved(tmp_path / "a.pt", model, optimizer), tmp_path / "b.pt", to="pt", reset_optimizer=True
    )
    (group,) = torch.load(tmp_path / "b.pt", weights_only=True)["optimizer_state_dict"]["param_groups"]
    assert group.pop("weight_sum") == 0.5
    assert any("keep what their optimizer counted there: weight_sum" in note for note in made.notes)
    assert group == {**before[0], "lr": pytest.approx(before[0]["lr"])}


@pytest.mark.parametrize("key", ["iter", "iteration", "it"])
def test_one_count_of_updates_and_iterations_starts_anew(key: str, tmp_path: Path) -> None:
    torch.save({"model_state_dict": net().state_dict(), key: 500, "epoch": 3}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.pt", to="pt", reset_optimizer=True)
    made = torch.load(tmp_path / "b.pt", weights_only=True)
    assert (made[key], made["epoch"]) == (0, 3)


# --- optimizers -----------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
}
WHOLE = ("Adafactor",)  # whose state is not of the parameter's shape
WITH_SCALARS = ("NAdam",)  # more than a step


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("to", ["zero2", "zero3", "universal", "dcp"])
def test_every_optimizer_there_and_back(name: str, to: Any, tmp_path: Path) -> None:
    """From torch and back: the plain loop goes on bit by bit as if nothing had happened."""
    torch.manual_seed(0)
    model = net(bias=name != "Muon")
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    # load_universal has no place for NAdam's mu_product, without which its first step ends in KeyError
    if (name in WHOLE and to != "dcp") or (name in WITH_SCALARS and to == "universal"):
        with pytest.raises(CkptError) as caught:
            convert(source, tmp_path / "z", to=to)
        assert caught.value.id in ("state-not-flat", "state-incomplete")
        assert not (tmp_path / "z").exists()
        return
    ranks = {"world_size": 3} if to.startswith("zero") else {}
    there = convert(source, tmp_path / "z", to=to, **ranks)
    assert any("Muon updates matrices" in note for note in there.notes) is (name == "Muon" and to != "dcp")
    counts = name not in ("SGD", "Muon") and to != "dcp"
    assert any("steps are tensors" in note for note in there.notes) is counts
    assert not any(finding.severity in (ERROR, WARNING) for finding in verify(there.destination).findings)
    back = convert(there.destination, tmp_path / "b.pt", to="pt")
    expected = trained(optimizer, model)
    again = net(bias=name != "Muon")
    fresh = OPTIMIZERS[name](list(again.parameters()))
    names = {"model": again, "optimizer": fresh, "torch": torch}
    for line in back.next[1:]:
        exec(line, names)
    assert trained(fresh, again) == expected


@pytest.mark.parametrize("layout", ["nested", "flat", None])
@pytest.mark.parametrize("frozen", [False, True], ids=["whole", "partial"])
def test_the_line_for_a_distributed_checkpoint_loads_it(layout: Any, frozen: bool, tmp_path: Path) -> None:
    """As it is printed: the losses go on bit by bit."""
    from torch.distributed import checkpoint  # noqa: F401
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    torch.manual_seed(0)
    model, again = (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)) for _ in range(2))
    for each in (model, again):
        each[0].requires_grad_(not frozen)
    again[0].load_state_dict(model[0].state_dict())

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        every = [p for p in model.parameters() if p.requires_grad]
        matrices = {"params": [p for p in every if p.ndim == 2], "weight_decay": 0.1}
        return torch.optim.AdamW([matrices, {"params": [p for p in every if p.ndim < 2]}])

    optimizer = optimizer_of(model)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer, epoch=1)
    if frozen:
        source = convert(source, tmp_path / "z", to="zero2", world_size=1, digest=False).destination
        file = next(source.rglob("mp_rank_00_*"))
        tree = torch.load(file, weights_only=False)
        for name in [name for name in tree["module"] if name.startswith("0.")]:
            del tree["module"][name]
        torch.save(tree | {"frozen_param_shapes": None, "frozen_param_fragments": None}, file)
    made = convert(source, tmp_path / "d", to="dcp", dcp_layout=layout, digest=False)
    fresh = optimizer_of(again)
    scope = {"model": again, "optimizer": fresh, "torch": torch, "StateDictOptions": StateDictOptions}
    exec(made.next[1], scope | {"get_state_dict": get_state_dict, "set_state_dict": set_state_dict})
    assert trained(fresh, again) == trained(optimizer, model)


def named_optimizer(model: nn.Module, named: bool) -> torch.optim.Optimizer:
    """Two groups of the same settings, of parameters with their names or without."""
    pairs = list(model.named_parameters())
    groups = [[(n, p) for n, p in pairs if (p.ndim > 1) is matrix] for matrix in (True, False)]
    return torch.optim.AdamW([{"params": group if named else [p for _, p in group]} for group in groups])


def goes_on(line: str, before: tuple[nn.Module, torch.optim.Optimizer], named: bool) -> None:
    """The line is run for another optimizer, which goes on bit by bit, with names where it had them."""
    from torch.distributed import checkpoint  # noqa: F401
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    again = net()
    fresh = named_optimizer(again, named)
    scope = {"model": again, "optimizer": fresh, "torch": torch, "StateDictOptions": StateDictOptions}
    exec(line, scope | {"get_state_dict": get_state_dict, "set_state_dict": set_state_dict})
    names = [[n for n, p in again.named_parameters() if (p.ndim > 1) is matrix] for matrix in (True, False)]
    wanted = names if named else [None, None]
    assert [group.get("param_names") for group in fresh.param_groups] == wanted
    model, optimizer = before
    with torch.no_grad():
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        have, got = optimizer.state[mine], fresh.state[other]
        assert have.keys() == got.keys() and all(torch.equal(have[kind], got[kind]) for kind in have)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
def test_an_optimizer_of_named_parameters_finds_their_names(layout: Any, named: bool, tmp_path: Path) -> None:
    """torch asks for param_names where the optimizer has them, and passes over what it did not ask for."""
    model = net()
    optimizer = named_optimizer(model, named)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    made = convert(source, tmp_path / "d", to="dcp", dcp_layout=layout, digest=False)
    goes_on(made.next[1], (model, optimizer), named=False)
    lacks = layout == "flat" and not named
    assert lacks is any("the groups have no param_names" in note for note in made.notes)
    if lacks:
        like = saved(tmp_path / "b.pt", net(), named_optimizer(net(), True))
        made = convert(source, tmp_path / "e", to="dcp", dcp_layout=layout, like=like, digest=False)
        assert not any("param_names" in note for note in made.notes)
    goes_on(made.next[1], (model, optimizer), named=True)


@pytest.mark.parametrize("kind", ["anew", "weights", "two", "sgd"])
def test_a_distributed_checkpoint_without_optimizer_state_is_loaded_so(kind: str, tmp_path: Path) -> None:
    """torch asks for all that the optimizer has: what has none is loaded without one."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if kind == "sgd" else named_optimizer(model, False)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    if kind == "weights":
        torch.save({"model_state_dict": model.state_dict()}, source)
    if kind == "two":
        held = torch.load(source, weights_only=True)
        held["optimizer_g"] = held["optimizer_d"] = held.pop("optimizer_state_dict")
        torch.save(held, source)
    made = convert(source, tmp_path / "d", to="dcp", reset_optimizer=kind == "anew")
    line = made.next[1]
    assert ("get_model_state_dict" in line) is (kind != "sgd"), line
    assert any("carried as it is" in note and "optimizer_g" in note for note in made.notes) is (kind == "two")
    fresh = net()
    theirs = torch.optim.SGD(fresh.parameters(), 0.5) if kind == "sgd" else named_optimizer(fresh, False)
    from torch.distributed.checkpoint import state_dict

    exec(
        line,
        {"torch": torch, "model": fresh, "optimizer": theirs, **vars(state_dict)},
    )
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in model.state_dict().items())
    assert kind != "sgd" or theirs.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_the_names_in_a_distributed_checkpoint_are_no_setting(flat: bool, tmp_path: Path) -> None:
    """As torch saves them; they say which parameters make a group where nothing else does."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model = net()
    optimizer = named_optimizer(model, True)
    trained(optimizer, model)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(model, optimizer, options=options)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "a", no_dist=True)
    changes: Any = {"rename": [("^", "net.")], "dcp_layout": "flat" if flat else "nested"}
    again = convert(tmp_path / "a", tmp_path / "b", to="dcp", digest=False, **changes).destination
    for source, prefix in ((tmp_path / "a", ""), (again, "net.")):
        read = open_checkpoint(source)
        lists = [g["param_names"] for g in optimizer.state_dict()["param_groups"]]
        assert [list(g.params) for g in read.groups] == [[prefix + n for n in names] for names in lists]
        assert all(group.named and "param_names" not in group.hyper for group in read.groups)
        assert not any("groups are not in the files" in note for note in read.notes)
    (values,) = (part.values for part in open_checkpoint(again).template.parts)  # type: ignore[attr-defined]
    found = [value for key, value in values.items() if key.endswith("param_names")]
    assert len(found) == (8 if flat else 2) and all(n.startswith("net.") for each in found for n in each)
    for to in ("zero2", "zero3", "universal"):
        folder = convert(tmp_path / "a", tmp_path / to, to=to, digest=False).destination  # type: ignore[arg-type]
        assert not any("param_names" in group.hyper for group in open_checkpoint(folder).groups)
        assert verify(folder).ok
    convert(tmp_path / "a", tmp_path / "c.pt", to="pt", digest=False)
    back = named_optimizer(net(), True)
    back.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True)["optimizer_state_dict"])
    assert [group["param_names"] for group in back.param_groups] == lists


def test_deepspeeds_folder_of_a_named_optimizer_gives_its_names_on(tmp_path: Path) -> None:
    """As DeepSpeed saves it: each rank's settings have the names, though the parameter is one flat vector."""
    source = Path(shutil.copytree(SAMPLES / "z2_groups_ws2", tmp_path / "z"))
    names = [list(group.params) for group in open_checkpoint(source).groups]
    for file in source.rglob("*optim_states.pt"):
        tree = torch.load(file, weights_only=False)
        groups = tree["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
        for group, own in zip(groups, names, strict=True):
            group["param_names"] = own
        torch.save(tree, file)
    folder = convert(source, tmp_path / "u", to="universal", digest=False)
    assert not any("param_names" in text for text in (*folder.plan.notes, *folder.next))
    rule = [("^", "net.")]
    made = convert(source, tmp_path / "d", to="dcp", dcp_layout="flat", rename=rule, digest=False)
    assert not any("param_names" in note for note in made.notes)
    read = open_checkpoint(made.destination)
    assert [list(group.params) for group in read.groups] == [[f"net.{n}" for n in own] for own in names]
    assert all(group.named for group in read.groups)


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("to", ["pt", "zero2"])
def test_the_schedules_of_lightning_are_loaded_as_the_lines_say(
    to: Any, several: bool, tmp_path: Path
) -> None:
    """It saves a list of them; DeepSpeed's engine and a scheduler of torch load one."""
    folder = to == "pt"
    source = next((FIXTURES / "lightning" / ("deepspeed" if folder else "file")).glob("*.ckpt"))
    copy = tmp_path / source.name
    shutil.copytree(source, copy) if folder else shutil.copy(source, copy)
    file = next(copy.rglob("*model_states.pt")) if folder else copy
    tree = torch.load(file, weights_only=False)
    schedules = tree["lr_schedulers"] = tree["lr_schedulers"] * (1 + several)
    torch.save(tree, file)
    made = convert(copy, tmp_path / "made", to=to, digest=False)
    loaded: list[Any] = []
    each = SimpleNamespace(load_state_dict=loaded.append)
    if to == "pt":
        scope = {"saved": torch.load(made.destination, weights_only=False), "scheduler": each}
        (line,) = (line for line in made.next if line.startswith(("scheduler.", "for scheduler,")))
        exec(line, scope | {"schedulers": [each, each]})
        assert loaded == schedules
        return
    saved = torch.load(next(made.destination.rglob("mp_rank_00_*")), weights_only=False)
    assert saved["lr_scheduler"] == (None if several else schedules[0])
    assert several is ("load_lr_scheduler_states=False" in made.next[-1])
    assert not several or saved["lr_schedulers"] == schedules


def test_tensors_of_the_client_are_no_weights_of_torchtitan(tmp_path: Path) -> None:
    """At the top of its folders lie the model's tensors, and nothing says of which they are."""
    made = convert(SAMPLES / "z2_clientstate_ws2", tmp_path / "d", to="dcp", dcp_layout="titan")
    assert (
        open_checkpoint(made.destination).tensors.keys()
        == open_checkpoint(SAMPLES / "z2_clientstate_ws2").tensors.keys()
    )
    assert any("'bools' is not written" in note for note in made.notes)


def test_adapters_without_their_base_are_no_whole_model(tmp_path: Path) -> None:
    made = convert(FIXTURES / "hf/peft", tmp_path / "a.pt", to="pt")
    assert any("frozen weights are not in the source" in note for note in made.notes)
    assert any("strict=False" in line for line in made.next)


@pytest.mark.parametrize("to", FOLDERS)
def test_groups_without_parameters_are_not_deepspeeds(to: Any, tmp_path: Path) -> None:
    """DeepSpeed leaves them out of its optimizer and refuses a folder that has one group more."""
    model = net()
    optimizer = torch.optim.AdamW([{"params": [], "lr": 0.5}, {"params": list(model.parameters())}])
    trained(optimizer, model)
    made = convert(saved(tmp_path / "a.pt", model, optimizer), tmp_path / "z", to=to, digest=False)
    assert any("1 parameter groups without parameters are left out" in note for note in made.notes)
    (group,) = open_checkpoint(made.destination).groups
    assert len(group.params) == 8 and group.hyper["lr"] == 0.001


def test_the_schedule_goes_without_the_groups_that_are_left_out(tmp_path: Path) -> None:
    """Its rates go to groups by their place: the next group would train with those of the one that went."""
    model = net()
    optimizer = torch.optim.AdamW([{"params": [], "lr": 0.5}, {"params": list(model.parameters())}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    trained(optimizer, model)
    schedule.step()
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    torch.save({**tree, "scheduler": schedule.state_dict()}, tmp_path / "a.pt")
    made = convert(tmp_path / "a.pt", tmp_path / "z", to="zero1", world_size=1, digest=False)
    saved = torch.load(next(made.destination.rglob("mp_rank_00_*")), weights_only=False)["lr_scheduler"]
    assert saved["base_lrs"] == [0.001] and saved["_last_lr"] == schedule.get_last_lr()[1:]
    assert "damaged" not in run("resume-check", made.destination).out


@pytest.mark.parametrize("to", FOLDERS)
def test_an_engine_of_fp16_scales_its_loss_and_no_other_does(to: Any, tmp_path: Path) -> None:
    """DeepSpeed loads the file's scaler over its own: a static 1 would let gradients of 16 bits vanish."""
    made = convert(SAMPLES / "z2_bf16_ws2", tmp_path / "a", to=to, dtype="fp16", digest=False)
    assert any("loss scale begins at 65536" in note for note in made.notes)
    made = convert(SAMPLES / "z2_fp16_ws2", tmp_path / "b", to=to, dtype="bf16", digest=False)
    assert any("not kept: the loss scale" in note for note in made.notes)
    scales = {}
    for name in "ab":
        file = next((tmp_path / name).rglob("optimizer_state.pt" if to == "universal" else "*_states.pt"))
        if to in ("zero1", "zero2", "zero3"):
            file = next((tmp_path / name).rglob("*_optim_states.pt"))
        saved = torch.load(file, weights_only=False)
        saved = saved[{"zero0": "optimizer"}.get(to, "optimizer_state_dict")] if to != "universal" else saved
        scaler = SimpleNamespace(**saved) if to == "zero0" else saved["loss_scaler"]
        scales[name] = (saved["dynamic_loss_scale"], scaler.cur_scale)
        assert to == "zero0" or name == "b" or scaler.dtype is torch.float16
    assert scales == {"a": (True, 65536.0), "b": (False, 1.0)}


def test_the_loss_scale_of_stage_0_goes_on(tmp_path: Path) -> None:
    """Its wrapper keeps what changes while a run goes on, the other stages the whole scaler."""
    source = SAMPLES / "z0_fp16_ws2"
    saved = torch.load(next(source.rglob("mp_rank_00_*")), weights_only=False)["optimizer"]
    made = convert(source, tmp_path / "a", to="zero2", world_size=1, digest=False)
    assert not any("loss scale" in note for note in made.notes)
    file = next(made.destination.rglob("*_optim_states.pt"))
    scaler = torch.load(file, weights_only=False)["optimizer_state_dict"]["loss_scaler"]
    assert (scaler.dynamic, scaler.cur_scale, scaler.scale_window) == (True, 512.0, 2)
    back = convert(made.destination, tmp_path / "b", to="zero0", digest=False)
    again = torch.load(next(back.destination.rglob("mp_rank_00_*")), weights_only=False)["optimizer"]
    assert {key: again[key] for key in saved if "scale" in key} == {
        key: saved[key] for key in saved if "scale" in key
    }


def test_what_stage_0_cannot_say_of_the_loss_scaler_is_named(tmp_path: Path) -> None:
    """Its wrapper has no place for five fields: they come back as ds_config has them, or as they begin."""
    source = shutil.copytree(SAMPLES / "z2_fp16_ws2", tmp_path / "a")
    others = {"min_scale": 4, "delayed_shift": 3, "cur_hysteresis": 1, "consecutive_hysteresis": True}
    others["raise_error_at_min_scale"] = False
    for file in source.rglob("*_optim_states.pt"):
        saved = torch.load(file, weights_only=False)
        vars(saved["optimizer_state_dict"]["loss_scaler"]).update(others)
        torch.save(saved, file)
    made = convert(source, tmp_path / "b", to="zero0", digest=False)
    (note,) = (note for note in made.notes if "not kept of the loss scaler" in note)
    assert all(name in note for name in others)
    back = open_checkpoint(made.destination).loss_scaler
    assert (back["min_scale"], back["delayed_shift"]) == (1, 2)


@pytest.mark.parametrize("to", FOLDERS)
def test_weights_of_64_and_of_8_bits_are_not_deepspeeds(to: Any, tmp_path: Path) -> None:
    model = net().double()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4).double()).sum().backward()
    optimizer.step()
    made = convert(saved(tmp_path / "a.pt", model, optimizer), tmp_path / "z", to=to)
    assert any("8 weights of 64 bits become fp32" in note for note in made.notes)
    assert {ref.dtype.short for ref in open_checkpoint(made.destination).best_copies().values()} == {"fp32"}
    held = torch.load(tmp_path / "a.pt", weights_only=True)
    held["model_state_dict"] = {n: t.to(torch.float8_e5m2) for n, t in held["model_state_dict"].items()}
    torch.save(held, tmp_path / "b.pt")
    if to != "zero0":  # where the engine's optimizer is torch's own
        with pytest.raises(CkptError, match=r"0\.weight, which is trained, is float8_e5m2"):
            convert(tmp_path / "b.pt", tmp_path / "y", to=to)


def test_one_model_of_several_is_named_by_its_key(tmp_path: Path) -> None:
    model, other = net(), net()
    optimizer = torch.optim.Adam(model.parameters())
    trained(optimizer, model)
    values = {"net_G": model.state_dict(), "net_D": other.state_dict(), "optimizer_G": optimizer.state_dict()}
    torch.save(values, tmp_path / "gan.pt")
    with pytest.raises(CkptError, match="lie under no name") as caught:
        convert(tmp_path / "gan.pt", tmp_path / "z.pt", to="pt")
    assert "--key net_G" in str(caught.value.hint)
    made = run("convert", tmp_path / "gan.pt", tmp_path / "z.pt", "--to", "pt", "--key", "net_G")
    assert made.code == 0 and "optimizer_G, whose parameters have no names" in made.out + made.err
    written = torch.load(tmp_path / "z.pt", weights_only=True)["model_state_dict"]
    assert all(torch.equal(written[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("names", [False, True])
def test_an_optimizer_that_fits_another_model_of_the_file_too(names: bool, tmp_path: Path) -> None:
    student, teacher, small = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(student.named_parameters() if names else student.parameters())
    student(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    models = {name: each.state_dict() for name, each in (("student", student), ("small", small))}
    saved = {**models, "optimizer": optimizer.state_dict(), "step": 1}
    torch.save({**saved, "teacher": teacher.state_dict()}, tmp_path / "two.pt")
    torch.save(saved, tmp_path / "one.pt")

    def said(file: str, key: str, to: str, *words: str) -> str:
        ran = run("convert", tmp_path / file, tmp_path / "x", "--dry-run", "--key", key, "--to", to, *words)
        assert ran.code == 0, ran
        return ran.out + ran.err

    for to in ("pt", "zero2", "dcp"):
        told = said("two.pt", "teacher", to)
        assert "taken for that of 'teacher', and fits student as well" in told and "small" not in told
        assert "as well" not in said("one.pt", "student", to)
        ran = run("convert", tmp_path / "two.pt", tmp_path / f"{to}-small", "--key", "small", "--to", to)
        unfit = "[2, 3], and its parameter [2, 2]" if names else "whose parameters have no names"
        unfit = unfit if names or to == "pt" else "which parameters the optimizer has is not known"
        assert (ran.code == 0) == (not names and to == "pt") and unfit in ran.err, ran
    assert "as well" not in said("two.pt", "teacher", "hf")
    assert "as well" not in said("two.pt", "teacher", "pt", "--reset-optimizer")


def test_adagrad_is_called_otherwise_by_deepspeed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.Adagrad(model.parameters())
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    made = convert(source, tmp_path / "z", to="zero2", optimizer_class="DeepSpeedCPUAdagrad")
    (group,) = open_checkpoint(made.destination).groups
    assert group.state.keys() == {"fp32", "exp_avg_sq"}
    assert {type(step) for step in group.scalars["step"].values()} == {int}
    back = convert(made.destination, tmp_path / "b.pt", to="pt", optimizer_class="Adagrad")
    kinds = torch.load(back.destination, weights_only=True)["optimizer_state_dict"]["state"][0]
    assert kinds.keys() == {"step", "sum"}


@pytest.mark.parametrize("name", ["SGD", "Muon", "Adagrad"])
def test_a_class_that_keeps_other_state_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        convert(SAMPLES / "z2_bf16_ws2", tmp_path / "x", to="zero2", optimizer_class=name)
    assert caught.value.id == "optimizer-differs" and not (tmp_path / "x").exists()
    convert(SAMPLES / "z2_bf16_ws2", tmp_path / "x", to="zero2", optimizer_class=name, reset_optimizer=True)


@pytest.mark.parametrize("name", ["FusedAdam", "DeepSpeedCPUAdam", "Adam"])
def test_a_class_that_does_not_read_maximize_is_refused(name: str, tmp_path: Path) -> None:
    """Nor what torch's Adam does with weight decay: that is said, as the class may be made for it."""
    model = net()
    for maximize, decay in ((True, 0.0), (False, 0.1), (False, 0.0)):
        optimizer = torch.optim.Adam(model.named_parameters(), maximize=maximize, weight_decay=decay)
        trained(optimizer, model)
        source = saved(tmp_path / "a.pt", model, optimizer)
        dst = tmp_path / f"{maximize}{decay}"
        if maximize and name != "Adam":
            with pytest.raises(CkptError) as caught:
                convert(source, dst, to="zero2", world_size=2, optimizer_class=name)
            assert caught.value.id == "optimizer-differs" and "maximize" in caught.value.message
            assert not dst.exists()
            continue
        made = convert(source, dst, to="zero2", world_size=2, optimizer_class=name)
        told = any(f"make {name} with adam_w_mode=False" in note for note in made.notes)
        assert told == (bool(decay) and name != "Adam")


@pytest.mark.parametrize("to", FOLDERS)
def test_quantised_state_is_refused_by_name(to: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    tree = torch.load(source, weights_only=True)
    for state in tree["optimizer_state_dict"]["state"].values():
        state["state1"] = (state.pop("momentum_buffer") * 10).to(torch.uint8)
    torch.save(tree, source)
    with pytest.raises(CkptError) as caught:
        convert(source, tmp_path / "z", to=to)
    assert caught.value.id == "state-quantised" and "state1" in caught.value.message
    assert convert(source, tmp_path / "b.pt", to="pt").destination.is_file()
    convert(source, tmp_path / "z", to=to, reset_optimizer=True)


@pytest.mark.parametrize(
    "name",
    ["bf16", "fp16", "amsgrad", "cpuadam", "lion", "adagrad", "sgd", "nadam", "bnb_adamw"],
)
def test_deepspeeds_optimizers_there_and_back(name: str, tmp_path: Path) -> None:
    """From DeepSpeed over each form and back: one digest of weights, moments and steps."""
    source = SAMPLES / f"z2_{name}_ws2"
    state = digest(source).digests.state
    for to, file in (("dcp", "d"), ("pt", "p.pt")):
        there = convert(source, tmp_path / file, to=to).destination  # type: ignore[arg-type]
        back = convert(there, tmp_path / f"back-{to}", to="zero2", world_size=3).destination
        assert digest(there).digests.state == state == digest(back).digests.state, to


@pytest.mark.parametrize("to", [to for to in TARGETS if to != "hf"])
def test_eight_bit_state_of_ranks_is_refused_before_anything_is_written(to: str, tmp_path: Path) -> None:
    made = tmp_path / "x"
    ran = run("convert", SAMPLES / "z2_bnb_adamw8_ws2", made, "--to", to)
    assert ran.code == 2 and "is quantised (uint8): blocks are not cut" in ran.err, ran
    assert "hint:" in ran.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["zero2", "universal", "dcp"])
@pytest.mark.parametrize("source", ["ambiguous", "stage 0"])
def test_an_order_that_is_not_known_is_refused_where_state_is_named(
    source: str, to: Any, tmp_path: Path
) -> None:
    """Losing the optimizer is no note: the user says that it may be."""
    path = SAMPLES / "z0_frozen_ws2"
    if source == "ambiguous":
        model = net()
        optimizer = torch.optim.AdamW(groups_of(model))
        trained(optimizer, model)
        path = saved(tmp_path / "a.pt", model, optimizer)
    ran = run("convert", path, tmp_path / "x", "--to", to)
    assert ran.code == 2 and "error[no-groups]" in ran.err and "--reset-optimizer" in ran.err, ran
    assert not (tmp_path / "x").exists()
    if to == "dcp":
        assert run("convert", path, tmp_path / "x", "--to", to, "--reset-optimizer").code == 0


@pytest.mark.parametrize("to", ["zero2", "zero3", "universal"])
def test_samples_that_are_not_known_are_not_0(to: Any, tmp_path: Path) -> None:
    assert open_checkpoint(PT).training.samples is None
    made = convert(PT, tmp_path / "x", to=to).destination
    assert open_checkpoint(made).training.samples is None
    assert verify(made).ok


# --- the options ----------------------------------------------------------------------------------------


def test_configuration_and_tokenizer_come_along(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "hf/gpt2_tied", model)
    (model / "tokenizer.json").write_text("{}")
    made = tmp_path / "made"
    ran = run("convert", PT, made, "--to", "hf", "--hf-config", model)
    assert ran.code == 0 and "from_pretrained" in ran.err, ran
    assert {p.name for p in made.iterdir()} == {
        "ckpt-manifest.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (made / "config.json").read_bytes() == (model / "config.json").read_bytes()
    ran = run("convert", PT, tmp_path / "without", "--to", "hf")
    assert ran.code == 0 and "--hf-config DIR" in ran.err and "from_pretrained" not in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--to gguf", "'gguf' is not a format that ckpt writes"),
        ("--to pt --dtype int4", "'int4' is not a dtype"),
        ("--to zero2 --mesh 2x2", "--mesh is for --to dcp"),
        ("--to dcp --mesh 2", "mesh"),
        ("--to dcp --mesh 100000x100000", "10000000000 makes no sense"),
        ("--to dcp --mesh 00x2", "is no mesh"),
        ("--to pt --world-size 2", "pt files are for any number of ranks"),
        ("--to universal --world-size 2", "universal files are for any number of ranks"),
        ("--to zero2 --world-size 0", "0"),
        ("--to zero2 --dcp-layout flat", "--dcp-layout is for --to dcp"),
        ("--to zero2 --hf-config .", "--hf-config is for --to hf"),
        ("--to hf --hf-config /does/not/exist", "does not exist"),
        ("--to pt --rename nothing=x", "fits no name"),
        ("--to pt --rename nothing", "is no renaming"),
        ("--to pt --rename (=x", "is no renaming"),
        ("--to pt --include nothing*", "nothing"),
        ("--to pt --optimizer-class Adom", "did you mean Adam"),
        ("--to zero2 --optimizer-class SGD", "optimizer"),
        ("--to hf --optimizer-class AdamW", "for formats with an optimizer"),
        ("--to pt --like /does/not/exist", "does/not/exist"),
        ("", "--to"),
    ],
)
def test_what_does_not_fit_is_refused(words: str, said: str, tmp_path: Path) -> None:
    ran = run("convert", SAMPLES / "z2_groups_ws2", tmp_path / "x", *words.split())
    assert ran.code == 2 and said.lower() in ran.err.lower(), ran
    assert not list(tmp_path.iterdir())


# --- the lines ------------------------------------------------------------------------------------------


def test_the_order_that_was_matched_is_shown(tmp_path: Path) -> None:
    done = run("convert", PT, tmp_path / "z", "--to", "zero2", "--dry-run")
    assert done.code == 0 and "in the model's order and by shape" in done.err + done.out
    assert not (tmp_path / "z").exists()


def test_buffers_and_frozen_weights_are_told_apart_in_a_single_file(tmp_path: Path) -> None:
    source = open_checkpoint(SAMPLES / "z3_groups_ws2")
    made = open_checkpoint(convert(SAMPLES / "z3_groups_ws2", tmp_path / "a.pt", to="pt").destination)
    assert (made.buffers, made.frozen) == (source.buffers, source.frozen)
    assert "buffer_names" not in made.client
    assert all(isinstance(ref, TensorRef) for ref in made.tensors.values())


@pytest.mark.parametrize("to", ["pt", "zero2", "dcp"])
def test_tied_names_change_places(to: Any, tmp_path: Path) -> None:
    """The same bytes under the same names, and the optimizer's state is the other's."""
    source = convert(SAMPLES / "z2_tied_ws2", tmp_path / "a.pt", to="pt").destination
    ((alias, owner),) = open_checkpoint(source).shared.items()
    swapped = [(f"^{alias}$", "t"), (f"^{owner}$", alias), ("^t$", owner)]
    made = convert(source, tmp_path / "b.pt", to=to, rename=swapped, digest=True)
    found = open_checkpoint(made.destination)
    assert found.shared == {owner: alias} and alias in found.groups[0].params
    tree = torch.load(source, weights_only=False)
    tensors = {name: as_torch(ref) for name, ref in found.tensors.items()}
    assert all(identical(tensors[name], ref) for name, ref in tree["model_state_dict"].items())


@pytest.mark.parametrize("to", ["zero0", "zero1", "zero2", "universal"])
def test_what_may_be_frozen_or_a_buffer_stays_unknown(to: Any, tmp_path: Path) -> None:
    """A float buffer and a frozen weight look alike in a file of torch: no format makes either of it."""
    source = FIXTURES / "dcp/fsdp2_ws2"
    unsure = {"frozen", "mean"}
    made = convert(source, tmp_path / "z", to=to, digest=False).destination
    found = open_checkpoint(made)
    assert found.roles_guessed and found.frozen == unsure and not found.buffers & unsure
    (model,) = made.glob("*/mp_rank_00_model_states.pt")
    saved = torch.load(model, weights_only=False)
    assert unsure <= {*saved["buffer_names"]} and unsure <= saved["frozen_param_shapes"].keys()
    assert "2 frozen or buffers" in run("inspect", made).out
    assert json.loads(run("inspect", made, "--json").out)["frozen_or_buffers"]
    ran = run("convert", made, tmp_path / "z3", "--to", "zero3")
    assert ran.code == 2 and "a frozen parameter or a buffer?" in ran.err and "zero2" in ran.err
    assert verify(made).ok and not open_checkpoint(SAMPLES / "z2_frozen_ws2").roles_guessed


def test_no_line_loads_more_than_weights(tmp_path: Path) -> None:
    """Objects in the client's values: torch names them, and the lines run when it was told of them."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    trained(optimizer, model)
    made = convert(
        saved(tmp_path / "a.pt", model, optimizer, args=Namespace(lr=1)), tmp_path / "b.pt", to="pt"
    )
    words, *lines = made.next[1:]
    assert words.startswith("#") and "add_safe_globals" in words
    names = torch.serialization.get_unsafe_globals_in_checkpoint(made.destination)
    assert names == ["argparse.Namespace"]
    again = net()
    fresh = torch.optim.AdamW(again.parameters())
    with torch.serialization.safe_globals([Namespace]):
        scope = {"model": again, "optimizer": fresh, "torch": torch}
        for line in lines:
            exec(line, scope)
    assert trained(fresh, again) == trained(optimizer, model)


@pytest.mark.parametrize("source", ["dcp/step-3", "dcp/fsdp2_ws2", "monolithic/timm/checkpoint-5.pth.tar"])
def test_classes_are_said_where_torch_refuses_them(source: str, tmp_path: Path) -> None:
    """Bytes and types of torch are objects in a pickle, and weights_only=True takes them."""
    made = convert(FIXTURES / source, tmp_path / "b.pt", to="pt", digest=False)
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(made.destination)
    said = [line for line in made.next if line.startswith("#")]
    assert len(said) == bool(refused) and all(name in said[0] for name in refused)
    if not refused:
        assert torch.load(made.destination, weights_only=True)


def test_settings_of_groups_that_differ_are_said_as_values(tmp_path: Path) -> None:
    """Stage 3 takes those of the first group for all: the line gives each group its own."""
    model = net()
    kinds = [[p for p in model.parameters() if p.ndim == n] for n in (2, 1)]
    other = {"params": kinds[1], "weight_decay": 0.0, "betas": (0.8, 0.9)}
    optimizer = torch.optim.AdamW([{"params": kinds[0]}, other])
    trained(optimizer, model)
    made = convert(saved(tmp_path / "a.pt", model, optimizer), tmp_path / "u", to="universal")
    (line,) = (line for line in made.next if line.startswith("for group, saved"))
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{"lr": 1e-3}, {"lr": 1e-3}]))
    exec(line, {"engine": engine})
    decays = [(group["weight_decay"], group["betas"]) for group in engine.optimizer.param_groups]
    assert decays == [(0.01, (0.9, 0.999)), (0.0, (0.8, 0.9))]


# --- nothing without a word -----------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.emb(x))
        return out


def of_tied(path: Path, tied: bool) -> Path:
    model = Tied(tied)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    return saved(path, model, optimizer)


def test_two_tensors_are_not_made_one(tmp_path: Path) -> None:
    """From a folder that names its parameters, so that the optimizer's groups are no reason."""
    one, two = of_tied(tmp_path / "one.pt", True), tmp_path / "two"
    convert(of_tied(tmp_path / "two.pt", False), two, to="zero2")
    for to in ("pt", "dcp", "zero2"):
        refused = run("convert", two, tmp_path / "x", "--to", to, "--like", one)
        assert refused.code == 2 and "error[model-differs]" in refused.err and "head.weight" in refused.err
        assert not (tmp_path / "x").exists()
    assert run("convert", one, tmp_path / "x", "--to", "dcp", "--like", one).code == 0


def test_the_other_name_of_an_owner_that_is_left_out_has_its_master_and_state(tmp_path: Path) -> None:
    source = SAMPLES / "z2_tied_ws2"
    before = open_checkpoint(source)
    ((alias, owner),) = before.shared.items()
    run("extract", source, tmp_path / "w.safetensors", "--exclude", owner)
    weights = open_checkpoint(tmp_path / "w.safetensors").tensors
    assert owner not in weights
    assert identical(as_torch(weights[alias]), as_torch(before.master[owner]))
    convert(source, tmp_path / "a.pt", to="pt", exclude=[owner])
    moments = {
        n: ref for g in open_checkpoint(tmp_path / "a.pt").groups for n, ref in g.state["exp_avg"].items()
    }
    there = {n: ref for g in before.groups for n, ref in g.state["exp_avg"].items()}
    assert identical(as_torch(moments[alias]), as_torch(there[owner]))


@pytest.mark.parametrize(
    ("source", "more", "says"),
    [
        ("z2_bf16_ws2", ["--to", "pt", "--dtype", "bf16"], "the fp32 master weights are left out"),
        ("z2_bf16_ws2", ["--to", "pt", "--dtype", "fp16"], "values beyond 65504 become infinite"),
        (
            "z2_bf16_ws2",
            ["--to", "hf", "--dtype", "fp8_e4m3"],
            "no scales are written, and values beyond 448",
        ),
    ],
)
def test_what_a_dtype_loses_is_said(source: str, more: list[str], says: str, tmp_path: Path) -> None:
    done = run("convert", SAMPLES / source, tmp_path / "x", *more)
    assert done.code == 0 and says in done.err


def test_one_dtype_for_all_weights_is_said(tmp_path: Path) -> None:
    model = {"a": torch.randn(4, 4).bfloat16(), "n": torch.randn(4)}
    params = [nn.Parameter(value) for value in model.values()]
    optimizer = torch.optim.SGD(params)
    sum(p.sum().float() for p in params).backward()  # type: ignore[union-attr]
    optimizer.step()
    held = {"model_state_dict": model, "optimizer_state_dict": optimizer.state_dict(), "buffer_names": []}
    torch.save({**held, "global_step": 1}, tmp_path / "a.pt")
    done = run("convert", tmp_path / "a.pt", tmp_path / "z", "--to", "zero3")
    assert done.code == 0 and "1 weights become bf16" in done.err


def test_a_count_that_some_parameters_lack_is_refused(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    state = torch.load(source, weights_only=True)
    del state["optimizer_state_dict"]["state"][1]["step"]
    torch.save(state, source)
    refused = run("convert", source, tmp_path / "u", "--to", "universal")
    assert refused.code == 2 and "error[state-incomplete]" in refused.err and "'step'" in refused.err


# --- exclude_frozen_parameters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "src",
    [SAMPLES / "z1_tied_frozen_exclude_ws2", SAMPLES / "z3_exclude_frozen_ws2", FIXTURES / "hf-trainer/peft"],
    ids=lambda path: path.name,
)
def test_what_was_frozen_and_left_out_stays_known_through_every_format(src: Path, tmp_path: Path) -> None:
    """Each way loads into a model that has the frozen weights already, and not strictly."""
    src = src / "checkpoint-2" if src.name == "peft" else src
    weights = convert(src, tmp_path / "w", to="hf")
    assert any("not in the source" in note for note in weights.notes)
    again = convert(weights.destination, tmp_path / "w.pt", to="pt")
    assert any("not in the source" in note for note in again.notes)
    assert any("strict=False" in line for line in again.next)
    for to in (target for target in TARGETS if target != "hf"):
        made = convert(src, tmp_path / to, to=to, digest=False)
        assert any("frozen weights are not in the source" in note for note in made.notes)
        assert any("strict=False" in line for line in made.next)
        src = made.destination
        assert open_checkpoint(src).excludes_frozen
        assert verify(src).ok
    whole = convert(SAMPLES / "z2_lora_ws2", tmp_path / "whole", to="zero1", digest=False)
    assert not any("not in the source" in note or "strict=False" in note for note in whole.notes + whole.next)


def test_the_key_that_tells_it_is_not_the_training_codes(tmp_path: Path) -> None:
    source = SAMPLES / "z2_exclude_frozen_ws2"
    made = convert(source, tmp_path / "z", to="zero1", digest=False)
    assert "exclude_frozen_parameters" in open_checkpoint(made.destination).client
    for command in ("prove", "diff"):
        assert "client state" not in run(command, source, made.destination).out
    notes = convert(made.destination, tmp_path / "w", to="hf", digest=False).notes
    assert not any("the training code's" in note for note in notes)


@pytest.mark.parametrize("to", [to for to in TARGETS if to not in ("dcp", "hf")])
def test_the_key_means_nothing_in_a_later_save_of_all_weights(to: Any, tmp_path: Path) -> None:
    """A run loads the frozen weights and then this, and saves what load_checkpoint returned as its own."""
    part = convert(SAMPLES / "z2_lora_exclude_ws2", tmp_path / "part", to=to, digest=False).destination
    whole = convert(SAMPLES / "z2_lora_ws2", tmp_path / "whole", to=to, digest=False).destination
    said = open_checkpoint(part).client["exclude_frozen_parameters"]
    for file in [whole] if to == "pt" else whole.rglob("*model_states.pt"):
        torch.save(torch.load(file, weights_only=False) | {"exclude_frozen_parameters": said}, file)
    assert open_checkpoint(part).excludes_frozen and not open_checkpoint(whole).excludes_frozen
    made = convert(whole, tmp_path / "made", to=to, digest=False)
    assert not any("not in the source" in each for each in made.notes)
    assert not any("load_module_strict=False" in line for line in made.next)
    assert "exclude_frozen_parameters" not in open_checkpoint(made.destination).client


def test_what_accelerate_has_no_place_for_is_named(tmp_path: Path) -> None:
    source = SAMPLES / "z2_lora_exclude_ws2"
    made = convert(source, tmp_path / "d", to="dcp", dcp_layout="accelerate", digest=False)
    assert any("frozen weights are not in the source" in note for note in made.notes)
    assert not any("accelerate keeps it" in note and "exclude_frozen" in note for note in made.notes)


def test_an_adapter_without_its_base_was_left_out_at_every_stage(tmp_path: Path) -> None:
    convert(SAMPLES / "z2_lora_exclude_ws2", tmp_path / "one", to="zero1", digest=False)
    file = tmp_path / "one/global_step3/mp_rank_00_model_states.pt"
    saved = torch.load(file, weights_only=False)
    del saved["exclude_frozen_parameters"]
    torch.save({**saved, "frozen_param_fragments": None}, file)  # as DeepSpeed has it at stage 1
    assert open_checkpoint(tmp_path / "one").excludes_frozen
    assert not open_checkpoint(SAMPLES / "z1_frozen_ws2").excludes_frozen


def test_the_step_of_the_files_beside_it_is_carried(tmp_path: Path) -> None:
    """The Trainer's FSDP folders have it in trainer_state.json alone."""
    source = shutil.copytree(FIXTURES / "dcp/accelerate_ws2", tmp_path / "checkpoint-3")
    (source / "trainer_state.json").write_text('{"global_step": 3, "epoch": 0.5, "log_history": []}')
    made = convert(source, tmp_path / "z", to="zero2", digest=False)
    assert any("step 3 is that of the files beside it" in note for note in made.notes)
    training = open_checkpoint(made.destination).training
    assert (training.step, training.epoch) == (3, 0.5)
    assert (made.destination / "global_step3").is_dir()
    ran = run("digest", source, "--compare", source)
    assert "counters and schedule: neither holds any" in ran.out


@pytest.mark.parametrize("to", ["hf", "pt", "dcp"])
def test_files_of_the_run_beside_the_weights_are_named(to: Any, tmp_path: Path) -> None:
    """The Trainer without DeepSpeed: its optimizer is not in the file of weights."""
    source = FIXTURES / "hf-trainer/plain/checkpoint-2"
    (note,) = [
        n for n in convert(source, tmp_path / "x", to=to, digest=False).notes if "beside" in n and "not" in n
    ]
    assert "optimizer.pt" in note and "scheduler.pt" in note and "rng_state.pth" in note
    assert "trainer_state.json" in note
    again = convert(FIXTURES / "hf/single", tmp_path / "y", to=to, digest=False)
    assert not any("beside the weights" in note for note in again.notes)


@pytest.mark.parametrize("to", ["zero2", "pt", "dcp", "hf"])
@pytest.mark.parametrize(
    ("source", "files"),
    [
        (
            "hf-trainer/deepspeed/checkpoint-4",
            "rng_state.pth, scheduler.pt, trainer_state.json, training_args.bin",
        ),
        ("accelerate/deepspeed", "random_states_0.pkl, scheduler.bin"),
        ("bundle/checkpoint-200", "training_info.json"),
        ("accelerate/deepspeed/pytorch_model", "random_states_0.pkl, scheduler.bin"),
    ],
)
def test_files_of_the_run_around_a_tag_folder_are_named(
    source: str, files: str, to: Any, tmp_path: Path
) -> None:
    """DeepSpeed's own there are not, and a reshard, which copies them, does not call them missing."""
    ranks = 1 if to == "zero2" else None
    made = convert(FIXTURES / source, tmp_path / "x", to=to, world_size=ranks, digest=False)
    said = f"not carried: {files}, the run's files beside the weights"
    assert [note for note in made.notes if "the run's files" in note] == [said]
    again = reshard(FIXTURES / source, world_size=2, how=Writing(dry_run=True))
    assert not any("the run's files" in note for note in again.notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_around_a_tag_that_may_not_be_listed_is_named(tmp_path: Path) -> None:
    save = shutil.copytree(FIXTURES / "accelerate/deepspeed", tmp_path / "save")
    save.chmod(0o311)
    try:
        made = convert(save / "pytorch_model", tmp_path / "x", to="pt", digest=False)
    finally:
        save.chmod(0o755)
    said = f"unknown whether files of the run lie in {save}: the folder may not be listed"
    assert said in made.notes


@pytest.mark.parametrize("to", ["zero2", "pt", "dcp", "hf"])
def test_averages_of_the_weights_that_options_do_not_reach_are_named(to: Any, tmp_path: Path) -> None:
    """By names of the model, with a wrapper's prefix or without; other tensors of training code are not."""
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    trained(optimizer, model)
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema = {"decay": 0.9, "module": {f"module.{name}": tensor for name, tensor in copies.items()}}
    other = {"seen": torch.arange(3), "means": [torch.ones(2)]}
    source = saved(tmp_path / "a.pt", model, optimizer, ema_state_dict=copies, ema=ema, other=other)

    def said(name: str, **more: Any) -> list[str]:
        ranks = 2 if to == "zero2" else None
        made = convert(source, tmp_path / name, to=to, world_size=ranks, digest=False, **more)
        return [note for note in made.notes if "carried as" in note]

    assert said("as-it-is") == []
    renamed = said("renamed", rename=[(r"^0\.", "first.")])
    both = said("both", dtype="bf16", exclude=iter(["3.bias"]))
    if to == "hf":
        assert renamed == both == []
    else:
        what = "ema_state_dict, ema: carried as they were,"
        assert renamed == [f"{what} --rename does not reach them"]
        assert both == [f"{what} --exclude and --dtype do not reach them"]
    if to == "pt":
        kept = torch.load(tmp_path / "both", weights_only=True)["ema_state_dict"]
        assert identical(kept["3.bias"], copies["3.bias"])
    if to == "dcp":
        assert said("accelerate", dtype="bf16", dcp_layout="accelerate") == []


def test_names_of_a_compiled_model_become_those_that_a_file_is_read_with(tmp_path: Path) -> None:
    """torch.compile's `_orig_mod.` is removed by whoever reads a single file: the result must verify."""
    model = net()
    held = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(held, tmp_path / "model.safetensors")
    made = convert(tmp_path / "model.safetensors", tmp_path / "out.pt", to="pt", digest=True)
    assert "the prefix '_orig_mod.' of every name was removed" in made.plan.notes
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    found = found.get("model_state_dict", found)
    assert set(found) == set(model.state_dict())


@pytest.mark.parametrize("to", ["pt", "dcp", "zero2"])
def test_the_state_of_an_owner_that_is_left_out_is_the_heirs(to: Any, tmp_path: Path) -> None:
    """It stands where a model without the owner has it, and a new optimizer of that model reads it there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 4))
    model[3].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trained(optimizer, model)
    source = saved(tmp_path / "a.pt", model, optimizer)
    made = convert(source, tmp_path / "made", to=to, exclude=["0.*"])
    assert not any("state of" in note or note.startswith("left out") for note in made.notes)
    (group,) = open_checkpoint(made.destination).groups
    rest = {f"{i}.{name}": p for i in (1, 2, 3) for name, p in model[i].named_parameters()}
    assert list(group.params) == list(rest)
    for name, p in rest.items():
        assert identical(as_torch(group.state["exp_avg"][name]), optimizer.state[p]["exp_avg"])
    if to == "pt":
        state = torch.load(made.destination)["optimizer_state_dict"]
        new = torch.optim.AdamW(rest.values(), lr=0.1)
        new.load_state_dict(state)
        assert all(torch.equal(new.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]) for p in rest.values())


@pytest.mark.parametrize("to", [*FOLDERS, "pt", "hf"])
def test_state_without_weights_becomes_nothing_else(to: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        convert(FIXTURES / "dcp/accelerate_ws2/optimizer_0", tmp_path / "made", to=to)
    assert caught.value.id == "nothing-selected" and "no weights" in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["pt", "zero0", "zero1", "zero2", "zero3", "universal", "dcp", "hf"])
def test_names_that_change_places_are_refused_where_places_count(to: Any, tmp_path: Path) -> None:
    """A model that has them in the order as before would get one's state, and ZeRO's masters, for another."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    source = saved(tmp_path / "a.pt", model, optimizer)
    ranks = 1 if to in ("zero1", "zero2", "zero3") else None
    swap = [(r"^a\.", "T."), (r"^b\.", "a."), (r"^T\.", "b.")]
    if to in ("universal", "dcp", "hf"):
        made = convert(source, tmp_path / "out", to=to, world_size=ranks, rename=swap)
        assert not any("by position" in note for note in made.notes)
        return
    with pytest.raises(CkptError, match="another order") as raised:
        convert(source, tmp_path / "out", to=to, world_size=ranks, rename=swap)
    assert "--like" in raised.value.hint
    assert not (tmp_path / "out").exists()
    other = convert(source, tmp_path / "like", to=to, world_size=ranks).destination
    made = convert(source, tmp_path / "out", to=to, world_size=ranks, rename=swap, like=other)
    (group,) = open_checkpoint(made.destination).groups
    assert list(group.params) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    made = convert(source, tmp_path / "new", to=to, world_size=ranks, rename=[("^a", "z")])
    assert any("restored by position" in note for note in made.notes)


def test_what_lies_beside_the_weights_under_one_key_goes_along(tmp_path: Path) -> None:
    one, two = nn.Linear(2, 2), nn.Linear(3, 1)
    parts = {"model": {"G": one.state_dict(), "D": two.state_dict()}, "a.b": {"c": 1}, "epoch": 1}
    torch.save(parts, tmp_path / "gan.pt")
    convert(tmp_path / "gan.pt", tmp_path / "out.pt", to="pt", key="model.G")
    held = torch.load(tmp_path / "out.pt", weights_only=True)
    assert identical(held["model_state_dict"]["weight"], one.weight.detach())
    assert held["model"].keys() == {"D"}
    assert identical(held["model"]["D"]["weight"], two.weight.detach())
    assert held["a.b"] == {"c": 1}
    made = convert(tmp_path / "gan.pt", tmp_path / "hf", to="hf", key="model.G")
    assert any("model" in note and "not carried" in note for note in made.notes)
    with torch.no_grad():
        two.weight.add_(1)
    torch.save(parts, tmp_path / "other.pt")
    ran = run("digest", tmp_path / "gan.pt", "--key", "model.G", "--compare", tmp_path / "other.pt")
    assert ran.code == 1
    assert "client state model.D.weight" in ran.out


def test_a_state_dict_beside_the_model_is_compared_and_kept_with_its_versions(tmp_path: Path) -> None:
    """That of a module has the versions of its parts as an attribute."""
    model, mean = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(2, 2))
    parts = {"model": model.state_dict(), "ema": mean.state_dict()}
    torch.save(parts, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.pt", to="pt")
    back = torch.load(tmp_path / "b.pt", weights_only=True)["ema"]
    assert back._metadata == parts["ema"]._metadata  # type: ignore[attr-defined]
    assert all(identical(back[name], value) for name, value in parts["ema"].items())
    torch.save({**parts, "ema": dict(mean.state_dict())}, tmp_path / "plain.pt")
    assert run("digest", tmp_path / "a.pt", "--compare", tmp_path / "plain.pt").code == 0
    with torch.no_grad():
        mean[0].weight.add_(1)
    torch.save(parts, tmp_path / "c.pt")
    ran = run("digest", tmp_path / "a.pt", "--compare", tmp_path / "c.pt")
    assert ran.code == 1
    assert "client state ema.0.weight" in ran.out


def test_steps_that_stage_3_makes_one_are_named(tmp_path: Path) -> None:
    """Rates that are tensors are alike where their values are."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    optimizer = torch.optim.AdamW([{"params": each.parameters(), "lr": torch.tensor(1e-3)} for each in model])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    source = saved(tmp_path / "a.pt", model, optimizer)
    notes = convert(source, tmp_path / "same", to="universal").notes
    assert not any("apart" in note or "steps differ" in note for note in notes)
    held = torch.load(source, weights_only=True)
    for number in held["optimizer_state_dict"]["param_groups"][1]["params"]:
        held["optimizer_state_dict"]["state"][number]["step"] += 3
    torch.save(held, source)
    assert any("steps differ" in note for note in convert(source, tmp_path / "apart", to="universal").notes)


def test_no_line_is_for_a_stage_that_takes_no_such_state(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    made = convert(saved(tmp_path / "a.pt", model, optimizer), tmp_path / "out", to="universal")
    assert any("stages 1 and 2 alone load it" in note for note in made.notes)
    assert not any("stage 3" in line for line in made.next)


def test_a_group_without_parameters_is_named_where_the_layout_has_none(tmp_path: Path) -> None:
    """torch fails to load the flat layout into an optimizer with such a group, its own as well."""
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": []}])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    source = saved(tmp_path / "a.pt", model, optimizer)
    made = convert(source, tmp_path / "flat", to="dcp", dcp_layout="flat")
    assert any("group without parameters" in note for note in made.notes)
    made = convert(source, tmp_path / "nested", to="dcp")
    assert not any("group without parameters" in note for note in made.notes)
