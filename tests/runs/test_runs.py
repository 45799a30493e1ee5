"""Which checkpoint of a run is taken, and why."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import run
from support import FIXTURES

from ckpttools import runs

SAMPLE = FIXTURES / "deepspeed-0.19.8" / "z2_bf16_ws2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three monolithic checkpoints whose names, steps and times disagree on purpose."""
    path = tmp_path / "run"
    shutil.copytree(FIXTURES / "monolithic" / "run", path)
    os.utime(path / "epoch_9_step_180.pt", (2_000_000_000, 2_000_000_000))
    return path


def test_the_step_inside_decides(folder: Path) -> None:
    assert [c.path.name for c in runs.candidates(folder)] == ["epoch_9_step_180.pt", "epoch_10_step_200.pt"]
    choice = runs.latest(folder)
    assert choice.path.name == "epoch_10_step_200.pt" and "step 200" in choice.why


def test_pointers_win_and_may_be_stale_paths(folder: Path) -> None:
    (folder / "last_checkpoint").write_text("/somewhere/else/run/epoch_9_step_180.pt")
    choice = runs.latest(folder)
    assert choice.path == folder / "epoch_9_step_180.pt" and "beside the pointer" in choice.why
    for text in ("epoch_11.pt", "..", " ", "a\nb"):
        (folder / "last_checkpoint").write_text(text)
        ran = run("latest", folder)
        assert ran.code == 1 and "error[pointer-dangling]" in ran.err, text


def test_verified_passes_over_damaged_ones_and_says_why(folder: Path) -> None:
    newest = folder / "epoch_10_step_200.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    ran = run("latest", folder, "--verified")
    assert ran.code == 0 and ran.out.strip() == str(folder / "epoch_9_step_180.pt")
    assert "passed over" in ran.err and "epoch_10_step_200.pt" in ran.err and "file-truncated" in ran.err
    document = json.loads(run("latest", folder, "--verified", "--json").out)
    assert [Path(p["path"]).name for p in document["passed_over"]] == [newest.name]
    os.truncate(folder / "epoch_9_step_180.pt", 100)
    ran = run("latest", folder, "--verified")
    assert ran.code == 1 and "error[none-verified]" in ran.err


def test_a_deepspeed_run_with_copies_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(SAMPLE, folder)
    tag = (folder / "latest").read_text()
    assert run("reshard", folder / tag, folder / f"{tag}.ws4", "--world-size", "4").code == 0
    assert [c.path.name for c in runs.candidates(folder)] == [tag]
    assert run("latest", folder).out.strip() == str(folder / tag)
    assert run("latest", folder, "--verified").out.strip() == str(folder / tag)


def test_nothing_to_find(tmp_path: Path) -> None:
    for options in ([], ["--verified"]):
        ran = run("latest", tmp_path, *options)
        assert ran.code == 2 and "error[no-checkpoints]" in ran.err
        assert run("latest", tmp_path / "gone", *options).code == 2
