"""A checkpoint that changes while it is read: always one document, never called good or damaged for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Ran, ckpt_process, run
from support import FIXTURES

from ckpttools.operations.verify import verify_all

ZERO = FIXTURES / "deepspeed-0.19.8" / "z2_groups_ws2"
TAG = "global_step3"
SHARD = f"{TAG}/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"

CHANGES: dict[str, Callable[[Path], object]] = {
    "written to": lambda folder: os.utime(folder / SHARD, ns=(1, 1)),
    "longer": lambda folder: os.truncate(folder / SHARD, 10**6),
    "shorter": lambda folder: os.truncate(folder / SHARD, 1000),
    "vanishes": lambda folder: (folder / SHARD).unlink(),
    "appears": lambda folder: (folder / TAG / "zero_pp_rank_2_mp_rank_00_optim_states.pt").touch(),
    "another one": lambda folder: Path(shutil.copy(folder / SHARD, folder / "x")).replace(folder / SHARD),
    "all vanishes": lambda folder: shutil.rmtree(folder),
}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("before_last", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_it_is_read(
    change: str, before_last: int, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(ZERO, tmp_path / "run")
    ran = change_before(
        before_last, change, monkeypatch, folder, "verify", folder, "--json", *["--quick"] * quick
    )
    document = json.loads(ran.out)
    assert ran.code == 2 and "Traceback" not in ran.err, ran
    assert document["ok"] is False and "checkpoint-changing" in ran.out, ran


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", ["digest", "diff", "prove"])
def test_a_change_while_its_content_is_read(
    command: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No digest of a mixture, and no difference or damage that was never there."""
    folder = shutil.copytree(ZERO, tmp_path / "run")
    paths = [folder] if command == "digest" else [ZERO, folder]
    ran = change_before(2, change, monkeypatch, folder, command, *paths)
    assert (ran.code, ran.out) == (2, "") and "checkpoint-changing" in ran.err, ran


def change_before(
    before_last: int, change: str, monkeypatch: pytest.MonkeyPatch, folder: Path, *args: object
) -> Ran:
    """Right before one of the last reads: the first ones only find out which checkpoint is meant."""
    args = (*args, "--workers", "1")
    pread, preadv = os.pread, os.preadv
    reads = 0

    def count(at: int) -> None:
        nonlocal reads
        reads += 1
        if reads == at:
            CHANGES[change](folder)

    def watch(at: int) -> None:
        nonlocal reads
        reads = 0
        monkeypatch.setattr(os, "pread", lambda *args: (count(at), pread(*args))[1])
        monkeypatch.setattr(os, "preadv", lambda *args: (count(at), preadv(*args))[1])

    watch(0)
    assert run(*args).code == 0
    watch(reads - before_last)
    return run(*args)


@pytest.mark.parametrize("named", ["", TAG])
def test_another_tag_the_pointer_and_a_log_are_no_change(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(ZERO, tmp_path / "run")
    pread = os.pread

    def save(*args: int) -> bytes:
        (folder / "global_step9").mkdir(exist_ok=True)
        (folder / "global_step9" / "mp_rank_00_model_states.pt").write_bytes(b"half")
        (folder / "latest").write_text(TAG)
        with (folder / "train.log").open("a") as log:
            log.write("step\n")
        return pread(*args)

    monkeypatch.setattr(os, "pread", save)
    ran = run("verify", folder / named, "--json")
    assert ran.code == 0, ran


SAVES = """
import shutil, sys
from pathlib import Path
source, folder = map(Path, sys.argv[1:])
for step in range(10**9):
    tag = folder / f"global_step{step}"
    tag.mkdir()
    for file in sorted(source.iterdir()):
        with (tag / file.name).open("wb", buffering=0) as out:
            data = file.read_bytes()
            for at in range(0, len(data), 500):
                out.write(data[at : at + 500])
    (folder / "new").write_text(tag.name)
    (folder / "new").replace(folder / "latest")
    shutil.rmtree(folder / f"global_step{step - 2}", ignore_errors=True)
"""


REWRITES = """
import sys, time
from pathlib import Path
source, folder = map(Path, sys.argv[1:])
(folder / source.name).mkdir()
while True:
    for file in sorted(source.iterdir()):
        with (folder / source.name / file.name).open("wb", buffering=0) as out:
            data = file.read_bytes()
            for at in range(0, len(data), len(data) // 3):
                out.write(data[at : at + len(data) // 3])
        time.sleep(0.02)
    (folder / "latest").write_text(source.name)
"""


@pytest.mark.parametrize(("program", "codes"), [(SAVES, {0, 1, 2}), (REWRITES, {0, 2})])
def test_beside_a_process_that_saves(program: str, codes: set[int], tmp_path: Path) -> None:
    """Whatever moment it meets: one document, with an answer or with the reason why there is none."""
    folder = tmp_path / "run"
    folder.mkdir()
    saver = subprocess.Popen([sys.executable, "-c", program, str(ZERO / TAG), str(folder)])
    try:
        while not (folder / "latest").exists():
            assert saver.poll() is None
        said = Counter[int]()
        for _ in range(3):
            done = ckpt_process("verify", folder, "--json", "--quick")
            assert "Traceback" not in done.stderr and "[internal]" not in done.stderr, done
            assert isinstance(json.loads(done.stdout), dict), done
            said[done.returncode] += 1
        assert saver.poll() is None
    finally:
        saver.kill()
        saver.wait()
    assert said[2] and not set(said) - codes, said


WRITTEN: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "a part": lambda content: content[:3000],
    "over the old": lambda content: content[:3000] + bytes(len(content) - 3000),
}


@pytest.mark.parametrize("so_far", WRITTEN)
def test_a_file_that_is_about_to_be_written(
    so_far: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened by a save that was slow to go on: the same all the while that it was looked at."""
    folder = shutil.copytree(ZERO, tmp_path / "run")
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(WRITTEN[so_far](content))
    monkeypatch.setattr("time.sleep", lambda _: (folder / SHARD).write_bytes(content))
    ran = run("verify", folder, "--json")
    assert ran.code == 2 and json.loads(ran.out)["error"]["id"] == "checkpoint-changing"
    assert run("verify", folder).code == 0
    (folder / SHARD).write_bytes(WRITTEN[so_far](content))
    ran = run("resume-check", folder)  # may wait for it when it looks at the run
    assert ran.code == 0 or "checkpoint-changing" in ran.err, ran
    (folder / SHARD).write_bytes(WRITTEN[so_far](content))
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert run("verify", folder).code == 1  # nobody goes on
    os.utime(folder / SHARD, (1, 1))
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it is old: there is nothing to wait for"))
    assert run("verify", folder).code == 1


def test_a_listing_beside_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being written is passed over, and is no damage; what nobody writes to is."""
    folder = shutil.copytree(FIXTURES / "hf-trainer/plain", tmp_path / "run")
    file = next((folder / "checkpoint-4").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:100])
    for again in (file, folder / "checkpoint-4/new.safetensors"):  # goes on, or another file appears
        monkeypatch.setattr("time.sleep", lambda _, again=again: again.write_bytes(content))
        ran = run("ls", folder, "--json")
        (listed,) = json.loads(ran.out)["runs"]
        assert ran.code == 0 and listed["checkpoints"][0]["marks"] == ["not checked"], ran
        assert listed["checkpoints"][1]["marks"] == ["latest"], ran
        file.write_bytes(content[:100])
        ran = run("latest", folder)
        assert ran.out == f"{folder / 'checkpoint-2'}\n" and "checkpoint-changing" in ran.err, ran
        file.write_bytes(content[:100])
        again.unlink()
        file.write_bytes(content[:100])
    monkeypatch.setattr("time.sleep", lambda _: None)
    ran = run("ls", folder, "--json")
    assert ran.code == 1 and "damaged (headers)" in ran.out, ran


def test_a_checkpoint_that_a_clean_up_took_since_the_folder_was_listed(tmp_path: Path) -> None:
    for step in (1, 2):
        shutil.copytree(FIXTURES / "hf-trainer/plain/checkpoint-2", tmp_path / f"checkpoint-{step}")
    verdicts = verify_all(tmp_path)
    assert next(verdicts).ok
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    (finding,) = next(verdicts).findings
    assert finding.id == "checkpoint-changing"
