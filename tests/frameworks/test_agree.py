"""Every command names the same checkpoint the newest, and the same counters of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES

from ckpttools import frameworks, runs
from ckpttools.formats import locate, read

# folders of fixtures with what each framework wrote; two of them hold a run of several
ALL = (
    "accelerate/deepspeed", "accelerate/plain", "bundle", "dcp", "deepspeed-0.19.8/z2_bf16_ws2",
    "deepspeed-0.19.8/z3_bf16_ws2", "hf-trainer/deepspeed", "hf-trainer/plain", "lightning/deepspeed",
    "lightning/file", "mmengine/run", "mmengine-deepspeed", "monolithic/bare", "monolithic/full",
    "monolithic/mmengine", "monolithic/pcdet", "monolithic/timm", "trainer/z2_bf16_2", "trainer/z2_fp32_1",
)  # fmt: skip


def shown(*args: object) -> Any:
    ran = run(*args, "--json")
    return json.loads(ran.out), ran


def counters(path: Path) -> dict[str, tuple[Any, Any]]:
    """Step (or iteration) and epoch of one checkpoint, by the command that says them."""
    inspect, _ = shown("inspect", path)
    verify, _ = shown("verify", path, "--quick")
    resume, _ = shown("resume-check", path)
    (checked,) = verify["checkpoints"]

    def count(step: Any, iteration: Any) -> Any:
        return step if step is not None else iteration

    said = {
        "inspect": (count(inspect["step"], inspect["iteration"]), inspect["epoch"]),
        "resume-check": (resume["step"], resume["epoch"]),
    }
    if checked["step"] is not None:
        said["verify"] = (checked["step"], checked["epoch"])
    return said


@pytest.mark.parametrize("name", ALL)
def test_ls_latest_inspect_and_resume_check_agree(name: str) -> None:
    folder = FIXTURES / name
    listed, _ = shown("ls", folder)
    latest, ran = shown("latest", folder)
    assert ran.code == 0
    marked = [c for r in listed["runs"] for c in r["checkpoints"] if "latest" in c["marks"]]
    for run_ in listed["runs"]:
        for each in run_["checkpoints"]:
            step = each["step"] if each["step"] is not None else each["metrics"].get("iteration")
            for command, said in counters(Path(each["path"])).items():
                if said[0] is not None or step is not None:
                    assert said == (step, each["epoch"]), (command, each["path"])
    if len(listed["runs"]) == 1:
        (newest,) = marked
        assert locate(Path(newest["path"])).target == locate(Path(latest["path"])).target
        assert runs.newest(folder).path == Path(latest["path"])


REBASED = {
    "hf-trainer/plain/checkpoint-2": (2, 1),
    "trainer/z2_bf16_2": (8, 4),
    "mmengine-deepspeed/iter_50.pth": (8, 4),
    "accelerate/deepspeed": (4, 2),
    "lightning/deepspeed/epoch=0-step=3.ckpt": (4, 2),
    "monolithic/pcdet/checkpoint_epoch_4.pth": (8, 4, "--dataset-size", 160),
}


@pytest.mark.parametrize("name", REBASED)
def test_rebase_moves_the_counter_that_the_others_name(name: str, tmp_path: Path) -> None:
    old, new, *more = REBASED[name]
    found, ran = shown(
        "rebase-schedule",
        FIXTURES / name,
        tmp_path / "new",
        "--old-bs",
        old,
        "--new-bs",
        new,
        "--dry-run",
        *more,
    )
    assert ran.code == 0, ran.out
    source = locate(FIXTURES / name)
    state = frameworks.read(source, read(source))
    assert found["position"]["old"] == (state.iteration if found["unit"] == "micro" else state.step)


def one(path: Path, **saved: Any) -> Path:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    torch.save({**saved, "optimizer_state_dict": optimizer.state_dict()}, path)
    return path


@pytest.mark.parametrize("weights", ["model_state_dict", "model_state"])
def test_two_counters_in_one_file_are_one_everywhere(weights: str, tmp_path: Path) -> None:
    """OpenPCDet's `it` is its own counter; in a file of plain code `iter` is the more usual one."""
    path = one(tmp_path / "a.pth", it=7, iter=9, epoch=1, **{weights: {"w.weight": torch.zeros(3)}})
    expected = 7 if weights == "model_state" else 9
    said = {command: count for command, (count, _) in counters(path).items()}
    assert set(said.values()) == {expected}, said
    found, ran = shown(
        "rebase-schedule",
        path,
        tmp_path / "new",
        "--old-bs",
        4,
        "--new-bs",
        2,
        "--counters-only",
        "--dry-run",
    )
    assert ran.code == 0, ran.out
    assert found["position"]["old"] == expected


def test_a_pointer_beats_numbers_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("iter_1500.pth", "iter_3000.pth"):
        shutil.copytree(FIXTURES / "mmengine/run/iter_1500.pth", folder / name)
    for path in (folder / name, *(folder / name).iterdir()):  # the later one, without the pointer
        os.utime(path)
    assert Path(shown("latest", folder)[0]["path"]).name == "iter_3000.pth"
    (folder / "last_checkpoint").write_text(os.fspath(folder / "iter_1500.pth"))
    latest, _ = shown("latest", folder)
    resume, _ = shown("resume-check", folder)
    assert Path(latest["path"]).name == "iter_1500.pth"
    assert {Path(each["path"]).name for each in resume["auto_resume"]} == {"iter_1500.pth"}
