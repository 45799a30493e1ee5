"""Default destinations are taken by no framework for checkpoints of its own: its own code is asked."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import run
from support import FIXTURES

from ckpttools.operations.destination import default_dst
from ckpttools.siblings import is_copy, is_ours

TRAINER = FIXTURES / "hf-trainer" / "deepspeed"
GLOBS = (
    "checkpoint-*", "checkpoint_*", "epoch_*", "iter_*", "best_*", "global_step*", "last*", "latest*",
    "step_*", "epoch=*", "model*", "pytorch_model*", "tmp-checkpoint-*", "hpc_ckpt_*",
)  # fmt: skip
KINDS = ("ws4", "bs64", "weights")


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-20",
        "checkpoint_3",
        "checkpoint_epoch_3.pth",
        "epoch_12.pth",
        "iter_1500.pth",
        "global_step20",
        "last.ckpt",
        "last-v1.ckpt",
        "epoch=3-step=99.ckpt",
        "best_model.pt",
        "model.safetensors",
    ],
)
def test_no_glob_takes_a_default_name(name: str, tmp_path: Path) -> None:
    for kind in KINDS:
        made = default_dst(tmp_path / name, kind)
        assert made.parent == tmp_path and made.suffix == Path(name).suffix
        assert is_copy(made.name) and not is_ours(made.name)
        assert not [glob for glob in GLOBS if fnmatch.fnmatch(made.name, glob)]


def test_a_copy_of_a_copy_keeps_one_name_of_a_kind(tmp_path: Path) -> None:
    made = default_dst(tmp_path / "a.pt", "ws4")
    assert made.name == "ws4-of-a.pt"
    assert default_dst(made, "ws2").name == "ws2-of-a.pt"
    assert default_dst(made, "bs8").name == "bs8-of-ws4-of-a.pt"
    assert default_dst(tmp_path / "a.ws4", "ws2").name == "ws2-of-a"
    assert default_dst(tmp_path / "a.pth.tar", "weights", "").name == "weights-of-a"


def test_nothing_is_put_where_all_belongs_to_a_framework(tmp_path: Path) -> None:
    """OpenPCDet resumes from any *.pth in ckpt/; accelerate rotates every entry of checkpoints/."""
    for theirs in ("ckpt", "checkpoints"):
        source = tmp_path / "run" / theirs / "checkpoint_epoch_3.pth"
        assert default_dst(source, "bs64") == tmp_path / "run" / "bs64-of-checkpoint_epoch_3.pth"


def test_names_that_users_have_are_not_taken_for_copies() -> None:
    for name in ("weights.pt", "best_weights.pth", "ws4", "model-00001-of-00003.safetensors", "bs64.yaml"):
        assert not is_copy(name), name


def test_the_trainer_rotates_and_resumes_its_own_alone(tmp_path: Path) -> None:
    utils = pytest.importorskip("transformers.trainer_utils")
    folder = tmp_path / "out"
    shutil.copytree(TRAINER, folder)
    for args in (
        ("reshard", folder / "checkpoint-2", "--world-size", "1"),
        ("rebase-schedule", folder / "checkpoint-2", "--new-bs", "1"),
        ("extract", folder / "checkpoint-2", "--weights-only"),
    ):
        ran = run(*args)
        assert ran.code == 0, ran.err
        assert Path(ran.out.strip()).is_dir() and Path(ran.out.strip()).parent == folder
    assert len(list(folder.iterdir())) == 5
    own = [str(folder / "checkpoint-2"), str(folder / "checkpoint-4")]
    assert utils.sort_checkpoints(output_dir=str(folder)) == own
    assert utils.get_last_checkpoint(str(folder)) == own[1]
    copies = {path.name for path in folder.iterdir()} - {"checkpoint-2"}
    utils.rotate_checkpoints(output_dir=str(folder), save_total_limit=1)
    assert {path.name for path in folder.iterdir()} == copies  # the older of its own went, nothing else


def test_lightning_takes_no_copy_for_the_last(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    checkpoint = callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    for name in ("last.ckpt", "last-v1.ckpt"):
        (tmp_path / name).touch()
        for kind in KINDS:
            default_dst(tmp_path / name, kind).touch()
    trainer = SimpleNamespace(ckpt_path=None, loggers=[])
    found = checkpoint._find_last_checkpoints(trainer)
    assert {Path(path).name for path in found} == {"last.ckpt", "last-v1.ckpt"}
