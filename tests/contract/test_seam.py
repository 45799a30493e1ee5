"""What once passed between a reader and a writer in silence: held here, one test for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES

from ckpttools.errors import CkptError
from ckpttools.formats import open_checkpoint
from ckpttools.formats.dcp.read import read as read_dcp
from ckpttools.formats.hf.read import read as read_hf
from ckpttools.formats.zero.read import read as read_zero

NEWEST = FIXTURES / "deepspeed-0.19.8"


def test_tuples_stay_tuples() -> None:
    groups = open_checkpoint(NEWEST / "z2_groups_ws2").groups
    assert {type(group.hyper["betas"]) for group in groups} == {tuple}


def test_shapes_in_a_tuple_are_read_and_written_alike(tmp_path: Path) -> None:
    folder = tmp_path / "save"
    shutil.copytree(NEWEST / "z2_groups_ws2", folder)
    (model,) = folder.rglob("mp_rank_00_model_states.pt")
    value = torch.load(model, weights_only=False)
    value["param_shapes"] = tuple(value["param_shapes"])
    torch.save(value, model)
    assert run("verify", folder).code == 0
    assert run("reshard", folder, tmp_path / "out", "--world-size", 3).code == 0
    assert run("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("read", "sample", "file"),
    [
        (read_zero, NEWEST / "z2_groups_ws2", "mp_rank_00_model_states.pt"),
        (read_dcp, FIXTURES / "dcp/fsdp2_ws2", "__0_0.distcp"),
        (read_hf, FIXTURES / "hf/sharded", "model-00001-of-00002.safetensors"),
        (read_hf, FIXTURES / "hf/single", "model.safetensors"),
    ],
    ids=["zero", "dcp", "hf", "hf single"],
)
def test_a_reader_called_alone_follows_no_link_out(
    read: object, sample: Path, file: str, tmp_path: Path
) -> None:
    found = next(iter(sorted(sample.rglob(file))))
    folder = tmp_path / "checkpoint"
    shutil.copytree(found.parent, folder)
    assert callable(read)
    read(folder)
    outside = tmp_path / "elsewhere"
    (folder / found.name).rename(outside)
    (folder / found.name).symlink_to(outside)
    with pytest.raises(CkptError, match="link"):
        read(folder)
