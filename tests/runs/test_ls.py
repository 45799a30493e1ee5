"""ckpt ls: what each checkpoint is, and that `<- latest` is what ckpt latest and the library itself take."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from commands import run
from run_folders import Folder, One
from support import FIXTURES

from ckpttools.runs import Entry
from ckpttools.trainer.search import search

KEYS = {"path", "kind", "format", "step", "epoch", "samples", "nbytes", "ranks", "marks", "metrics"}
REAL = [
    "hf-trainer/plain", "hf-trainer/deepspeed", "hf-trainer/peft", "lightning/file", "lightning/deepspeed",
    "mmengine/run", "trainer/z2_bf16_2", "trainer/z1_bf16_2", "monolithic/run", "accelerate/plain",
]  # fmt: skip


def listed(folder: Path, *options: str) -> list[dict[str, object]]:
    ran = run("ls", folder, "--json", *options)
    document = json.loads(ran.out)
    assert set(document) == {"ok", "runs"} and all(
        set(r) == {"path", "checkpoints"} for r in document["runs"]
    )
    found = [each for one in document["runs"] for each in one["checkpoints"]]
    assert all(set(each) == KEYS for each in found)
    return found


def latest_of(folder: Path) -> list[object]:
    return [each["path"] for each in listed(folder) if "latest" in each["marks"]]  # type: ignore[operator]


@pytest.mark.parametrize("name", REAL)
def test_latest_is_what_ckpt_latest_says(name: str) -> None:
    folder = FIXTURES / name
    taken = run("latest", folder).out.strip()
    (marked,) = latest_of(folder)
    assert Path(str(marked)).resolve() == Path(taken).resolve()
    asked, short = (re.sub(r"\d+ (s|min|h|d)\b", "AGE", run(*words, folder).out) for words in (["ls"], []))
    assert asked == short and "<- latest" in asked


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("name", ["hf-trainer/plain", "accelerate/plain"])
def test_a_folder_that_lost_its_weights_is_damaged(name: str, configured: bool, tmp_path: Path) -> None:
    """Not gone: its optimizer, random states and counters are still there."""
    run_folder = tmp_path / "run"
    if name.startswith("hf"):
        shutil.copytree(FIXTURES / name, run_folder)
    else:
        shutil.copytree(FIXTURES / name, run_folder / "checkpoint_0")
        shutil.copytree(FIXTURES / name, run_folder / "checkpoint_1")
    before = listed(run_folder)
    newest = sorted(run_folder.iterdir())[-1]
    (newest / "model.safetensors").unlink()
    if not configured:
        (newest / "config.json").unlink(missing_ok=True)
    found = listed(run_folder)
    assert len(found) == len(before)
    (lost,) = [each for each in found if each["marks"] == ["damaged (headers)"]]
    assert Path(str(lost["path"])).name == newest.name
    assert run("verify", run_folder).code == 1
    assert "no-weights" in run("verify", newest).out


def test_latest_is_what_the_trainer_resumes_from(tmp_path: Path) -> None:
    utils = pytest.importorskip("transformers.trainer_utils")
    folder = tmp_path / "out"
    shutil.copytree(FIXTURES / "hf-trainer" / "plain", folder)
    shutil.copy(folder / "checkpoint-4" / "model.safetensors", folder)  # save_model at the end
    shutil.copy(folder / "checkpoint-4" / "config.json", folder)
    marked = latest_of(folder)
    assert marked == [utils.get_last_checkpoint(str(folder))]


def test_latest_is_what_the_reference_trainer_resumes_from() -> None:
    folder = FIXTURES / "trainer" / "z2_bf16_2"
    (marked,) = latest_of(folder)
    found = search(folder)
    assert found.path is not None and Path(str(marked)).resolve() == found.path.resolve()


def test_marks_and_order(tmp_path: Path) -> None:
    folder = Folder(tuple(One("", "iter", step, torn=step == 12) for step in (3, 10, 9, 12))).make(tmp_path)
    os.utime(folder / "iter_3.pth", (2_000_000_000, 2_000_000_000))
    ran = run("ls", folder)
    assert ran.code == 1 and "damaged (headers)" in ran.out
    assert "modification time iter_3.pth" in ran.err
    names = [Path(str(each["path"])).name for each in listed(folder)]
    assert names == ["iter_12.pth", "iter_10.pth", "iter_9.pth", "iter_3.pth"]
    by_time = [Path(str(each["path"])).name for each in listed(folder, "--sort", "time")]
    assert by_time[0] == "iter_3.pth"
    torn, newest, best, _ = listed(folder)
    assert torn["step"] is None and torn["ranks"] is None
    assert newest["marks"] == ["latest"] and newest["step"] == 10 and newest["kind"] == "step"
    assert best["marks"] == ["best"] and best["metrics"]["val_loss"] == 0.9  # type: ignore[index]
    verified = listed(folder, "--verify")
    assert verified[0]["marks"] == ["damaged"] and all("verified" in each["marks"] for each in verified[1:])  # type: ignore[operator]


def test_an_optimizer_that_is_not_joined_is_not_called_missing() -> None:
    ran = run("ls", FIXTURES / "verl/actor_ws2")  # optim_world_size_2_rank_*.pt lie there
    assert ran.code == 0 and "weights only" not in ran.out
    for command in ("ls", "latest"):
        assert "no optimizer state" not in run(command, FIXTURES / "verl/actor_ws2").err
    assert "weights only" in run("ls", FIXTURES / "hf/single").out


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = Folder((One("\x1b[31m\u202e", "iter", 3),)).make(tmp_path)
    out = run("ls", folder, "--tree").out
    assert "\x1b" not in out and "\u202e" not in out


def test_a_name_too_long_for_a_pin_hides_no_other(tmp_path: Path) -> None:
    """Beside it, a file with that name in its own may not be looked up."""
    long = "x" * 250
    for name in ("checkpoint-2", long):
        shutil.copytree(FIXTURES / "hf-trainer/plain/checkpoint-2", tmp_path / name)
    ran = run("ls", tmp_path)
    assert ran.code == 0 and long in ran.out and "checkpoint-2" in ran.out, ran.err
    assert run("prune", tmp_path, "--keep-last", 1, "--dry-run").code == 0


def test_headers_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of a header at most some times, and nothing of the tensors."""
    import torch

    folder = tmp_path / "run"
    folder.mkdir()
    for step in range(3):
        state = {"a.weight": torch.zeros(1_000_000)}
        torch.save({"state_dict": state, "global_step": step}, folder / f"iter_{step}.pth")
    seen: Counter[str] = Counter()
    pread = os.pread

    def counted(fd: int, n: int, at: int) -> bytes:
        data = pread(fd, n, at)
        seen["bytes"] += len(data)
        return data

    monkeypatch.setattr(os, "pread", counted)
    assert len(listed(folder)) == 3
    assert 0 < seen["bytes"] < 3 * 40_000


@pytest.mark.parametrize("name", ["hf-trainer/plain/checkpoint-4", "deepspeed-0.19.8/z2_bf16_ws2"])
def test_a_folder_is_listed_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand checkpoints are many folders; formats and frameworks all ask for the same names."""
    for at in range(1, 4):
        shutil.copytree(FIXTURES / name, tmp_path / f"checkpoint-{at}")
    seen: Counter[str] = Counter()
    scandir = os.scandir

    def counted(path: str) -> object:
        seen[os.path.relpath(path, tmp_path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    assert len(listed(tmp_path)) == 3
    assert max(seen[f"checkpoint-{at}"] for at in range(1, 4)) == 1, seen


def test_an_entry_is_public() -> None:
    assert Entry.__doc__


def test_metrics_are_the_trainers_last_ones(tmp_path: Path) -> None:
    folder = Folder((One("", "hf", 2), One("", "hf", 4))).make(tmp_path)
    state = folder / "checkpoint-4" / "trainer_state.json"
    history = [
        {"step": 1, "loss": 3.5, "learning_rate": 0.1},
        {"step": 2, "eval_loss": 2.5, "eval_accuracy": 0.25, "eval_runtime": 1.0},
        {"step": 4, "loss": 1.5, "eval_accuracy": 0.75, "eval_samples_per_second": 9.0},
    ]
    state.write_text(json.dumps(json.loads(state.read_text()) | {"log_history": history}))
    newest = listed(folder)[0]
    assert newest["metrics"] == {"loss": 1.5, "eval_loss": 2.5, "eval_accuracy": 0.75}
    assert "eval_accuracy 0.75" in run("ls", folder).out


def test_a_damaged_optimizer_is_seen_in_the_headers(tmp_path: Path) -> None:
    folder = Folder((One("", "hf", 2), One("", "hf", 4))).make(tmp_path)
    os.truncate(folder / "checkpoint-4" / "optimizer.pt", 500)
    ran = run("ls", folder)
    assert ran.code == 1 and "damaged (headers)" in ran.out
    newest, older = listed(folder)
    assert newest["marks"] == ["damaged (headers)"] and newest["step"] == 4 and older["marks"] == ["latest"]


def test_a_tree_begins_with_its_root_and_has_no_empty_line(tmp_path: Path) -> None:
    for name in ("a/one", "a/two", "b"):
        shutil.copytree(FIXTURES / "hf-trainer" / "plain", tmp_path / "top" / name)
    lines = run("ls", tmp_path / "top", "--tree").out.splitlines()
    assert lines[0] == f"{tmp_path / 'top'}/" and all(lines)
    assert [line for line in lines if line.endswith("/")] == [
        lines[0],
        "  a/",
        "    one/",
        "    two/",
        "  b/",
    ]
    alone = run("ls", tmp_path / "top/b", "--tree").out.splitlines()
    assert alone[0] == f"{tmp_path / 'top/b'}/" and alone[1].startswith("  name")


def test_what_lost_all_optimizer_files_is_damaged_in_every_listing(tmp_path: Path) -> None:
    """Stage 0 has none of them either: which one it is, the file of the model says."""
    folder = tmp_path / "run"
    shutil.copytree(FIXTURES / "trainer" / "z2_bf16_2", folder)
    (tag,) = folder.glob("*.pth")
    whole = folder / "iter_000001.pth"
    shutil.copytree(tag, whole)
    for path in tag.glob("*optim_states.pt"):
        path.unlink()
    assert run("verify", tag, "--quick").code == 1
    (lost,) = (each for each in listed(folder) if each["path"] == str(tag))
    assert lost["marks"] == ["latest", "damaged (headers)"] or lost["marks"] == ["damaged (headers)"]
    for words in (("ls", folder), ("runs", folder), ("report", folder, "-o", tmp_path / "a.html")):
        assert run(*words).code == 1, words
        ran = run(*words, "--json", *(["--force"] if words[0] == "report" else []))
        assert ran.code == 1 and json.loads(ran.out)["ok"] is False, words
    assert f"{tag} is damaged" in run("runs", folder).err


def test_links_that_are_not_followed_are_named(tmp_path: Path) -> None:
    """Experiments are often links to another disk."""
    work, elsewhere = tmp_path / "work", tmp_path / "disk"
    work.mkdir()
    shutil.copytree(FIXTURES / "hf-trainer" / "plain", elsewhere)
    (work / "exp\n1").symlink_to(elsewhere)
    for command in ("ls", "latest"):
        ran = run(command, work)
        assert ran.code == 2 and "not followed: exp\\n1" in ran.err and "what the link leads to" in ran.err
    shutil.copytree(elsewhere, work / "own")
    ran = run("ls", work)
    assert ran.code == 0 and "note: exp\\n1 is a link, which is not followed: ckpt ls" in ran.err


def test_a_pointer_may_name_what_lies_elsewhere(tmp_path: Path) -> None:
    """MMEngine's CheckpointHook with out_dir: find_latest_checkpoint gives the path as it stands."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere" / "work"
    work.mkdir()
    elsewhere.mkdir(parents=True)
    (saved,) = (FIXTURES / "monolithic" / "mmengine").glob("*.pth")
    shutil.copy(saved, elsewhere)
    (work / "last_checkpoint").write_text(str(elsewhere / saved.name))
    ran = run("latest", work)
    assert (ran.code, ran.out.strip()) == (0, str(elsewhere / saved.name)) and "elsewhere" in ran.err
    ran = run("ls", work)
    assert ran.code == 2 and "last_checkpoint names lies elsewhere" in ran.err and "ckpt latest" in ran.err
