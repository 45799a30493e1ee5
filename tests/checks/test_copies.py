"""Every copy of the same fact is compared: the weights of hf_model and the Trainer, and all counters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from support import FIXTURES

from ckpttools.checks import verify
from ckpttools.findings import ERROR, INFO, WARNING

BUNDLE = FIXTURES / "bundle/checkpoint-200"
TRAINER = FIXTURES / "hf-trainer/deepspeed/checkpoint-2"
PEFT = FIXTURES / "hf-trainer/peft/checkpoint-2"
LIGHTNING = FIXTURES / "lightning/deepspeed/epoch=0-step=3.ckpt"


def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / source.name))


def flip(path: Path) -> None:
    """The last bit of the last tensor: safetensors have no checksums."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def rewritten(path: Path, **new: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


def said(path: Path) -> list[tuple[str, str, str]]:
    return [(f.severity, f.id, Path(f.file).name) for f in verify(path).findings if f.severity != INFO]


@pytest.mark.parametrize("source", [BUNDLE, TRAINER, PEFT, LIGHTNING], ids=lambda p: p.name)
def test_as_they_were_saved(source: Path) -> None:
    assert said(source) == []


@pytest.mark.parametrize(
    ("source", "file"),
    [
        (BUNDLE, "hf_model/model.safetensors"),
        (TRAINER, "model.safetensors"),
        (PEFT, "adapter_model.safetensors"),
    ],
    ids=lambda p: Path(p).name,
)
def test_one_bit_of_the_copy(source: Path, file: str, tmp_path: Path) -> None:
    path = copied(source, tmp_path)
    flip(path / file)
    assert said(path) == [(ERROR, "copies-differ", Path(file).name)]


def test_a_foreign_model(tmp_path: Path) -> None:
    path = copied(BUNDLE, tmp_path)
    file = path / "hf_model/model.safetensors"
    weights = load_file(file)
    save_file({f"other.{name}": tensor + 1 for name, tensor in weights.items()}, file)
    assert (ERROR, "copies-differ", "model.safetensors") in said(path)
    save_file({f"x{n}": tensor for n, tensor in enumerate(weights.values())}, file)
    assert (ERROR, "copies-differ", "model.safetensors") in said(path)
    save_file(
        {
            name: torch.ones(3, 5, dtype=t.dtype)
            for name, t in load_file(BUNDLE / "hf_model/model.safetensors").items()
        },
        file,
    )
    assert (ERROR, "copies-differ", "model.safetensors") in said(path)


def test_a_model_that_is_saved_under_other_names(tmp_path: Path) -> None:
    """transformers saves some models under the names of an older class: another prefix, the same ends."""
    path = copied(BUNDLE, tmp_path)
    file = path / "hf_model/model.safetensors"
    weights = load_file(file)
    save_file({name.replace("model.", "language_model."): w for name, w in weights.items()}, file)
    assert said(path) == [] and notes(path) == []
    flip(file)
    assert said(path) == [(ERROR, "copies-differ", "model.safetensors")]
    name = next(iter(weights))
    save_file({f"fused.{n}" if n == name else n: tensor for n, tensor in weights.items()}, file)
    assert said(path) == []
    weights.pop(name)
    save_file({**weights, "fused": torch.ones(2)}, file)
    assert said(path) == [] and "1 of " in notes(path)[0]
    save_file(weights, file)
    assert said(path) == [(WARNING, "tensor-missing", "hf_model")]


def notes(path: Path) -> list[str]:
    return [f.message for f in verify(path).findings if f.id == "copies-not-compared"]


def test_weights_in_fp32_are_compared_rounded(tmp_path: Path) -> None:
    """As they are saved from the 16-bit weights or from the masters: both round to module's."""
    path = copied(BUNDLE, tmp_path)
    file = path / "hf_model/model.safetensors"
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    save_file(weights, file)
    assert said(path) == []
    masters = {name: tensor * (1 + 2**-12) for name, tensor in weights.items()}  # below half a bf16 step
    save_file(masters, file)
    assert said(path) == []
    assert run("verify", path, "--quick").code == 0
    weights["model.norm.weight"][3] += 0.1
    save_file(weights, file)
    (found,) = [f for f in verify(path).findings if f.severity == ERROR]
    assert (found.id, Path(found.file).name, found.where) == ("copies-differ", file.name, "model.norm.weight")
    assert found.message.startswith("1 of ")
    halves = {name: tensor.half() for name, tensor in masters.items()}  # neither holds the other's
    save_file(halves, file)
    assert said(path) == [] and notes(path) == []
    name = "model.norm.weight"
    halves[name][3] *= 1 + 2**-7  # a step of bf16: half of it can be by rounding
    save_file(halves, file)
    assert said(path) == [(ERROR, "copies-differ", file.name)]
    save_file({name: tensor.double() for name, tensor in masters.items()}, file)
    assert said(path) == [] and "another type" in notes(path)[0]


def test_a_torn_training_info(tmp_path: Path) -> None:
    path = copied(BUNDLE, tmp_path)
    info = path / "training_info.json"
    info.write_text(info.read_text()[:40])
    ((severity, _, name),) = said(path)
    assert (severity, name) == (ERROR, "training_info.json")


def test_the_reason_to_pass_one_over_names_the_file(tmp_path: Path) -> None:
    path = copied(BUNDLE, tmp_path)
    shutil.copytree(BUNDLE, tmp_path / "checkpoint-100")
    rewritten(path / "training_info.json", global_step=250)
    assert "checkpoint-200: training_info.json global_step: is 250" in (
        run("latest", "--verified", tmp_path).err
    )


def test_a_foreign_training_info(tmp_path: Path) -> None:
    path = copied(BUNDLE, tmp_path)
    rewritten(path / "training_info.json", global_step=150, epoch=1)
    found = said(path)
    assert (ERROR, "counter-mismatch", "training_info.json") in found
    assert (WARNING, "counter-mismatch", "training_info.json") in found


def test_a_bundle_without_its_state(tmp_path: Path) -> None:
    path = copied(BUNDLE, tmp_path)
    shutil.rmtree(path / "deepspeed")
    assert said(path) == [(ERROR, "bundle-incomplete", "checkpoint-200")]
    for folder in (path, tmp_path):  # by itself and as the run's only one, then beside a good one
        assert run("verify", folder).code == 1
    shutil.copytree(BUNDLE, tmp_path / "checkpoint-100")
    ran = run("verify", tmp_path)
    assert ran.code == 1 and "1 of 2 checkpoints are good" in ran.out


def test_the_trainers_counter_and_deepspeeds(tmp_path: Path) -> None:
    path = Path(shutil.copytree(TRAINER, tmp_path / "renamed"))
    rewritten(path / "trainer_state.json", global_step=7)
    assert said(path) == [(WARNING, "counter-mismatch", "trainer_state.json")]


def test_lightnings_counter_and_deepspeeds(tmp_path: Path) -> None:
    path = copied(LIGHTNING, tmp_path)
    file = path / "checkpoint/mp_rank_00_model_states.pt"
    root = torch.load(file, weights_only=False)
    root["global_step"] += 4
    torch.save(root, file)
    assert (WARNING, "counter-mismatch", file.name) in said(path)
