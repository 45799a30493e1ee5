"""What `ckpt inspect` says first: how far training is, for every container."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Ckpt
from support import FIXTURES

# the lines before the table, as printed
FIRST: dict[str, list[str]] = {
    "mmengine-deepspeed/iter_50.pth": [
        "iteration 50 of 52, lr 0.000647487 (1 group), batch 8 = 2 x 2 ranks x 2, train/loss 0.000420222",
        "schedule LinearLR 0-13, CosineAnnealingLR 13-52, at 50",
    ],
    "hf-trainer/plain/checkpoint-2": [
        "step 2 of 4 (epoch 0.25), lr 0.005 (2 groups), batch 2 = 2 x 1 rank x 1, loss 3.71094",
        "schedule transformers linear 0-4, at 2",
    ],
    "trainer/z2_bf16_2": [
        "step 3 of 23 (epoch 0.13 of 1), lr 0.00298492 (2 groups), batch 8 = 2 x 2 ranks x 2, "
        "train loss 5.5569",
        "schedule WarmupCosineLR 0-23, at 3",
    ],
    "bundle/checkpoint-200": [
        "step 3 (epoch 2), lr 0.01 (1 group), batch 8 = 2 x 2 ranks x 2, train loss 1.5"
    ],
    "monolithic/full/epoch_2_step_40.pt": [
        "step 40 (epoch 2), lr 0.00793893 (1 group), train loss 1.25, val loss 1.5",
        "schedule CosineAnnealingLR 0-10, at 3",
    ],
    "monolithic/pcdet/checkpoint_epoch_4.pth": ["iteration 80 (epoch 4), lr 0.003 (1 group)"],
    "deepspeed-0.19.8/z2_groups_ws2": [
        "step 3 (epoch 1), lr 0.02 and 0.005 (3 groups), batch 120 = 60 x 2 ranks x 1"
    ],
}


@pytest.mark.parametrize(("name", "lines"), FIRST.items(), ids=FIRST)
def test_progress_comes_first(name: str, lines: list[str], ckpt: Ckpt) -> None:
    out = ckpt("inspect", FIXTURES / name).out.splitlines()
    assert out[1 : out.index("")] == lines


def test_an_epoch_by_its_length(tmp_path: Path, ckpt: Ckpt) -> None:
    """An epoch-based MMEngine run: 52 iterations in 4 epochs are 13 each."""
    hub = {"runtime_info": {"iter": 49, "epoch": 3, "max_epochs": 4, "max_iters": 52}}
    tree = {"meta": {"epoch": 3, "iter": 50, "cfg": ""}, "message_hub": hub, "state_dict": {}}
    torch.save(tree | {"state_dict": {"w": torch.zeros(2)}}, tmp_path / "iter_50.pth")
    assert "iteration 50 of 52 (epoch 3.85 of 4)" in ckpt("inspect", tmp_path / "iter_50.pth").out


def test_weights_say_what_their_metadata_does(tmp_path: Path, ckpt: Ckpt) -> None:
    out = tmp_path / "weights.safetensors"
    ckpt("extract", FIXTURES / "monolithic/full/epoch_2_step_40.pt", out, "--weights-only", "-q")
    assert "step 40 (epoch 2), train loss 1.25, val loss 1.5" in ckpt("inspect", out).out


def test_the_same_as_values(ckpt: Ckpt) -> None:
    found = json.loads(ckpt("inspect", FIXTURES / "mmengine-deepspeed/iter_50.pth", "--json").out)
    progress = found["progress"]
    assert (progress["count"], progress["total"], progress["epoch"]) == (50, 52, None)
    batch = progress["batch"]
    assert (batch["total"], batch["micro"], batch["gpus"], batch["accumulation"]) == (8, 2, 2, 2)
    assert batch["from"]["accumulation"] == "strategy.gradient_accumulation_steps"
    plain = json.loads(ckpt("inspect", FIXTURES / "monolithic/full/epoch_2_step_40.pt", "--json").out)
    assert plain["progress"]["batch"]["gpus"] is None


def test_a_training_state_that_is_damaged_is_a_note(tmp_path: Path, ckpt: Ckpt) -> None:
    tree = torch.load(FIXTURES / "monolithic/full/epoch_2_step_40.pt", weights_only=False)
    tree["global_step"] = -7
    torch.save(tree, tmp_path / "a.pt")
    ran = ckpt("inspect", tmp_path / "a.pt")
    assert ran.code == 0 and "global_step is -7" in ran.out


def test_quiet_says_nothing_but_what_is_dangerous(ckpt: Ckpt, tmp_path: Path) -> None:
    source = FIXTURES / "hf-trainer/plain/checkpoint-4"
    ran = ckpt("inspect", source, "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    (tmp_path / "a.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    ran = ckpt("inspect", tmp_path / "a.pt", "-q")
    assert ran.code == 1 and "system" in ran.out + ran.err


def test_buffers_are_no_parameters(tmp_path: Path, ckpt: Ckpt) -> None:
    """Also where no optimizer says what is trained."""
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.BatchNorm1d(3))
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "model.pth")
    own = sum(p.numel() for p in model.parameters())
    found = json.loads(ckpt("inspect", tmp_path / "model.pth", "--json").out)
    assert found["parameters"] == own and len(found["buffers"]) == 3
    assert f"{own} in 4 tensors, 3 buffers" in ckpt("inspect", tmp_path / "model.pth").out


def test_packed_weights_are_not_counted_as_parameters(ckpt: Ckpt, tmp_path: Path) -> None:
    """bitsandbytes, GPTQ, AWQ: two or more weights lie in an element of a quantised model's integers."""
    packed = {"a.weight": torch.zeros(8, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(4)}
    torch.save({**packed, "norm.weight": torch.ones(4)}, tmp_path / "model.pt")
    shown = ckpt("inspect", tmp_path / "model.pt").out
    assert "parameters  ? in 3 tensors, 1 of whole numbers (packed weights, or buffers)" in shown
    assert json.loads(ckpt("inspect", tmp_path / "model.pt", "--json").out)["parameters"] is None


def test_numbers_that_are_tensors_are_shown_as_numbers(ckpt: Ckpt, tmp_path: Path) -> None:
    """A capturable optimizer's learning rate, torch's tutorial's `loss`, counters of some teams."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.5))
    optimizer.step()
    saved = {"step": torch.tensor(7), "epoch": torch.tensor(2), "loss": torch.tensor(0.25)}
    path = tmp_path / "a.pt"
    torch.save({"model": {"w": weight.detach()}, "optimizer": optimizer.state_dict(), **saved}, path)
    shown = ckpt("inspect", path)
    assert "step 7 (epoch 2), lr 0.5 (1 group), train loss 0.25" in shown.out
    assert "lr 0.5, betas" in shown.out
    found = json.loads(ckpt("inspect", path, "--json").out)
    assert (found["step"], found["epoch"], found["train_loss"]) == (7, 2, 0.25)
    assert found["groups"][0]["settings"]["lr"] == 0.5
    assert "step 7, train_loss 0.25, optimizer" in ckpt("verify", path).out


def test_nanogpts_name_of_the_step(ckpt: Ckpt, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"model": {"_orig_mod.w": torch.ones(2)}, "iter_num": 7}, path)
    assert "step 7" in ckpt("inspect", path).out
