"""Which checkpoint a launch continues from, decided from names alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpttools.errors import UsageError
from ckpttools.trainer import folders
from ckpttools.trainer.config import Config
from ckpttools.trainer.options import Options
from ckpttools.trainer.startup import decide


def saved(run: Path, tag: str, ranks: int = 2, age: int = 0, prefix: str = "bf16_") -> Path:
    folder = run / tag
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").touch()
    for rank in range(ranks):
        (folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    os.utime(folder, ns=(1, 10**18 - age * 10**9))
    return folder


def test_newest_is_what_last_checkpoint_names(tmp_path: Path) -> None:
    assert folders.newest(tmp_path) is None
    first = saved(tmp_path, "iter_000002.pth")
    saved(tmp_path, "iter_000010.pth")
    (tmp_path / "last_checkpoint").write_text("iter_000002.pth\n")
    assert folders.newest(tmp_path) == first
    (tmp_path / "last_checkpoint").write_text("/moved/from/here/iter_000002.pth")
    assert folders.newest(tmp_path) == first


def test_newest_by_number_without_last_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, "iter_000009.pth", age=1)
    ten = saved(tmp_path, "iter_000010.pth", age=5)  # copied back later than it was made
    saved(tmp_path, "iter_000010.pth.ws4")  # resharded copies are never picked by themselves
    (tmp_path / "iter_000099.pth").mkdir()  # nothing in it
    saved(tmp_path, "epoch_001.pth", age=9)
    (tmp_path / "last_checkpoint").write_text("iter_000099.pth")
    assert folders.newest(tmp_path) == ten
    epoch = saved(tmp_path, "epoch_002.pth", age=0)
    assert folders.newest(tmp_path) == epoch


def test_resolve(tmp_path: Path) -> None:
    tag = saved(tmp_path, "global_step5")
    assert folders.resolve(tag) == tag
    with pytest.raises(UsageError, match="no DeepSpeed checkpoint here"):
        folders.resolve(tmp_path)
    for bad in ("../other", "global_step6"):
        (tmp_path / "latest").write_text(bad)
        with pytest.raises(UsageError, match="which holds no checkpoint"):
            folders.resolve(tmp_path)
    (tmp_path / "latest").write_text("global_step5")
    assert folders.resolve(tmp_path) == tag


def test_auto_resume_takes_the_newest_run_that_has_a_checkpoint(tmp_path: Path) -> None:
    config = Config(experiment="e", work_dirs=str(tmp_path))
    options = Options(config=Path("c"), resume=True)
    start = decide(config, options, world=2)
    assert start.checkpoint is None
    assert start.notes == (f"No checkpoint found under {tmp_path}/e: starting from step 0",)
    saved(tmp_path / "e/20250101_000000", "iter_000900.pth")
    newer = saved(tmp_path / "e/20250102_000000", "iter_000100.pth")
    (tmp_path / "e/20250103_000000").mkdir()
    start = decide(config, options, world=2)
    assert (start.run, start.checkpoint) == (newer.parent, newer)
    assert start.notes == (f"Auto resumed from the latest checkpoint {newer}",)


@pytest.mark.parametrize(
    ("ranks", "prefix", "id", "hint"),
    [
        (4, "bf16_", "world-size", "ckpt reshard {} --world-size 2"),
        (0, "bf16_", "no-optimizer-states", "--resume-from {} without --resume"),
        (2, "", "precision", "without --resume"),
    ],
)
def test_what_cannot_be_loaded_is_refused_first(
    tmp_path: Path, ranks: int, prefix: str, id: str, hint: str
) -> None:
    tag = saved(tmp_path, "iter_000001.pth", ranks=ranks, prefix=prefix)
    options = Options(config=Path("c"), resume=True, resume_from=tag)
    with pytest.raises(UsageError) as caught:
        decide(Config(work_dirs=str(tmp_path)), options, world=2)
    error = caught.value
    assert (error.id, error.where) == (id, str(tag))
    assert hint.format(tag) in error.hint
    assert error.why
    weights = decide(Config(work_dirs=str(tmp_path)), Options(config=Path("c"), resume_from=tag), world=2)
    assert weights.weights_only


def test_a_new_run_does_not_overwrite_another(tmp_path: Path) -> None:
    saved(tmp_path / "run", "epoch_001.pth")
    with pytest.raises(UsageError) as caught:
        decide(Config(), Options(config=Path("c"), work_dir=tmp_path / "run"), world=2)
    assert caught.value.id == "run-exists"


def test_write_text_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    folders.write_text(tmp_path / "last_checkpoint", "a")
    folders.write_text(tmp_path / "last_checkpoint", "b")
    assert [p.name for p in tmp_path.iterdir()] == ["last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "b"
