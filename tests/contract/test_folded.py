"""Values that hold the same parts again and again: a few hundred bytes that unfold to 10^12 items."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import run

WEIGHTS = {"a": torch.arange(3.0)}


def folded(depth: int = 40) -> object:
    value: object = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def saved(path: Path, value: object) -> Path:
    parameter = torch.nn.Parameter(WEIGHTS["a"].clone())
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    states = optimizer.state_dict()
    states["state"][0]["more"] = value
    torch.save({"model_state_dict": WEIGHTS, "optimizer_state_dict": states, "x": value, "epoch": 1}, path)
    return path


@pytest.mark.parametrize("words", [(), ("--to", "dcp"), ("--to", "pt", "--rename", "a=b")])
def test_it_ends(words: tuple[str, ...], tmp_path: Path) -> None:
    path = saved(tmp_path / "folded.pt", folded())
    if not words:
        assert run("inspect", path).code == 0
        assert run("verify", path).code == 0
        assert run("extract", path, tmp_path / "weights.safetensors").code == 0
        return
    ran = run("convert", path, tmp_path / "out", *words)
    assert ran.code in (0, 1, 2) and "Traceback" not in ran.err, ran.err


def test_what_is_shared_in_earnest_is_read(tmp_path: Path) -> None:
    common = {"betas": [0.9, 0.999], "names": [f"layer {i}" for i in range(50)]}
    path = saved(tmp_path / "shared.pt", [common] * 2000)
    assert run("convert", path, tmp_path / "out.pt", "--to", "pt", "--rename", "a=b").code == 0
    value = torch.load(tmp_path / "out.pt", weights_only=True)["x"]
    assert value == [common] * 2000
