"""Optimizer state of every shape that real optimizers keep under ZeRO: nested, of single ranks, of 16 bits.

The samples are of DeepSpeed 0.19.8 on two ranks, two of them with bitsandbytes 0.50.2 on the CPU. That what
can be cut is cut right is held by the sweeps over all samples, and by DeepSpeed that resumes it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES

from ckpttools.checks import verify
from ckpttools.findings import INFO, WARNING
from ckpttools.formats import open_checkpoint

NEWEST = FIXTURES / "deepspeed-0.19.8"
BNB = "__bnb_optimizer_quant_state__"
LOCAL = {
    "z2_ranklocal": "largest",
    "z2_ranknumber": "inner.d",
    "z2_bnb_adamw8": f"{BNB}.state1",
    "z2_muon": "momentum_buffer",
}
CUT = {
    "z2_nested": {"fp32", "inner.state1", "inner.state2", "history[0]", "history[1]", "pair[0]"},
    "z2_bnb_adamw": {"fp32", f"{BNB}.state1", f"{BNB}.state2"},
    "z2_bf16_masters": {"fp32", "exp_avg", "exp_avg_sq"},
    "z2_bf16_states": {"fp32", "exp_avg", "exp_avg_sq"},
    "z2_adamax": {"fp32", "exp_avg", "exp_inf"},
}


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_verifies_and_is_moved(name: str, tmp_path: Path) -> None:
    source = NEWEST / f"{name}_ws2"
    for group in open_checkpoint(source).groups:
        assert set(group.state) == CUT[name]
    assert [f for f in verify(source).findings if f.severity != INFO] == []
    assert run("extract", source, tmp_path / "w.safetensors").code == 0
    assert run("reshard", source, tmp_path / "three", "--world-size", 3).code == 0
    assert [f for f in verify(tmp_path / "three").findings if f.severity != INFO] == []


@pytest.mark.parametrize("name", LOCAL)
def test_what_belongs_to_one_rank_is_named_and_not_moved(name: str, tmp_path: Path) -> None:
    source, kind = NEWEST / f"{name}_ws2", LOCAL[name]
    found = [f for f in verify(source).findings if f.id == "rank-local-state"]
    assert {f.severity for f in found} == {INFO}
    assert any(f.where.endswith(f" {kind}") for f in found)
    refused = run("reshard", source, tmp_path / "three", "--world-size", 3)
    assert refused.code == 2
    assert f"error[rank-local-state]: optimizer state '{kind}'" in refused.err
    assert list(tmp_path.iterdir()) == []
    assert run("inspect", source).code == 0
    assert run("extract", source, tmp_path / "w.safetensors").code == 0


def test_momentum_of_whole_parameters_is_not_moved_where_its_length_fits(tmp_path: Path) -> None:
    """Parameters that end where the partitions end: the momentum is as long as they, and still not cut."""
    source = altered(
        tmp_path, "z2_muon", "*", lambda state, fp32: state[0].update(momentum_buffer=fp32[0].clone())
    )
    assert "momentum_buffer" in open_checkpoint(source).groups[0].state
    refused = run("reshard", source, tmp_path / "three", "--world-size", 3)
    assert refused.code == 2
    assert "error[rank-local-state]: optimizer state 'momentum_buffer'" in refused.err


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda state, fp32: state[0]["inner"].update(step=2), "inner.step"),
        (lambda state, fp32: state[0]["scale"].mul_(2), "scale"),
    ],
)
def test_what_differs_between_the_ranks_is_never_taken_from_one(
    change: Callable[[Any, Any], object], kind: str, tmp_path: Path
) -> None:
    source = altered(tmp_path, "z2_nested", "*rank_1_*", change)
    found = verify(source).findings
    assert any(f.where == f"group 0 {kind}" for f in found)
    assert any(f.severity == WARNING for f in found) or kind != "inner.step"
    refused = run("reshard", source, tmp_path / "three", "--world-size", 3)
    assert refused.code == 2
    assert f"error[rank-local-state]: optimizer state '{kind}' of group 0" in refused.err


def altered(folder: Path, name: str, files: str, change: Callable[[Any, Any], object]) -> Path:
    """A sample with the optimizer state of some ranks changed, given their masters."""
    copy = folder / "save"
    shutil.copytree(NEWEST / f"{name}_ws2", copy)
    for path in copy.glob(f"*/{files}optim_states.pt"):
        root = torch.load(path, weights_only=False)
        held = root["optimizer_state_dict"]
        change(held["base_optimizer_state"]["state"], held["single_partition_of_fp32_groups"])
        torch.save(root, path)
    return copy
