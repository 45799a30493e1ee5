"""What lies with the weights and is no tensor by name: nobody calls it equal, and nothing drops it unsaid."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from torch import nn

from ckpttools.operations.convert import convert

W = torch.ones(2, 2)


def saved(folder: Path, name: str, make: Callable[[torch.Tensor], Any]) -> list[Path]:
    """Two files that differ in what `make` keeps of a tensor."""
    paths = [folder / f"{name}{i}.pt" for i in (1, 2)]
    for i, path in enumerate(paths, 1):
        torch.manual_seed(i)
        torch.save(make(torch.randn(2, 3)), path)
    return paths


KEYS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "number": (lambda x: {"w.weight": W, 3: x}, "[3]"),
    "pair": (lambda x: {"w.weight": W, ("a", "b"): x}, "[['a', 'b']]"),
    "inside": (lambda x: {"model": {"w.weight": W, 3: x}, "epoch": 1}, "model[3]"),
    "beside": (lambda x: {"model": {"w.weight": W}, 5: {"w.weight": x}, "epoch": 1}, "[5]"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_tensors_under_keys_that_are_no_text_are_never_called_equal(kind: str, tmp_path: Path) -> None:
    make, place = KEYS[kind]
    a, b = saved(tmp_path, kind, make)
    ran = run("diff", a, b)
    assert ran.code == 1 and f"not compared: {place}" in ran.out
    ran = run("prove", a, b)
    assert ran.code == 1 and place in ran.out and "the same training state" not in ran.out
    ran = run("digest", a, "--compare", b)
    assert ran.code == 1 and f"keys that are no text: {place}; no command looks into it" in ran.out
    assert "the same" not in ran.out
    ran = run("digest", a, "--compare", b, "--kind", "weight")
    assert ran.code == 0 and f"not asked for: {place}" in ran.out
    assert f"not in the digests: {place}" in run("digest", a).out
    dst = tmp_path / "made"
    commands = (("extract", a, dst), ("average", a, b, "-o", dst), ("convert", a, dst, "--to", "hf"))
    for command in commands:
        shutil.rmtree(dst, ignore_errors=True)
        ran = run(*command)
        assert ran.code == 0 and "keys that are no text" in ran.err and place in ran.err, ran.err


def test_a_change_of_the_file_keeps_what_lies_under_such_keys(tmp_path: Path) -> None:
    half = torch.ones(2, 2, dtype=torch.float16)
    torch.save({"model": {"w.weight": half, 3: W}, 5: W, "epoch": 1}, tmp_path / "a.pt")
    for dtype in (None, "fp32"):
        convert(tmp_path / "a.pt", tmp_path / f"{dtype}.pt", to="pt", dtype=dtype)
        made = torch.load(tmp_path / f"{dtype}.pt", weights_only=True)
        assert torch.equal(made["model"][3], W) and torch.equal(made[5], W)
    torch.save({"w.weight": half, 3: W}, tmp_path / "bare.pt")
    notes = convert(tmp_path / "bare.pt", tmp_path / "c.pt", to="pt").notes
    assert any(note.startswith("left out: what lies under keys that are no text ([3])") for note in notes)


def quantised(x: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        return torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8).state_dict()


HIDDEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "quantised": lambda x: {"w.weight": W, "q": torch.quantize_per_tensor(x, 0.1, 10, torch.quint8)},
    "sparse": lambda x: {"w.weight": W, "q": x.to_sparse()},
    "conjugated": lambda x: {"w.weight": W, "q": torch.complex(x, x).conj()},
    "packed": quantised,
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_weights_that_nobody_looks_into_are_never_called_equal(kind: str, tmp_path: Path) -> None:
    a, b = saved(tmp_path, kind, HIDDEN[kind])
    ran = run("digest", a, "--compare", b)
    assert ran.code == 1 and "the same weights" not in ran.out
    hidden = [line for line in ran.out.splitlines() if "no command looks into it" in line]
    proved = run("prove", a, b)
    assert proved.code == 1 and "not compared" in proved.out
    key = "0._packed_params._packed_params" if kind == "packed" else "q"
    assert len(hidden) == 1 and f"{key}" in hidden[0]
    assert "of a kind that is not read" in run("verify", a).out


def test_tensors_in_the_models_state_are_compared_where_all_is_asked_for(tmp_path: Path) -> None:
    a, b = saved(tmp_path, "a", lambda x: {"w.weight": W, "_extra_state": {"amax": x}})
    ran = run("digest", a, "--compare", b)
    assert ran.code == 1 and "DIFFERENT: client state _extra_state.amax" in ran.out
    assert "equal: what lies beside, in no digest: _extra_state" in run("digest", a, "--compare", a).out
    assert run("digest", a, "--compare", b, "--kind", "weight").code == 0
    ran = run("prove", a, b)
    assert ran.code == 1 and "_extra_state.amax" in ran.out


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_torch_loads_quantised_tensors_without_further_classes(per: str, tmp_path: Path) -> None:
    q = torch.quantize_per_tensor(W, 0.1, 10, torch.quint8)
    if per == "channel":
        q = torch.quantize_per_channel(W, torch.ones(2), torch.zeros(2), 0, torch.qint8)
    torch.save({"w.weight": W, "q": q}, tmp_path / "a.pt")
    made = convert(tmp_path / "a.pt", tmp_path / "b.pt", to="pt")
    assert torch.equal(torch.load(tmp_path / "b.pt", weights_only=True)["model_state_dict"]["w.weight"], W)
    assert not any("refuses" in line for line in made.next)
