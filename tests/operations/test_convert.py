"""ckpt convert: every pair of formats that it writes, there and back, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES, as_torch

from ckpttools.checkpoint import Checkpoint
from ckpttools.checks import verify
from ckpttools.errors import UsageError
from ckpttools.formats import locate, open_checkpoint, read
from ckpttools.operations.convert import convert
from ckpttools.tensors import TensorRef

PT = FIXTURES / "monolithic/full/epoch_2_step_40.pt"
ZERO = FIXTURES / "trainer/z2_bf16_2"
FROZEN = FIXTURES / "trainer/z2_frozen_tied_2"
GROUPS = FIXTURES / "deepspeed-0.19.8/z2_groups_ws2"
SOURCES = [PT, ZERO, FROZEN, GROUPS]
WAYS = [
    ("pt",),
    ("zero2",),
    ("zero3",),
    ("zero1", "pt"),
    ("pt", "zero2"),
    ("zero3", "pt", "zero2"),
    ("dcp", "pt"),
]
SETTINGS = {"foreach", "fused", "maximize", "capturable", "differentiable", "amsgrad", "bias_correction"}


def opened(path: Path) -> Checkpoint:
    return read(locate(path))


def content(checkpoint: Checkpoint) -> dict[Any, Any]:
    """Everything that each format can hold: tensors as bytes with dtype and shape, values with their type."""
    shared = checkpoint.shared
    out: dict[Any, Any] = {name: seen(ref) for name, ref in checkpoint.best_copies().items()}
    for g, group in enumerate(checkpoint.groups):
        out[g] = list(group.params.items())
        out |= {(g, key): value for key, value in group.hyper.items()}
        for kinds in (group.state, group.scalars):
            for kind, values in kinds.items():
                if kind != "fp32":
                    out |= {(name, kind): seen(value) for name, value in values.items()}
    state = checkpoint.training
    out["state"] = (state.step, state.epoch, state.train_loss, state.val_loss)
    out["scheduler"] = state.scheduler
    out["names"] = (checkpoint.frozen - shared.keys(), dict(shared))
    return out


def seen(value: Any) -> Any:
    if isinstance(value, TensorRef):
        return (value.dtype.name, value.shape, as_torch(value).reshape(-1).view(torch.uint8).tolist())
    return value


def differences(a: dict[Any, Any], b: dict[Any, Any]) -> list[Any]:
    return [key for key in {**a, **b} if a.get(key, "-") != b.get(key, "-")]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_there_and_back(source: Path, way: tuple[str, ...], tmp_path: Path) -> None:
    """Weights, moments, steps, settings, schedule and counters are the same, bit by bit."""
    at = source
    for i, to in enumerate(way):
        ranks = 3 if to.startswith("zero") else None
        name = f"{i}.pt" if to == "pt" else str(i)
        at = convert(at, tmp_path / name, to=to, world_size=ranks).destination  # type: ignore[arg-type]
        assert [f.id for f in verify(at).findings if f.severity == "error"] == []
    before, after = content(opened(source)), content(opened(at))
    if "dcp" in way:  # which has no place for what is frozen
        before["names"] = after["names"] = None
    # a class's defaults are added; nothing else is
    assert {key[1] for key in differences(before, after)} <= SETTINGS | {"decoupled_weight_decay"}


def test_a_single_file_loads_in_torch_with_all_settings(tmp_path: Path) -> None:
    made = convert(ZERO, tmp_path / "a.pt", to="pt", optimizer_class="AdamW")
    tree = torch.load(made.destination, weights_only=True)
    (group, *_) = tree["optimizer_state_dict"]["param_groups"]
    expected = torch.optim.AdamW([torch.ones(1)]).state_dict()["param_groups"][0]
    assert expected.keys() <= group.keys()
    assert all(type(group[key]) is type(value) for key, value in expected.items() if key != "lr")
    assert group["betas"] == opened(ZERO).groups[0].hyper["betas"]
    for state in tree["optimizer_state_dict"]["state"].values():
        assert state["step"].dtype is torch.float32
        assert state["step"].shape == ()
    assert any("not kept: the run's settings" in note for note in made.notes)


def test_steps_become_what_the_class_counts_in(tmp_path: Path) -> None:
    at = convert(PT, tmp_path / "z", to="zero2", optimizer_class="FusedAdam").destination
    steps = {step for group in opened(at).groups for step in group.scalars["step"].values()}
    assert steps == {3}
    assert {type(step) for step in steps} == {int}
    back = convert(at, tmp_path / "b.pt", to="pt", optimizer_class="AdamW").destination
    (first, *_) = torch.load(back, weights_only=True)["optimizer_state_dict"]["state"].values()
    assert torch.equal(first["step"], torch.tensor(3.0))


def test_a_zero_folder_in_another_dtype_keeps_its_masters(tmp_path: Path) -> None:
    at = convert(PT, tmp_path / "z", to="zero2", world_size=2, dtype="bf16").destination
    assert (at / "latest").read_text() == "global_step40"
    checkpoint, source = opened(at), opened(PT)
    assert checkpoint.layout.dtype == "bf16"
    for name, ref in checkpoint.master.items():
        assert torch.equal(as_torch(ref), as_torch(source.tensors[name]))
        assert torch.equal(as_torch(checkpoint.tensors[name]), as_torch(source.tensors[name]).bfloat16())


def test_clipping_is_what_the_settings_say_or_the_engines_own(tmp_path: Path) -> None:
    """DeepSpeed clips at 1.0 by default, and takes what a file says over its configuration."""
    stated = opened(GROUPS).settings["gradient_clipping"]
    for source, expected in ((GROUPS, stated), (PT, None)):
        at = convert(source, tmp_path / source.name, to="zero1").destination
        (path, *_) = at.glob("*/*zero_pp_rank_0*")
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        assert state.get("clip_grad") == expected


def test_names_change_in_weights_and_optimizer(tmp_path: Path) -> None:
    at = convert(PT, tmp_path / "a.pt", to="pt", rename=[(r"^emb\.", "wte.")], exclude=["head.*"]).destination
    checkpoint = opened(at)
    assert "wte.weight" in checkpoint.tensors
    assert not {"emb.weight", "head.weight"} & checkpoint.tensors.keys()
    (group,) = checkpoint.groups
    assert next(iter(group.params)) == "wte.weight"
    assert torch.equal(
        as_torch(group.state["exp_avg"]["wte.weight"]),
        as_torch(opened(PT).groups[0].state["exp_avg"]["emb.weight"]),
    )


def test_the_optimizer_starts_anew(tmp_path: Path) -> None:
    made = convert(ZERO, tmp_path / "a.pt", to="pt", reset_optimizer=True)
    saved = torch.load(made.destination, weights_only=True)["optimizer_state_dict"]
    assert saved["state"] == {}
    assert saved["param_groups"][0]["lr"] == opened(ZERO).groups[0].hyper["lr"]
    assert any("start anew" in note for note in made.notes)


@pytest.mark.parametrize(
    ("options", "id"),
    [
        ({"to": "zero4"}, "bad-usage"),
        ({"to": "pt", "world_size": 2}, "bad-usage"),
        ({"to": "zero2", "world_size": 0}, "bad-usage"),
        ({"to": "pt", "dtype": "int7"}, "bad-usage"),
        ({"to": "pt", "dcp_layout": "flat"}, "bad-usage"),
        ({"to": "pt", "rename": [("(", "x")]}, "bad-usage"),
        ({"to": "pt", "rename": [("a{99999999999}", "x")]}, "bad-usage"),
        ({"to": "pt", "rename": [("(" * 3000 + ")" * 3000, "x")]}, "bad-usage"),
        ({"to": "pt", "rename": [("nothing", "x")]}, "bad-usage"),
        ({"to": "pt", "rename": [(".*", "x")]}, "names-collide"),
        ({"to": "pt", "include": ["nothing"]}, "nothing-selected"),
        ({"to": "pt", "optimizer_class": "AdamX"}, "bad-usage"),
    ],
)
def test_refused_before_anything_is_written(options: Any, id: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        convert(PT, tmp_path / "out", **options)
    assert caught.value.id == id
    assert not (tmp_path / "out").exists()


def test_weights_alone_make_no_zero_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        convert(FIXTURES / "monolithic/bare/model.pth", tmp_path / "out", to="zero2")
    assert caught.value.id == "no-groups"


@pytest.mark.parametrize("to", ["pt", "dcp", "zero2"])
def test_state_of_single_ranks_is_refused(to: str, tmp_path: Path) -> None:
    """8-bit blocks and their scales belong to one rank: no format may get rank 0's for all."""
    source = FIXTURES / "deepspeed-0.19.8/z2_bnb_adamw8_ws2"
    done = run("convert", source, tmp_path / "out", "--to", to)
    assert done.code == 2 and "rank-local-state" in done.err
    assert list(tmp_path.iterdir()) == []
    if to != "zero2":  # a ZeRO folder after a step without state is what verify calls lost state
        assert run("convert", source, tmp_path / "out", "--to", to, "--reset-optimizer").code == 0


def test_a_zero_folder_says_only_what_is_known(tmp_path: Path) -> None:
    """DeepSpeed takes clip_grad from the file over its configuration, and needs skipped_steps."""
    convert(ZERO, tmp_path / "one.pt", to="pt")  # without the run's settings
    convert(tmp_path / "one.pt", tmp_path / "back", to="zero2", world_size=2)
    convert(ZERO, tmp_path / "straight", to="zero1", world_size=1)
    (back,) = (tmp_path / "back").rglob("*pp_rank_0*optim_states.pt")
    (straight,) = (tmp_path / "straight").rglob("*pp_rank_0*optim_states.pt")
    load = {"weights_only": False}
    assert "clip_grad" not in torch.load(back, **load)["optimizer_state_dict"]
    assert torch.load(straight, **load)["optimizer_state_dict"]["clip_grad"] == 1.0
    engine = torch.load(back.parent / "mp_rank_00_model_states.pt", **load)
    assert engine["skipped_steps"] == 0
    assert list(engine["lr_scheduler"]) == ["last_batch_iteration"]
    assert "scheduler_state_dict" not in engine


@pytest.mark.parametrize("to", ["pt", "dcp"])
def test_a_count_of_the_training_code_that_gives_way_is_said(to: Any, tmp_path: Path) -> None:
    made = convert(FIXTURES / "bundle/checkpoint-200", tmp_path / "out", to=to, digest=False)
    assert any("global_step (200) gives way to the updates that were made (3)" in n for n in made.plan.notes)
    assert open_checkpoint(made.destination).training.step == 3


def test_updates_and_iterations_stay_apart(tmp_path: Path) -> None:
    """Accumulation: MMEngine counts 1500 iterations where the engine made 3 updates."""
    source = FIXTURES / "mmengine/run/iter_1500.pth"
    for to in ("dcp", "pt"):
        made = convert(source, tmp_path / to, to=to, digest=False)  # type: ignore[arg-type]
        state = open_checkpoint(made.destination).training
        assert (state.step, state.iteration) == (3, 1500), to


@pytest.mark.parametrize("to", ["zero2", "universal"])
def test_the_order_of_flat_groups_is_said_where_it_is_another(to: Any, tmp_path: Path) -> None:
    """An engine that keeps the source's setting would load every weight as another one, without an error."""
    made = convert(FIXTURES / "deepspeed-0.19.8/z2_round_robin_ws2", tmp_path / "out", to=to)
    section = opened(made.destination).settings["zero_optimization"]
    assert isinstance(section, dict) and section["round_robin_gradients"] is False
    lines = [line for line in made.next if "round_robin_gradients" in line]
    config: dict[str, Any] = {"zero_optimization": {"round_robin_gradients": True}}
    exec(lines[0], {"ds_config": config})
    assert config == {"zero_optimization": {"round_robin_gradients": False}}


@pytest.mark.parametrize("to", ["zero0", "zero1", "zero2", "zero3", "universal"])
@pytest.mark.parametrize(("optimizer", "step"), [(torch.optim.AdamW, 3), (torch.optim.SGD, 0)])
def test_without_counters_the_optimizers_are_taken(
    to: Any, optimizer: Any, step: int, tmp_path: Path
) -> None:
    """Model and optimizer alone, as torch's tutorials save them: the engine loads nothing without a count."""
    net = torch.nn.Linear(3, 4)
    own = optimizer(net.parameters(), lr=0.1)
    for _ in range(3):
        net(torch.ones(1, 3)).sum().backward()
        own.step()
    torch.save({"model": net.state_dict(), "optimizer": own.state_dict()}, tmp_path / "run.pt")
    made = convert(tmp_path / "run.pt", tmp_path / "out", to=to)
    assert any(note.startswith("global_steps is") for note in made.notes)
    (first, *_) = sorted(made.destination.glob("*/*_model_states.pt"))
    assert torch.load(first, weights_only=False)["global_steps"] == step
    assert [f for f in verify(made.destination).findings if f.severity == "warning"] == []
    assert not any("master weights are made" in note for note in made.notes)


def test_masters_of_16_bits_are_said(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 4).bfloat16()
    own = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.save({"model": net.state_dict(), "optimizer": own.state_dict(), "step": 0}, tmp_path / "run.pt")
    made = convert(tmp_path / "run.pt", tmp_path / "out", to="zero2")
    assert any(note.startswith("master weights are made from those of bf16") for note in made.notes)
