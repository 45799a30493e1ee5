"""The optimizer of single files: names where one answer is possible; written so that torch trains on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support import FIXTURES, RANK_LOCAL, SAMPLES, as_torch, name_of, variant_of
from torch import nn

from ckpttools.checkpoint import Checkpoint
from ckpttools.execute import execute
from ckpttools.formats import open_checkpoint
from ckpttools.formats import torch as pt
from ckpttools.formats.ids import by_shape
from ckpttools.tensors import TensorRef

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "SGD-plain": lambda p: torch.optim.SGD(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
}


# what is kept for a parameter does not show its shape
UNKNOWN = {("SGD-plain", "all"), ("SGD-plain", "decay"), ("Adafactor", "all"), ("Adafactor", "decay")}


class Net(nn.Module):
    """Tied, frozen, a 0-d parameter, buffers of three types."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.fixed = nn.Linear(4, 6)
        self.conv = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.back = nn.Linear(5, 4, bias=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight
        self.fixed.requires_grad_(False)
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.relu(self.conv(self.fixed(self.emb(x)))))
        out: torch.Tensor = self.head(self.back(h) * self.scale)
        return out


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: Sequence[int]) -> list[float]:
    losses = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        x = torch.randint(0, 7, (8,), generator=generator)
        loss = nn.functional.cross_entropy(net(x), (x + 1) % 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(make: Callable[[Any], torch.optim.Optimizer], groups: str) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(_params(net, groups))
    steps(net, optimizer, range(3))
    return net, optimizer


def _params(net: Net, groups: str) -> Any:
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    return {
        "all": [p for _, p in named],
        "named": named,
        "decay": [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ],
        "two named": [
            {"params": named[1::2], "weight_decay": 0.1},
            {"params": named[::2], "weight_decay": 0.0},
        ],
    }[groups]


def save(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, **more: object) -> Path:
    held = {"model_state_dict": net.state_dict(), "optimizer_state_dict": optimizer.state_dict(), **more}
    torch.save(held, path)
    return path


def written(checkpoint: Checkpoint, path: Path) -> Path:
    execute(pt.plan(checkpoint), path, source=checkpoint.path)
    return path


def state_by_name(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], Any]:
    names = {id(p): name for name, p in net.named_parameters()}
    return {(names[id(p)], kind): v for p, each in optimizer.state.items() for kind, v in each.items()}


def held(checkpoint: Checkpoint) -> dict[tuple[str, str], Any]:
    return {
        (name, kind): as_torch(value) if isinstance(value, TensorRef) else value
        for group in checkpoint.groups
        for kinds in (group.state, group.scalars)
        for kind, values in kinds.items()
        for name, value in values.items()
    }


def equal(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(
        (a[key] is None and b[key] is None)
        or (torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) and type(a[key]) is type(b[key]))
        for key in a
    )


@pytest.mark.parametrize("groups", ["all", "named", "decay", "two named"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_gets_its_names_and_goes_back(name: str, groups: str, tmp_path: Path) -> None:
    """Read by name, written without the file's own nodes, loaded by torch: the losses of the run itself."""
    net, optimizer = trained(OPTIMIZERS[name], groups)
    source = save(tmp_path / "source.pt", net, optimizer, epoch=2, global_step=3)
    checkpoint = open_checkpoint(source)
    if (name, groups) in UNKNOWN:
        assert checkpoint.groups == ()
        assert "has no names" in checkpoint.notes[0]
        return
    expected = state_by_name(net, optimizer)
    assert equal(held(checkpoint), expected)
    for group in checkpoint.groups:  # a count beside the parameter without dimensions is one as all others
        assert not group.state.keys() & group.scalars.keys()
    assert checkpoint.frozen == {"fixed.weight", "fixed.bias"}
    assert checkpoint.buffers == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "mask"}
    result = written(replace(checkpoint, template=None), tmp_path / "again.pt")
    again = torch.load(result, weights_only=True)
    other = Net()
    fresh = OPTIMIZERS[name](_params(other, groups))
    other.load_state_dict(again["model_state_dict"])
    fresh.load_state_dict(again["optimizer_state_dict"])
    assert equal(state_by_name(other, fresh), expected)
    assert steps(other, fresh, range(3, 7)) == steps(net, optimizer, range(3, 7))
    assert (again["epoch"], again["global_step"]) == (2, 3)


def test_what_has_not_changed_is_written_as_it_was(tmp_path: Path) -> None:
    """The file's own keys, its classes and orders, the prefix of DDP, a list around the optimizer's dict."""
    net, optimizer = trained(OPTIMIZERS["AdamW"], "decay")
    weights = {f"module.{name}": value for name, value in net.state_dict().items()}
    tree = {
        "it": 3,
        "state_dict": weights,
        "optimizer_states": [optimizer.state_dict()],
        "rng": (1, [2, None]),
        "lr_schedulers": [{"last_epoch": 3}],
        "hyper": {"lr": 0.5, 3: b"x"},
    }
    torch.save(tree, tmp_path / "own.ckpt")
    checkpoint = open_checkpoint(tmp_path / "own.ckpt")
    assert [len(group.params) for group in checkpoint.groups] == [3, 4]
    assert set(checkpoint.client) == {"rng", "hyper"}
    again = torch.load(written(checkpoint, tmp_path / "again.ckpt"), weights_only=True)
    assert set(again) == set(tree)
    assert again["rng"] == (1, [2, None])
    assert again["hyper"] == tree["hyper"]
    assert list(again["state_dict"]) == list(weights)
    assert repr(again["optimizer_states"]) == repr(tree["optimizer_states"])


def test_what_fits_in_several_ways_is_not_guessed(tmp_path: Path) -> None:
    """Two layers of one shape, one of them frozen: either may be the one that was trained."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(net[1].parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = open_checkpoint(save(tmp_path / "a.pt", net, optimizer))
    assert checkpoint.groups == ()
    assert checkpoint.notes == (
        "the optimizer's state under 'optimizer_state_dict' has no names: "
        "parameters of the shape [3, 3], [3] fit in more than one way",
    )
    raw = checkpoint.client["optimizer_state_dict"]
    assert torch.equal(as_torch(raw["state"][0]["exp_avg"]), optimizer.state_dict()["state"][0]["exp_avg"])
    for stripped in (checkpoint, replace(checkpoint, template=None)):
        path = tmp_path / f"{stripped.template is None}.pt"
        again = torch.load(written(stripped, path), weights_only=True)
        assert repr(again["optimizer_state_dict"]) == repr(optimizer.state_dict())


SHAPES = st.sampled_from([(2,), (3,), (2, 3)])


@given(st.lists(SHAPES, max_size=6), st.lists(st.one_of(SHAPES, st.none()), max_size=4))
def test_one_group_is_known_where_one_way_is_possible(
    model: list[tuple[int, ...]], ids: list[tuple[int, ...] | None]
) -> None:
    """Against all ways, counted."""
    ways = [
        places
        for places in itertools.combinations(range(len(model)), len(ids))
        if all(shape in (None, model[at]) for at, shape in zip(places, ids, strict=True))
    ]
    found = by_shape([ids], {str(i): shape for i, shape in enumerate(model)})
    assert found.names == ((tuple(map(str, ways[0])),) if len(ways) == 1 else ())
    assert (found.problem is None) == (len(ways) == 1)


@pytest.mark.parametrize("template", ["kept", "stripped"])
def test_nested_state_is_kept_by_its_parts(template: str, tmp_path: Path) -> None:
    """bitsandbytes keeps its moments in a dict of each parameter's state, other optimizers in lists."""
    weights = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    state = {
        i: {
            "step": torch.tensor(5.0),
            "quant": {"state1": torch.randn_like(w), "state2": torch.randn_like(w), "block": 256},
            "history": [torch.randn_like(w), torch.randn_like(w)],
            "pair": (torch.randn_like(w), {"n": 1}),
            "empty": {},
        }
        for i, w in enumerate(weights.values())
    }
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    torch.save({"model_state_dict": weights, "optimizer_state_dict": optimizer}, tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt")
    (group,) = found.groups
    parts = {"quant.state1", "quant.state2", "history[0]", "history[1]", "pair[0]"}
    assert set(group.state) == parts
    assert set(group.scalars) == {"step", "quant.block", "pair[1].n", "empty"}
    for kind in parts:
        assert [ref.shape for ref in group.state[kind].values()] == [(3, 2), (4,)]
    changed = replace(found, groups=(replace(group, hyper={"lr": 0.2}),))
    path = written(changed if template == "kept" else replace(changed, template=None), tmp_path / "b.pt")
    made = torch.load(path, weights_only=True)["optimizer_state_dict"]
    assert made["param_groups"][0]["lr"] == 0.2
    for i, expected in state.items():
        _same_tree(made["state"][i], expected)


def _same_tree(made: Any, expected: Any) -> None:
    assert type(made) is type(expected)
    match expected:
        case dict():
            assert set(made) == set(expected)
            for key, value in expected.items():
                _same_tree(made[key], value)
        case list() | tuple():
            assert len(made) == len(expected)
            for one, two in zip(made, expected, strict=True):
                _same_tree(one, two)
        case torch.Tensor():
            assert torch.equal(made, expected)
        case _:
            assert made == expected


def test_keys_that_are_no_text_are_named(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {"w": torch.ones(2)}, 7: "seven", "epoch": 3}, tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt")
    assert any("no text ([7])" in note for note in found.notes)
    changed = replace(found, training=replace(found.training, epoch=4))
    made = torch.load(written(changed, tmp_path / "b.pt"), weights_only=True)
    assert made[7] == "seven" and made["epoch"] == 4


# state of single ranks is refused
FLAT = [sample for sample in SAMPLES if variant_of(sample) not in RANK_LOCAL]


@pytest.mark.parametrize("sample", FLAT, ids=name_of)
def test_zero_folders_become_a_file_that_holds_all_of_them(sample: Path, tmp_path: Path) -> None:
    source = open_checkpoint(sample)
    again = open_checkpoint(written(source, tmp_path / "made.pt"))
    for name, ref in source.best_copies().items():
        assert torch.equal(as_torch(again.tensors[name]), as_torch(ref)), name
    expected = {key: value for key, value in held(source).items() if key[1] != "fp32"}
    assert equal(held(again), expected)
    assert [dict(group.params) for group in again.groups] == [dict(group.params) for group in source.groups]
    assert [group.hyper for group in again.groups] == [group.hyper for group in source.groups]
    assert (again.training.step, again.training.epoch) == (
        source.training.step,
        source.training.epoch,
    )


def test_every_parameter_has_a_step_of_its_own(tmp_path: Path) -> None:
    """torch counts in place: a storage that two parameters share would count twice."""
    source = open_checkpoint(FIXTURES / "trainer/z2_bf16_2")
    made = torch.load(written(source, tmp_path / "made.pt"), weights_only=True)
    tensors = [
        value
        for state in made["optimizer_state_dict"]["state"].values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    assert len({value.data_ptr() for value in tensors}) == len(tensors) > 0


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("frozen", [True, False])
def test_means_over_rows_and_columns_are_no_parameters(beta1: Any, frozen: bool, tmp_path: Path) -> None:
    """Of a square matrix both are as long as its bias (transformers' Adafactor)."""
    from transformers.optimization import Adafactor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and name.endswith("bias")))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = Adafactor(named.values(), lr=0.1, relative_step=False, scale_parameter=False, beta1=beta1)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    torch.save(
        {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()},
        tmp_path / "a.pt",
    )
    (group,) = open_checkpoint(tmp_path / "a.pt").groups
    assert list(group.params) == list(named)
    for name, p in named.items():
        for kind in ("exp_avg_sq_row", "exp_avg_sq_col"):
            kept = group.scalars.get(kind, {}).get(name)
            assert (kept is None) == (p.ndim == 1)
            if isinstance(kept, TensorRef):
                assert torch.equal(as_torch(kept), optimizer.state[p][kind])
