"""What the files of a checkpoint say against each other, or against what training can have left.

Each was given to DeepSpeed 0.19.8 on two ranks. An error is what it fails on, or loses state by; a warning
what it loads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FIXTURES

from ckpttools.checks import verify
from ckpttools.findings import ERROR, INFO, WARNING

SAMPLE = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
ZERO3 = FIXTURES / "deepspeed-0.19.8/z3_bf16_ws2"
BUFFERS = FIXTURES / "deepspeed-0.19.8/z2_buffers_ws2"
RANK = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
Edit = Callable[[Any], object]


def edit(path: Path, change: Edit) -> None:
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


def on(names: list[str], change: Edit) -> Callable[[Path], None]:
    def apply(tag: Path) -> None:
        for name in names:
            edit(tag / name, change)

    return apply


RANKS = [RANK.format(0), RANK.format(1)]


def base(root: Any) -> Any:
    return root["optimizer_state_dict"]["base_optimizer_state"]


def group(**settings: object) -> Edit:
    return lambda root: root["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0].update(
        settings
    )


def state(root: Any) -> Any:
    return base(root)["state"]


def zeroed(root: Any) -> None:
    for kept in state(root).values():
        kept["exp_avg"].zero_()
        kept["exp_avg_sq"].zero_()


def rounded(root: Any) -> None:
    for vector in root["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
        vector.data.copy_(vector.data.bfloat16().float())


def zeroed_zero3(root: Any) -> None:
    for kept in root["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
        kept["exp_avg"].zero_()
        kept["exp_avg_sq"].zero_()


def rounded_zero3(root: Any) -> None:
    for vector in root["optimizer_state_dict"]["fp32_flat_groups"]:
        vector.data.copy_(vector.data.bfloat16().float())


CASES: dict[str, tuple[Callable[[Path], object], str, str, str, str]] = {
    # fails with NaN after one update
    "lr of another world": (
        on(RANKS, group(lr=1e6)),
        ERROR,
        "rate-unexpected",
        RANK.format(0),
        "param_groups[0].lr",
    ),
    "lr that is not the schedule's": (
        on(RANKS, group(lr=0.013)),
        WARNING,
        "rate-unexpected",
        RANK.format(0),
        "param_groups[0].lr",
    ),
    # TypeError at the first update
    "lr in words": (
        on(RANKS, group(lr="0.01")),
        ERROR,
        "setting-implausible",
        RANK.format(0),
        "param_groups[0].lr",
    ),
    # RuntimeError at the first update: a complex number
    "beta above one": (
        on(RANKS, group(betas=(0.9, 1.5))),
        ERROR,
        "setting-implausible",
        RANK.format(0),
        "param_groups[0].betas[1]",
    ),
    # loaded in silence, with fresh moments
    "no moments on any rank": (
        on(RANKS, lambda root: state(root).clear()),
        ERROR,
        "moment-missing",
        RANK.format(0),
        "optimizer_state_dict.base_optimizer_state.state",
    ),
    "no moments on rank 1": (
        on(RANKS[1:], lambda root: state(root).clear()),
        ERROR,
        "moment-missing",
        RANK.format(1),
        "group 0",
    ),
    "no moments on rank 0": (
        on(RANKS[:1], lambda root: state(root).clear()),
        ERROR,
        "moment-missing",
        RANK.format(0),
        "group 0",
    ),
    "zeros on rank 1": (on(RANKS[1:], zeroed), WARNING, "moments-zero", RANK.format(1), ""),
    "masters of 16 bits": (on(RANKS[1:], rounded), WARNING, "masters-rounded", RANK.format(1), ""),
    # TypeError while loading
    "no scheduler": (
        on([MODEL], lambda root: root.update(lr_scheduler=None)),
        ERROR,
        "scheduler-missing",
        MODEL,
        "lr_scheduler",
    ),
    # TypeError while loading
    "no module": (
        on([MODEL], lambda root: root.update(module=None)),
        ERROR,
        "field-missing",
        MODEL,
        "module",
    ),
    # "checkpoint count 2 is different from saved mp_world_size 1"
    "a second model file": (
        lambda tag: shutil.copy(tag / MODEL, tag / "mp_rank_00_old_model_states.pt"),
        ERROR,
        "shard-extra",
        "mp_rank_00_old_model_states.pt",
        "",
    ),
    "another file of a rank": (
        lambda tag: shutil.copy(tag / RANK.format(0), tag / f"old_{RANK.format(0)}"),
        WARNING,
        "shard-extra",
        f"old_{RANK.format(0)}",
        "",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_found_once_and_where_it_is(name: str, tmp_path: Path) -> None:
    change, severity, id, file, where = CASES[name]
    shutil.copytree(SAMPLE, tmp_path / "copy")
    change(tmp_path / "copy/global_step3")
    found = [f for f in verify(tmp_path / "copy").findings if f.severity != INFO]
    assert [(f.severity, f.id, Path(f.file).name, f.where) for f in found] == [(severity, id, file, where)]


@pytest.mark.parametrize("id", ["moments-zero", "masters-rounded"])
def test_the_same_in_zero3(id: str, tmp_path: Path) -> None:
    shutil.copytree(ZERO3, tmp_path / "copy")
    (shard,) = (tmp_path / "copy").glob("global_step*/*zero_pp_rank_1_*optim_states.pt")
    edit(shard, zeroed_zero3 if id == "moments-zero" else rounded_zero3)
    found = [f for f in verify(tmp_path / "copy").findings if f.severity != INFO]
    assert [(f.severity, f.id, f.file) for f in found] == [(WARNING, id, str(shard))]


def test_nan_in_a_buffer(tmp_path: Path) -> None:
    shutil.copytree(BUFFERS, tmp_path / "copy")
    edit(tmp_path / "copy/global_step3" / MODEL, lambda root: root["module"]["scale"].fill_(float("nan")))
    found = [f for f in verify(tmp_path / "copy").findings if f.id == "nonfinite"]
    assert [(f.severity, f.where) for f in found] == [(WARNING, "scale")]


def test_infinity_in_a_buffer_is_a_mask(tmp_path: Path) -> None:
    shutil.copytree(BUFFERS, tmp_path / "copy")
    edit(tmp_path / "copy/global_step3" / MODEL, lambda root: root["module"]["scale"].fill_(-float("inf")))
    assert [f.severity for f in verify(tmp_path / "copy").findings if f.id == "nonfinite"] == [INFO]


def test_a_stale_latest(tmp_path: Path) -> None:
    shutil.copytree(SAMPLE, tmp_path / "run")
    shutil.copytree(tmp_path / "run/global_step3", tmp_path / "run/global_step12")
    for named, stale in (("global_step3", True), ("global_step12", False)):
        (tmp_path / "run/latest").write_text(named)
        found = [f for f in verify(tmp_path / "run", named).findings if f.id == "pointer-stale"]
        assert bool(found) is False  # the tag was named: nobody asks latest
        found = [f for f in verify(tmp_path / "run" / named).findings if f.id == "pointer-stale"]
        assert [f.severity for f in found] == [WARNING] * stale
        assert not stale or "global_step12" in found[0].message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_masters_of_a_type_that_deepspeed_never_keeps(dtype: torch.dtype, tmp_path: Path) -> None:
    """On one rank no other rank tells; DeepSpeed loads it and goes on from rounded weights."""
    shutil.copytree(FIXTURES / "deepspeed-0.19.8/z2_fp32_ws1", tmp_path / "copy")
    (shard,) = (tmp_path / "copy").glob("global_step*/*optim_states.pt")

    def change(root: Any) -> None:
        masters = root["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        masters[:] = [part.to(dtype) for part in masters]

    edit(shard, change)
    found = [f for f in verify(tmp_path / "copy").findings if f.severity == ERROR]
    assert [(f.id, f.file) for f in found] == [("dtype-odd", str(shard))]
    assert found[0].where == "optimizer_state_dict.single_partition_of_fp32_groups[0]"


@pytest.mark.parametrize("steps", [2, 3])
def test_a_warmup_from_zero_leaves_masters_as_they_were_made(steps: int, tmp_path: Path) -> None:
    """DeepSpeed's schedulers make their first two updates with a learning rate of zero."""
    shutil.copytree(SAMPLE, tmp_path / "copy")
    edit(tmp_path / "copy/global_step3" / MODEL, lambda root: root.update(global_steps=steps))
    on(RANKS, rounded)(tmp_path / "copy/global_step3")
    found = {f.id for f in verify(tmp_path / "copy").findings}
    assert ("masters-rounded" in found) is (steps == 3)
