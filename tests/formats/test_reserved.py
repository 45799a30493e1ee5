"""Names that an output keeps for itself, and keys as a shell takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from commands import run
from safetensors.torch import load_file
from support import tensor_differences

from ckpttools.formats import open_checkpoint


def test_a_tied_name_that_the_header_uses_is_stored_itself(tmp_path: Path) -> None:
    tied = torch.arange(3.0)
    state = {"step": tied, "a.weight": torch.ones(2), "format": tied, "plain": tied}
    torch.save(state, tmp_path / "weights.pt")
    for out in ("made.safetensors", "made"):
        assert run("extract", tmp_path / "weights.pt", tmp_path / out).code == 0
        again = open_checkpoint(tmp_path / out)
        assert tensor_differences(again.tensors, state) == []


def test_a_tensor_of_the_headers_own_name_is_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2), "__metadata__": torch.ones(3)}, tmp_path / "weights.pt")
    ran = run("extract", tmp_path / "weights.pt", tmp_path / "made.safetensors")
    assert ran.code == 2 and "error[name-reserved]" in ran.err
    assert not (tmp_path / "made.safetensors").exists()
    left = run("extract", tmp_path / "weights.pt", tmp_path / "made.safetensors", "--exclude", "__metadata__")
    assert left.code == 0 and list(load_file(tmp_path / "made.safetensors")) == ["a.weight"]


def test_the_key_that_is_told_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    torch.save({"q w": {"a.weight": torch.ones(2)}}, tmp_path / "weights.pt")
    ran = run("inspect", tmp_path / "weights.pt")
    assert ran.code == 2 and "--key 'q w'" in ran.err
