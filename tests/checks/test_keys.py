"""Single training files: what they hold for a resume, by the real frameworks' own keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES

from ckpttools.checks import Verdict, verify

LIGHTNING = next((FIXTURES / "lightning/file").iterdir())
PCDET = FIXTURES / "monolithic/pcdet/checkpoint_epoch_4.pth"
FULL = FIXTURES / "monolithic/full/epoch_2_step_40.pt"


def without(source: Path, folder: Path, *keys: str) -> Path:
    state = torch.load(source, weights_only=False)
    for key in keys:
        inner = state
        *above, last = key.split(".")
        for part in above:
            inner = inner[part]
        del inner[last]
    torch.save(state, folder / source.name)
    return folder / source.name


def missing(verdict: Verdict) -> dict[str, str]:
    """The keys that are said to be missing, with the severity; nothing else may be above a note."""
    serious = [f for f in verdict.findings if f.severity != "info"]
    assert {f.id for f in serious} <= {"key-missing"}, serious
    return {f.where: f.severity for f in serious}


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        (LIGHTNING, ("global_step",)),
        (LIGHTNING, ("epoch",)),
        (LIGHTNING, ("lr_schedulers",)),
        (LIGHTNING, ("optimizer_states", "callbacks")),
        (PCDET, ("it",)),
        (PCDET, ("optimizer_state",)),
        (FULL, ("epoch",)),
        (FULL, ("global_step", "optimizer_state_dict")),
    ],
)
def test_what_its_own_framework_always_saves(source: Path, keys: tuple[str, ...], tmp_path: Path) -> None:
    verdict = verify(without(source, tmp_path, *keys))
    assert verdict.ok and missing(verdict) == dict.fromkeys(keys, "warning")


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        (LIGHTNING, ("optimizer_states", "lr_schedulers", "callbacks")),  # save_weights_only
        (LIGHTNING, ("hparams_name",)),
        (FULL, ("scheduler_state_dict", "val_loss")),
        (
            FULL,
            (
                "optimizer_state_dict",
                "epoch",
                "global_step",
                "scheduler_state_dict",
                "train_loss",
                "val_loss",
            ),
        ),
    ],
)
def test_what_may_be_missing(source: Path, keys: tuple[str, ...], tmp_path: Path) -> None:
    state = torch.load(source, weights_only=False)
    assert missing(verify(without(source, tmp_path, *(key for key in keys if key in state)))) == {}


def test_mmengine(tmp_path: Path) -> None:
    """As Runner.save_checkpoint lays it out, with and without an optimizer."""
    state = {
        "meta": {"epoch": 4, "iter": 80, "mmengine_version": "0.10.7"},
        "state_dict": {"w": torch.ones(3)},
        "message_hub": {},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    torch.save(state, tmp_path / "iter_80.pth")
    assert missing(verify(tmp_path / "iter_80.pth")) == {}
    lost = without(tmp_path / "iter_80.pth", tmp_path, "meta.iter", "message_hub")
    assert missing(verify(lost)) == {"meta.iter": "warning", "message_hub": "warning"}
    del state["optimizer"], state["message_hub"]
    torch.save(state, tmp_path / "best_acc_iter_80.pth")
    assert missing(verify(tmp_path / "best_acc_iter_80.pth")) == {}


def said(path: Path) -> str:
    (text,) = [f.text for f in verify(path).findings if f.id == "training-keys"]
    return text


def test_what_is_there_is_said(tmp_path: Path) -> None:
    state = torch.load(FULL, weights_only=False)
    loss = state["val_loss"]
    assert said(FULL).startswith("for a resume it holds epoch 2, step 40, train_loss ")
    assert said(FULL).endswith(f"val_loss {loss}, optimizer, scheduler")
    lost = without(FULL, tmp_path, "val_loss", "scheduler_state_dict")
    assert said(lost).endswith("optimizer; not val_loss, scheduler")
    # weights are asked for nothing
    weights = FIXTURES / "monolithic/bf16/weights.pt"
    assert not [f for f in verify(weights).findings if f.id == "training-keys"]


def test_counters_and_losses_in_both_outputs() -> None:
    state = torch.load(FULL, weights_only=False)
    ran = run("verify", FULL)
    assert f", step 40, epoch 2, train_loss {state['train_loss']:.6g}, val_loss " in ran.out, ran
    (shown,) = json.loads(run("verify", "--json", FULL).out)["checkpoints"]
    wanted = {"step": 40, "epoch": 2, "train_loss": state["train_loss"], "val_loss": state["val_loss"]}
    assert {name: shown[name] for name in wanted} == wanted
    refused = json.loads(run("verify", "--json", FULL, FULL.with_name("gone.pt")).out)["checkpoints"][1]
    assert refused.keys() == shown.keys()
