"""Which checkpoint of a run is taken, and why; which checkpoints lie below a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run
from support import FIXTURES

from ckpttools import runs
from ckpttools.checks import verify
from ckpttools.findings import ERROR

SAMPLE = FIXTURES / "deepspeed-0.19.8" / "z2_bf16_ws2"
MMENGINE = FIXTURES / "mmengine" / "run" / "iter_1500.pth"  # global_steps 3, iteration 1500
Save = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two monolithic checkpoints whose names, steps and times disagree on purpose."""
    path = tmp_path / "run"
    shutil.copytree(FIXTURES / "monolithic" / "run", path)
    os.utime(path / "epoch_9_step_180.pt", (2_000_000_000, 2_000_000_000))
    return path


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """`save("run/a.pth", time, **values)`: a training checkpoint of one parameter, `optimizer=False` without
    optimizer, written at `time`."""

    def one(name: str, time: int, *, optimizer: bool = True, **values: object) -> Path:
        weight = torch.nn.Parameter(torch.ones(2))
        adam = torch.optim.AdamW([weight])
        weight.grad = torch.ones(2)
        adam.step()
        state: dict[str, object] = {"state_dict": {"weight": weight.data}, **values}
        if optimizer:
            state["optimizer"] = adam.state_dict()
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        os.utime(path, (time, time))
        return path

    return one


def names(folder: Path) -> list[str]:
    return [entry.path.relative_to(folder).as_posix() for entry in runs.find(folder)]


def test_the_step_inside_decides_and_time_that_disagrees_is_named(folder: Path) -> None:
    assert names(folder) == ["epoch_10_step_200.pt", "epoch_9_step_180.pt"]
    choice = runs.newest(folder)
    assert choice.path.name == "epoch_10_step_200.pt" and "step 200" in choice.why
    (note,) = choice.notes
    assert "modification time" in note and "epoch_9_step_180.pt (step 180)" in note
    ran = run("latest", folder)
    assert ran.out.strip() == str(choice.path) and note in ran.err
    assert json.loads(run("latest", folder, "--json").out)["notes"] == [note]


def test_a_name_that_disagrees_is_named(save: Save) -> None:
    new = save("run/epoch_7.pth", 3_000, global_step=700, epoch=7)
    save("run/epoch_9.pth", 2_000, global_step=500, epoch=5)
    choice = runs.newest(new.parent)
    assert choice.path == new
    (note,) = choice.notes
    assert "number in its name" in note and "epoch_9.pth (step 500)" in note


def test_steps_are_not_compared_with_iterations(save: Save, tmp_path: Path) -> None:
    """MMEngine with DeepSpeed: a folder counts both, a single file beside it iterations only."""
    shutil.copytree(MMENGINE, tmp_path / "run" / MMENGINE.name)
    for path in (tmp_path / "run" / MMENGINE.name).iterdir():
        os.utime(path, (1_000, 1_000))
    save("run/epoch_1.pth", 2_000, meta={"epoch": 1, "iter": 40}, message_hub={})
    choice = runs.newest(tmp_path / "run")
    assert choice.path.name == MMENGINE.name and "iteration 1500" in choice.why
    assert "epoch_1.pth (iteration 40)" in choice.notes[0]


def test_a_file_without_optimizer_is_not_preferred(save: Save) -> None:
    whole = save("run/step_100.pt", 1_000, global_step=100)
    best = save("run/best.pt", 2_000, optimizer=False, global_step=120)
    choice = runs.newest(whole.parent)
    assert choice.path == whole
    assert [path for path, _ in choice.passed_over] == [best] and "no optimizer" in choice.passed_over[0][1]
    ran = run("latest", whole.parent, "--verified")
    assert ran.code == 0 and ran.out.strip() == str(whole) and "passed over" in ran.err
    whole.unlink()
    assert runs.newest(best.parent).path == best
    assert run("latest", best.parent, "--verified").out.strip() == str(best)


def test_without_any_counter_names_then_times_decide(save: Save) -> None:
    for number, time in ((9, 3_000), (10, 2_000), (8, 1_000)):
        save(f"run/part_{number}.pt", time)
    other = save("run/other.pt", 2_500)
    assert names(other.parent) == ["other.pt", "part_10.pt", "part_9.pt", "part_8.pt"]
    other.unlink()
    choice = runs.newest(other.parent)
    assert choice.path.name == "part_10.pt" and "by its name" in choice.why
    assert "part_9.pt (?)" in choice.notes[0]


def test_a_damaged_one_keeps_its_place_and_is_passed_over(save: Save) -> None:
    for step in (100, 200, 300):
        save(f"run/iter_{step}.pth", step, global_step=step)
    middle = save("run/iter_200.pth", 200, global_step=200)
    os.truncate(middle, 300)
    assert names(middle.parent) == ["iter_300.pth", "iter_200.pth", "iter_100.pth"]
    assert runs.newest(middle.parent).passed_over == ()
    os.truncate(middle.parent / "iter_300.pth", 300)
    choice = runs.newest(middle.parent)
    assert choice.path.name == "iter_100.pth"
    assert [path.name for path, _ in choice.passed_over] == ["iter_300.pth", "iter_200.pth"]
    assert all("file-truncated" in reason for _, reason in choice.passed_over)


def test_pointers_win_and_may_be_stale_paths(folder: Path) -> None:
    (folder / "last_checkpoint").write_text("/somewhere/else/run/epoch_9_step_180.pt")
    choice = runs.newest(folder)
    assert choice.path == folder / "epoch_9_step_180.pt" and "beside the pointer" in choice.why
    assert "epoch_10_step_200.pt is newer (step 200)" in choice.notes[0]
    (folder / "last_checkpoint").write_text(str(folder / "epoch_9_step_180.pt"))
    assert "beside the pointer" not in runs.newest(folder).why  # where it says
    for text in ("epoch_11.pt", "..", " ", "a\nb"):
        (folder / "last_checkpoint").write_text(text)
        ran = run("latest", folder)
        assert ran.code == 1 and "error[pointer-dangling]" in ran.err, text


def test_two_pointers_that_disagree(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(SAMPLE, folder)
    tag = (folder / "latest").read_text()
    shutil.copytree(folder / tag, folder / "again.pth")
    (folder / "last_checkpoint").write_text("again.pth")
    choice = runs.newest(folder)
    assert choice.path.name == "again.pth"
    assert f"last_checkpoint names again.pth, latest names {tag}" in choice.notes


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


def test_copies_that_ckpt_makes_are_no_points_of_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(SAMPLE, folder)
    tag = (folder / "latest").read_text()
    for args in (["reshard", "--world-size", "4"], ["rebase-schedule", "--new-bs", "1"]):
        ran = run(args[0], folder / tag, *args[1:])
        assert ran.code == 0, ran.err
        assert Path(ran.out.strip()).parent == folder
    for name in ("ws4", "bs1", "weights"):  # as the first versions named them
        shutil.copytree(folder / tag, folder / f"{tag}.{name}")
    assert names(folder) == [tag]
    for options in ([], ["--verified"]):
        assert run("latest", folder, *options).out.strip() == str(folder / tag)
        (folder / "latest").unlink(missing_ok=True)
        assert run("latest", folder, *options).out.strip() == str(folder / tag)


def test_several_tags_are_a_run_and_one_is_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    shutil.copytree(SAMPLE, folder)
    assert names(tmp_path / "runs") == ["a"]
    tag = (folder / "latest").read_text()
    shutil.copytree(folder / tag, folder / "global_step1")
    assert sorted(names(tmp_path / "runs")) == ["a/global_step1", f"a/{tag}"]


@pytest.mark.parametrize(
    "inside",
    [
        "output/cars/pv_rcnn/first/ckpt/checkpoint_epoch_{}.pth",
        "lightning_logs/version_0/checkpoints/epoch={}-step=9.ckpt",
        "work_dirs/exp/20261120_172519/epoch_{}.pth",
    ],
)
def test_experiments_are_found_in_their_folders(inside: str, save: Save, tmp_path: Path) -> None:
    for epoch in (9, 10):
        save(inside.format(epoch), epoch, epoch=epoch)
    top = tmp_path / inside.split("/", 1)[0]
    assert [Path(name).name for name in names(top)] == [Path(inside.format(e)).name for e in (10, 9)]
    ran = run("latest", top)
    assert ran.code == 0 and ran.out.strip() == str(tmp_path / inside.format(10))
    forecast = json.loads(run("resume-check", top, "--json").out)
    assert forecast["path"] == str(tmp_path / inside.format(10))


def test_of_several_runs_the_newest_is_taken_and_said(save: Save, tmp_path: Path) -> None:
    old = save("logs/version_9/checkpoints/a.ckpt", 2_000, epoch=5)
    new = save("logs/version_10/checkpoints/a.ckpt", 1_000, epoch=1)
    assert names(tmp_path / "logs") == ["version_10/checkpoints/a.ckpt", "version_9/checkpoints/a.ckpt"]
    choice = runs.newest(tmp_path / "logs")
    assert choice.path == new
    assert "2 runs" in choice.notes[0] and "version_9/checkpoints was written later" in choice.notes[0]
    (old.parent / "last_checkpoint").write_text("gone.ckpt")  # another run's pointer is not followed
    assert runs.newest(tmp_path / "logs").path == new


def test_an_unfinished_save_of_the_trainer_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(FIXTURES / "hf-trainer" / "plain", folder)
    (folder / "checkpoint-4" / "checkpoint-is-incomplete.txt").touch()
    shutil.copytree(FIXTURES / "hf-trainer" / "plain" / "checkpoint-4", folder / "tmp-checkpoint-6")
    choice = runs.newest(folder)
    assert choice.path.name == "checkpoint-2"
    assert {path.name for path, _ in choice.passed_over} == {"checkpoint-4", "tmp-checkpoint-6"}
    for path, _ in choice.passed_over:
        assert [f.id for f in verify(path, quick=True).findings if f.severity == ERROR] == ["save-unfinished"]


def test_a_save_of_the_trainer_without_what_it_writes_last(tmp_path: Path) -> None:
    """Killed after optimizer.pt: a resume would load it, and begin at step 0."""
    folder = tmp_path / "out"
    shutil.copytree(FIXTURES / "hf-trainer" / "plain", folder)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    choice = runs.newest(folder)
    assert choice.path.name == "checkpoint-2"
    assert "save-unfinished" in choice.passed_over[0][1]
    (found,) = (f for f in verify(folder / "checkpoint-4").findings if f.severity == ERROR)
    assert found.id == "save-unfinished" and "trainer_state.json" in found.why


@pytest.mark.parametrize("lost", ["model.safetensors", "optimizer.bin", "scheduler.bin"])
def test_one_of_several_parts_of_accelerates_save_is_gone(tmp_path: Path, lost: str) -> None:
    """load_state asks for each; the second of each is a copy of the first here."""
    folder = tmp_path / "checkpoint_1"
    shutil.copytree(FIXTURES / "accelerate" / "plain", folder)
    for name in ("model.safetensors", "optimizer.bin", "scheduler.bin"):
        stem, _, suffix = name.partition(".")
        shutil.copy(folder / name, folder / f"{stem}_1.{suffix}")
    assert verify(folder).ok
    (folder / lost).unlink()
    (found,) = (f for f in verify(folder).findings if f.severity == ERROR)
    assert found.id == "save-unfinished" and "_1." in found.why
    for place in (folder, tmp_path):
        assert [(e.path, e.problem and e.problem.id) for e in runs.find(place)] == [(folder, found.id)]


def test_the_trainers_zero_folder_without_what_it_writes_last(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(FIXTURES / "hf-trainer" / "deepspeed" / "checkpoint-4", folder)
    (folder / "trainer_state.json").unlink()
    assert [entry.path for entry in runs.find(folder)] == [folder]
    assert "save-unfinished" in {f.id for f in verify(folder).findings}


@pytest.mark.parametrize("name", ["accelerate/plain", "hf-trainer/deepspeed/checkpoint-4", "hf/sharded"])
def test_a_folder_that_is_one_checkpoint_is_its_own_newest(name: str) -> None:
    assert runs.newest(FIXTURES / name).path == FIXTURES / name
    assert [entry.path for entry in runs.find(FIXTURES / name)] == [FIXTURES / name]


def test_what_cannot_be_resumed_from_is_not_called_the_newest_without_a_word(
    save: Save, tmp_path: Path
) -> None:
    path = save("run/step_3.pt", 1_000, optimizer=False, global_step=3)
    save("run/step_2.pt", 1_000, optimizer=False, global_step=2)
    (note,) = runs.newest(path.parent).notes
    assert note.startswith("step_3.pt cannot be resumed from: it holds no optimizer state")
    save("run/step_2.pt", 1_000, global_step=2)
    assert runs.newest(path.parent).path.name == "step_2.pt" and not runs.newest(path.parent).notes
    for each in path.parent.iterdir():
        each.write_bytes(each.read_bytes()[:-200])
    (note,) = runs.newest(path.parent).notes
    assert "cannot be resumed from" in note and "file" in note


def test_equally_far_is_not_newer(save: Save) -> None:
    """The end of an epoch is a step, too: both are saved there."""
    path = save("run/iter_10.pth", 1_000, iter=10)
    save("run/epoch_1.pth", 2_000, iter=10)
    (path.parent / "last_checkpoint").write_text(path.name)
    choice = runs.newest(path.parent)
    assert choice.path == path and choice.notes == ()
    (path.parent / "last_checkpoint").unlink()
    save("run/epoch_2.pth", 1_500, iter=10)
    assert runs.newest(path.parent).notes == ()


def test_nothing_to_find(tmp_path: Path) -> None:
    for options in ([], ["--verified"]):
        ran = run("latest", tmp_path, *options)
        assert ran.code == 2 and "error[no-checkpoints]" in ran.err
        assert run("latest", tmp_path / "gone", *options).code == 2
