"""verl's folders: the parts of the ranks are the whole weights; what is missing or damaged is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file
from support import FIXTURES, as_torch, identical

from ckpttools.checks import verify
from ckpttools.formats import open_checkpoint

ACTOR, REPLICAS = FIXTURES / "verl/actor_ws2", FIXTURES / "verl/actor_ws4"
TRUTH = torch.load(FIXTURES / "verl/truth.pt", weights_only=True)


def test_the_parts_make_the_weights(tmp_path: Path) -> None:
    found = open_checkpoint(ACTOR)
    assert list(found.tensors) == list(TRUTH) and found.layout.dp_degree == 2
    assert all(identical(as_torch(found.tensors[name]), TRUTH[name]) for name in TRUTH)
    assert verify(ACTOR).ok and run("inspect", ACTOR).code == 0
    assert run("extract", ACTOR, tmp_path / "w.safetensors").code == 0
    made = load_file(tmp_path / "w.safetensors")
    assert made.keys() == TRUTH.keys() and all(torch.equal(made[name], TRUTH[name]) for name in TRUTH)


def test_ranks_that_hold_the_same_are_compared(tmp_path: Path) -> None:
    """HSDP: the weights lie on the first two ranks, and again on the others."""
    found = open_checkpoint(REPLICAS)
    assert found.layout.dp_degree == 4
    truth = torch.load(FIXTURES / "verl/truth_ws4.pt", weights_only=True)
    assert all(identical(as_torch(found.tensors[name]), truth[name]) for name in truth)
    assert verify(REPLICAS).ok
    folder = shutil.copytree(REPLICAS, tmp_path / "actor")
    file = folder / "model_world_size_4_rank_3.pt"
    saved = torch.load(file, weights_only=False)
    saved["0.weight"]._local_tensor.add_(1)
    torch.save(saved, file)
    assert "copies-differ" in {f.id for f in verify(folder).findings if f.severity == "error"}


def test_of_what_several_ranks_have_the_first_is_said_to_be_taken(tmp_path: Path) -> None:
    said = "several ranks have are taken from the first"
    assert said in run("extract", REPLICAS, tmp_path / "a.safetensors").err
    assert said in run("convert", REPLICAS, tmp_path / "b", "--to", "hf").err
    assert said not in run("extract", ACTOR, tmp_path / "c.safetensors").err


@pytest.mark.parametrize("kind, value", [("exp_avg", float("nan")), ("exp_avg_sq", -1.0)])
def test_values_of_the_optimizer_are_judged(kind: str, value: float, tmp_path: Path) -> None:
    """Its state is not joined, and is what training goes on with."""
    folder = shutil.copytree(ACTOR, tmp_path / "actor")
    file = folder / "optim_world_size_2_rank_1.pt"
    saved = torch.load(file, weights_only=False)
    state = next(iter(saved["state"].values()))
    state[kind]._local_tensor.view(-1)[0] = value
    torch.save(saved, file)
    (wrong,) = (f for f in verify(folder).findings if f.severity == "error")
    assert wrong.id == ("nonfinite" if kind == "exp_avg" else "negative-square")
    assert wrong.where.endswith(f".{kind}") and wrong.file.endswith(file.name)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"FSDP_version": 2, "world_size": 4}', "fsdp_config.json is of 4 ranks, and the other files of 2"),
        ('{"FSDP_version": 2, "wor', "fsdp_config.json"),
    ],
)
def test_the_number_of_ranks_that_the_configuration_states(text: str, said: str, tmp_path: Path) -> None:
    """verl's own merger goes by it, and loads other files or none."""
    folder = shutil.copytree(ACTOR, tmp_path / "actor")
    (folder / "fsdp_config.json").write_text(text)
    for words in (["verify", folder], ["inspect", folder], ["extract", folder, tmp_path / "w"]):
        ran = run(*words)
        assert ran.code in (1, 2) and said in ran.out + ran.err, ran
    (folder / "fsdp_config.json").unlink()
    assert verify(folder).ok, "saved before verl wrote one"


@pytest.mark.parametrize("placement", ["Shard", "Replicate"])
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_parts_that_do_not_belong_together(placement: str, change: str, tmp_path: Path) -> None:
    from torch.distributed.tensor import Replicate

    folder = shutil.copytree(ACTOR, tmp_path / "actor")
    for rank in range(2):
        file = folder / f"model_world_size_2_rank_{rank}.pt"
        saved = torch.load(file, weights_only=False)
        tensor = saved["0.weight"]
        if placement == "Replicate":
            tensor._spec.placements = (Replicate(),)
            tensor._local_tensor = torch.zeros(tensor.shape)
        if rank:
            local = tensor._local_tensor
            tensor._local_tensor = local.half() if change == "dtype" else local[:, 1:].clone()
        torch.save(saved, file)
    ran = run("verify", folder)
    assert ran.code == 1 and "ERROR[field-damaged]" in ran.out and "rank_1.pt" in ran.out, ran


def test_an_optimizer_that_is_not_joined_is_not_lost_in_silence(tmp_path: Path) -> None:
    for to in ("pt", "dcp", "zero2"):
        ran = run("convert", ACTOR, tmp_path / "x", "--to", to)
        assert ran.code == 2 and "--reset-optimizer" in ran.err and not list(tmp_path.iterdir()), ran
    assert run("convert", ACTOR, tmp_path / "x.pt", "--to", "pt", "--reset-optimizer").code == 0
    assert run("convert", ACTOR, tmp_path / "x", "--to", "hf").code == 0


def a_rank(kind: str) -> Callable[[Path], None]:
    return lambda folder: (folder / f"{kind}_world_size_2_rank_1.pt").unlink()


def of_another_size(folder: Path) -> None:
    shutil.copy(folder / "model_world_size_2_rank_0.pt", folder / "model_world_size_4_rank_0.pt")


def two_of_one_rank(folder: Path) -> None:
    shutil.copy(folder / "model_world_size_2_rank_0.pt", folder / "model_world_size_2_rank_1.pt")


def a_changed_byte(folder: Path) -> None:
    file = folder / "optim_world_size_2_rank_1.pt"
    raw = bytearray(file.read_bytes())
    at = raw.index(b"data/0") + 200
    raw[at] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "ids"),
    [
        (a_rank("model"), {"shard-missing"}),
        (a_rank("optim"), {"shard-missing"}),
        (of_another_size, {"shard-mixed"}),
        (two_of_one_rank, {"file-renamed", "field-damaged"}),
        (a_changed_byte, {"checksum", "zip-unexplained", "zip-damaged"}),
    ],
    ids=["a rank's weights", "a rank's optimizer", "another size", "one rank twice", "a byte"],
)
def test_damage_is_found(damage: Callable[[Path], None], ids: set[str], tmp_path: Path) -> None:
    folder = tmp_path / "actor"
    shutil.copytree(ACTOR, folder)
    damage(folder)
    verdict = verify(folder)
    assert not verdict.ok and ids & {f.id for f in verdict.findings if f.severity == "error"}, (
        verdict.findings
    )
