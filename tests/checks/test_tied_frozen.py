"""Tied weights that are frozen: exclude_frozen_parameters leaves the owner out, and its alias carries it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file
from support import FIXTURES, identical

from ckpttools.checks import verify
from ckpttools.findings import INFO
from ckpttools.formats import open_checkpoint

NEWEST = FIXTURES / "deepspeed-0.19.8"
PEFT = FIXTURES / "hf-trainer/peft/checkpoint-2"
EXCLUDED = [
    NEWEST / "z2_tied_frozen_exclude_ws2",
    NEWEST / "z1_tied_frozen_exclude_ws2",
    NEWEST / "z2_tied_lora_exclude_ws2",
    PEFT,
]


def model_file(folder: Path) -> Path:
    return next(folder.rglob("mp_rank_00_model_states.pt"))


@pytest.mark.parametrize("path", [*EXCLUDED, NEWEST / "z2_tied_frozen_ws2"], ids=lambda p: p.name)
def test_nothing_is_wrong_with_it(path: Path) -> None:
    assert [f for f in verify(path).findings if f.severity != INFO] == []


@pytest.mark.parametrize("path", EXCLUDED, ids=lambda p: p.name)
def test_the_alias_is_a_weight_of_its_own(path: Path, tmp_path: Path) -> None:
    alias, owner = next(iter(torch.load(model_file(path), weights_only=False)["shared_params"].items()))
    (finding,) = [f for f in verify(path).findings if f.id == "frozen-excluded"]
    assert finding.where == alias and owner in finding.message
    done = run("extract", path, tmp_path / "out", "--weights-only", "--source", "model")
    assert done.code == 0, done.err
    module = torch.load(model_file(path), weights_only=False)["module"]
    (weights,) = (load_file(file) for file in (tmp_path / "out").glob("*.safetensors"))
    assert weights.keys() == module.keys() and owner not in weights
    assert all(identical(weights[name], module[name]) for name in module)


@pytest.mark.parametrize("path", EXCLUDED, ids=lambda p: p.name)
def test_every_command_takes_it(path: Path, tmp_path: Path) -> None:
    assert run("reshard", path, tmp_path / "out", "--world-size", 3).code == 0
    assert run("verify", tmp_path / "out").code == 0
    before, after = (
        torch.load(model_file(folder), weights_only=False) for folder in (path, tmp_path / "out")
    )
    assert before["shared_params"] == after["shared_params"]
    assert run("resume-check", path).code == 0
    shutil.copytree(path, tmp_path / "run/checkpoint-2")
    done = run("latest", "--verified", tmp_path / "run")
    assert done.code == 0 and done.out.strip() == str(tmp_path / "run/checkpoint-2")


def test_an_owner_that_never_was_is_still_found(tmp_path: Path) -> None:
    """Where frozen parameters are listed, or the alias shares its bytes with another name."""
    for number, name in enumerate(("z2_tied_frozen_ws2", "z2_tied_ws2")):
        copy = tmp_path / str(number)
        shutil.copytree(NEWEST / name, copy)
        root = torch.load(model_file(copy), weights_only=False)
        root["shared_params"]["head.weight"] = "no.such.weight"
        if number:
            root["frozen_param_shapes"] = None
        torch.save(root, model_file(copy))
        found = [f for f in verify(copy).findings if f.id == "tied-mismatch"]
        assert [f.where for f in found] == ["head.weight"]


@pytest.mark.heavy
@pytest.mark.distributed
def test_the_trainer_resumes_what_was_resharded(tmp_path: Path) -> None:
    """The same master weights, and the step after the last: as they were saved on two ranks, now on three."""
    oracle = Path(__file__).parent.parent / "oracles/trainer_peft.py"
    found = {}
    (tmp_path / "three").mkdir()
    assert run("reshard", PEFT, tmp_path / "three/checkpoint-2", "--world-size", 3).code == 0
    for ranks, checkpoint in ((2, PEFT), (3, tmp_path / "three/checkpoint-2")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        ours = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ours["HF_HUB_OFFLINE"] = "1"
        done = subprocess.run(
            [*command, str(oracle), str(checkpoint), str(tmp_path / f"{ranks}.json")],
            env={**os.environ, **ours},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found[ranks] = json.loads((tmp_path / f"{ranks}.json").read_text())
    assert found[2] == found[3] and found[3]["step"] == 2 and found[3]["end"] == 4


def test_what_was_frozen_after_the_engine_was_built_is_not_lost(tmp_path: Path) -> None:
    """The optimizer still holds it, module does not. DeepSpeed's strict load fails, and with
    load_module_strict=False it restores the weight from the master, as does extract.
    """
    folder = shutil.copytree(NEWEST / "z2_exclude_frozen_ws2", tmp_path / "run")
    (path,) = folder.glob("*/mp_rank_00_model_states.pt")
    root = torch.load(path, weights_only=False)
    name = next(iter(root["param_shapes"][0]))
    del root["module"][name]
    torch.save(root, path)
    (warning,) = [f for f in verify(folder).findings if f.severity == "warning"]
    assert (warning.id, warning.where) == ("frozen-excluded", name)
    assert run("resume-check", folder).code == 0 and run("resume-check", folder, "--no-strict").code == 0
    ran = run("extract", folder, tmp_path / "w.pt", "--weights-only")
    assert ran.code == 0, ran.err
    assert name in torch.load(tmp_path / "w.pt", weights_only=True)["model_state_dict"]
    assert run("verify", tmp_path / "w.pt").code == 0
    for to in ("zero0", "zero1", "zero3"):
        assert run("convert", folder, tmp_path / to, "--to", to).code == 0
        made = open_checkpoint(tmp_path / to)
        assert name in made.tensors and name in made.groups[0].params
    # under another name it is no frozen parameter: something was renamed
    root["module"]["another"] = torch.zeros(3)
    torch.save(root, path)
    assert run("verify", folder).code == 1
