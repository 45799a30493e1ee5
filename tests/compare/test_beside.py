"""Optimizers in files of their own: compared by number with each other, never by guess with names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES

import ckpttools

HF = FIXTURES / "hf-trainer" / "plain" / "checkpoint-4"
ACCELERATE = FIXTURES / "accelerate" / "plain"
NAMED = FIXTURES / "hf-trainer" / "deepspeed" / "checkpoint-4"


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """One element of one moment, and nothing else."""
    shutil.copytree(HF, tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-4" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    saved["state"][5]["exp_avg_sq"].view(-1)[3] += 1
    torch.save(saved, file)
    return tmp_path / "checkpoint-4"


def test_moments_are_part_of_the_proof(changed: Path) -> None:
    same = ckpttools.prove(HF, HF)
    assert same.verdict == "same" and {"exp_avg", "exp_avg_sq", "step"} <= same.compared.equal.keys()
    proof = ckpttools.prove(HF, changed)
    assert proof.verdict == "different"
    assert [(d.kind, d.name) for d in proof.compared.different] == [("exp_avg_sq", "optimizer.pt[5]")]


def test_moments_are_part_of_the_difference(changed: Path) -> None:
    (one,) = ckpttools.diff(HF, changed).tensors
    assert (one.kind, one.name, one.what) == ("exp_avg_sq", "optimizer.pt[5]", "changed")
    assert one.apart is not None and one.apart.equal == one.apart.numel - 1


def test_hyper_parameters_are_compared(tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-4" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    saved["param_groups"][1]["eps"] = 0.5
    torch.save(saved, file)
    proof = ckpttools.prove(HF, tmp_path / "checkpoint-4")
    assert proof.verdict == "except"
    assert [(f.part, f.name, f.right) for f in proof.facts] == [("hyper-parameters", "group 1: eps", 0.5)]


def test_a_flipped_byte_of_the_optimizers_file_is_found(tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-4" / "optimizer.pt"
    data = bytearray(file.read_bytes())
    at = data.index(torch.load(file, weights_only=True)["state"][0]["exp_avg"].numpy().tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    for command in ("prove", "diff"):
        ran = run(command, HF, tmp_path / "checkpoint-4")
        assert ran.code == 1 and "error[checksum]" in ran.err


def test_with_a_checkpoint_that_has_names_the_file_is_named_as_not_compared() -> None:
    ran = run("prove", HF, NAMED, "--json")
    assert json.loads(ran.out)["not_compared"] == ["optimizer.pt (its parameters have no names)"]
    ran = run("diff", HF, NAMED, "--json")
    assert json.loads(ran.out)["not_compared"] == ["optimizer.pt (its parameters have no names)"]
    assert "note: not compared: optimizer.pt" in run("diff", HF, NAMED).out


def test_weights_alone_have_none(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(HF / name, tmp_path / "weights")
    ran = run("prove", tmp_path / "weights", tmp_path / "weights")
    assert ran.code == 1 and "optimizer state (found in neither)" in ran.out
    assert "optimizer state (not compared)" in run("prove", HF, tmp_path / "weights").out


def test_a_format_whose_weights_alone_are_read_is_not_called_equal() -> None:
    folder = FIXTURES / "verl/actor_ws2"  # optim_world_size_2_rank_*.pt may hold anything
    ran = run("diff", folder, folder)
    assert ran.code == 1 and ran.out.endswith("no difference in what was compared\n"), ran.out
    ran = run("prove", folder, folder)
    assert ran.code == 1 and "optimizer state (not compared)" in ran.out and "in neither" not in ran.out
    assert run("diff", folder, folder, "--only", "weight/*").code == 0


def test_accelerates_file() -> None:
    proof = ckpttools.prove(ACCELERATE, ACCELERATE)
    assert "exp_avg" in proof.compared.equal and not proof.unread
