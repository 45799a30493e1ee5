"""ZeRO-3 folders that we write: they read as what they were made from, and DeepSpeed trains on from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run
from msgspec.structs import replace
from support import FIXTURES, ZERO3_SAMPLES, differences, identical, name_of

from ckpttools.checkpoint import Checkpoint
from ckpttools.checks import verify
from ckpttools.errors import CkptError
from ckpttools.execute import execute
from ckpttools.formats import open_checkpoint, zero3
from ckpttools.operations.convert import convert
from ckpttools.tree import plain

SAMPLES = FIXTURES / "deepspeed-0.19.8"
cases = pytest.mark.parametrize("path", ZERO3_SAMPLES, ids=name_of)


def unbatched(found: Checkpoint) -> Checkpoint:
    """Without micro batch and accumulation, which keep the global batch on other ranks."""
    return replace(found, training=replace(found.training, saved_batch={}))


@cases
@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_reshard_keeps_everything(path: Path, ranks: int, tmp_path: Path) -> None:
    made = tmp_path / "x"
    assert run("reshard", path, made, "--world-size", ranks).code == 0
    before, after = open_checkpoint(path), open_checkpoint(made)
    assert after.layout.dp_degree == ranks
    # another sub_group_size-d cut, and everything else as it was
    assert differences(unbatched(before), unbatched(after), but=("ranks", "dp_degree")) == []
    assert before.training.saved_batch.get("global") == after.training.saved_batch.get("global")
    assert list(before.client) == list(after.client)
    assert plain(before.loss_scaler) == plain(after.loss_scaler)
    assert [f for f in verify(made).findings if f.severity != "info"] == []


@cases
def test_zero_to_fp32_reads_what_we_wrote(path: Path, tmp_path: Path) -> None:
    read = pytest.importorskip("deepspeed.utils.zero_to_fp32").get_fp32_state_dict_from_zero_checkpoint
    assert run("reshard", path, tmp_path / "x", "--world-size", 3).code == 0
    ours, theirs = read(str(tmp_path / "x")), read(str(path))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert identical(ours[name].contiguous(), tensor.contiguous()), name


def written(source: Path, ranks: int, folder: Path) -> Path:
    """A ZeRO-3 folder made from any checkpoint, without what its own format keeps beside."""
    found = replace(open_checkpoint(source), template=None)
    execute(zero3.plan(found, replace(found.layout, dp_degree=ranks)), folder / "tag", source=source)
    (folder / "latest").write_text("tag")
    return folder


def test_a_group_of_which_every_parameter_is_frozen_stays_empty(tmp_path: Path) -> None:
    """DeepSpeed keeps the group, for the scheduler's sake, and makes no sub-group of it."""
    source = open_checkpoint(SAMPLES / "z3_groups_ws2")
    first, *rest = source.groups
    names = set(first.params)
    empty = replace(first, params={}, state={kind: {} for kind in first.state}, scalars={})
    found = replace(source, groups=(empty, *rest), frozen=source.frozen | names, template=None)
    layout = replace(found.layout, dp_degree=3)
    execute(zero3.plan(found, layout), tmp_path / "tag", source=SAMPLES / "z3_groups_ws2")
    made = open_checkpoint(tmp_path / "tag")
    assert [list(group.params) for group in made.groups] == [[], *(list(group.params) for group in rest)]
    assert [f for f in verify(tmp_path / "tag").findings if "sub_group_size" in f.where] == []
    again = convert(tmp_path / "tag", tmp_path / "again", to="zero3", world_size=2)
    assert len(open_checkpoint(again.destination).groups) == len(made.groups)


@pytest.mark.parametrize(
    "name", ["z2_bf16_ws4", "z2_rr_frozen_tied_groups_ws2", "z2_lora_ws2", "z1_fp16_ws2"]
)
def test_stages_1_and_2_become_stage_3(name: str, tmp_path: Path) -> None:
    made = open_checkpoint(written(SAMPLES / name, 3, tmp_path))
    kept = ("format", "zero_stage", "ranks", "dp_degree", "tag", "round_robin")
    assert differences(unbatched(open_checkpoint(SAMPLES / name)), unbatched(made), but=kept) == []


def test_a_tensor_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    found = open_checkpoint(SAMPLES / "z3_groups_ws2")
    with pytest.raises(CkptError) as caught:
        zero3.plan(replace(found, buffers=frozenset()), found.layout)
    assert caught.value.id == "tensor-unknown" and "scale" in caught.value.message
