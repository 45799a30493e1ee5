"""A copy is every byte of it, or nothing, and goes on where it was ended."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from benchmarks.synthetic import write_random
from commands import run as ckpt
from support import FIXTURES

from ckpttools.errors import UsageError
from ckpttools.launch import Worker
from ckpttools.operations.convert import convert
from ckpttools.operations.writing import Writing
from ckpttools.siblings import MANIFEST, SPREAD
from ckpttools.stores.files import named

copying = importlib.import_module("ckpttools.operations.copy")
ZERO2 = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
SOURCES = {
    "run with latest": ZERO2,
    "tag": ZERO2 / "global_step3",
    "bundle": FIXTURES / "bundle/checkpoint-200",
    "universal": FIXTURES / "deepspeed-0.19.8/z3_bf16_ws2",
    "single file": FIXTURES / "monolithic",
}


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", SOURCES)
def test_every_byte(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    if name == "single file":
        source = next(path for path in sorted(source.rglob("*.pt*")) if path.is_file())
    ran = ckpt("copy", source, tmp_path / "safe")
    assert ran.code == 0 and ran.out == f"{tmp_path / 'safe'}\n", ran
    assert contents(tmp_path / "safe") == contents(source)
    assert [path.name for path in tmp_path.iterdir()] == ["safe"]


def test_a_manifest_comes_along_and_is_held(tmp_path: Path) -> None:
    shutil.copytree(ZERO2, tmp_path / "run")
    assert ckpt("verify", tmp_path / "run", "--write-manifest").code == 0
    ran = ckpt("copy", tmp_path / "run", tmp_path / "safe")
    assert ran.code == 0 and "files are what the manifest says" in ran.err
    assert contents(tmp_path / "safe") == contents(tmp_path / "run")
    assert ckpt("verify", tmp_path / "safe").code == 0
    (place,) = (tmp_path / "run").rglob(MANIFEST)
    text = place.read_text()
    digest = text.partition('"xxh3_128": "')[2][:32]
    place.write_text(text.replace(digest, "0" * 32, 1))
    ran = ckpt("copy", tmp_path / "run", tmp_path / "again")
    assert ran.code == 1 and "error[manifest-mismatch]" in ran.err and not (tmp_path / "again").exists()


def test_a_damaged_source_is_not_copied(tmp_path: Path) -> None:
    shutil.copytree(ZERO2, tmp_path / "run")
    (shard,) = (tmp_path / "run").rglob("*rank_1_mp*optim_states.pt")
    data = bytearray(shard.read_bytes())
    at = data.find(b"/data/1")  # the bytes of a storage follow its name
    data[at + 200] ^= 1
    shard.write_bytes(data)
    ran = ckpt("copy", tmp_path / "run", tmp_path / "safe")
    assert ran.code == 1 and "error[" in ran.err, ran
    assert not (tmp_path / "safe").exists()
    shard.write_bytes(data[:-100])
    assert ckpt("copy", tmp_path / "run", tmp_path / "safe").code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_an_ended_copy_of_something_else_left(tmp_path: Path) -> None:
    """The source was written again since: the copy begins anew; not while another one is at it."""
    shutil.copytree(ZERO2, tmp_path / "run")
    source, dst = named(str(tmp_path / "run")), tmp_path / "safe"

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    def meanwhile(*_: object) -> None:
        shutil.copytree(ZERO2, tmp_path / "run", dirs_exist_ok=True, copy_function=shutil.copyfile)
        ran = ckpt("copy", source, dst)
        assert ran.code == 2 and "error[destination-exists]" in ran.err and "another process" in ran.err, ran
        raise KeyboardInterrupt

    for each in (ended, meanwhile):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(copying, "_read_back", each)
            copying.copy(source, dst)
        assert (tmp_path / f"safe{SPREAD}").exists() and not dst.exists()
    ran = ckpt("copy", source, dst)
    assert ran.code == 0 and "an ended copy of something else" in ran.err, ran
    assert contents(dst) == contents(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "safe"]


def test_what_an_ended_copy_of_another_file_left(tmp_path: Path) -> None:
    """A staged file goes as well as a staged folder."""
    one, other = FIXTURES / "monolithic/model/step_30.pt", FIXTURES / "monolithic/full/epoch_2_step_40.pt"
    dst = tmp_path / "safe.pt"

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(copying, "_read_back", ended)
        copying.copy(one, dst)
    ran = ckpt("copy", other, dst)
    assert ran.code == 0 and "an ended copy of something else" in ran.err, ran
    assert dst.read_bytes() == other.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["safe.pt"]


def test_a_copy_leaves_the_work_of_a_spread_job_alone(tmp_path: Path) -> None:
    """Workers of another command may be at it, on any machine: refused, and the second time, too."""
    how = Writing(spread=Worker(0, 2, waits=False))
    convert(ZERO2, tmp_path / "safe", to="zero1", world_size=2, how=how)
    before = contents(tmp_path / f"safe{SPREAD}")
    assert before and not (tmp_path / "safe").exists()
    for _ in range(2):
        ran = ckpt("copy", ZERO2, tmp_path / "safe")
        assert ran.code == 2 and "error[other-plan]" in ran.err, ran
        assert contents(tmp_path / f"safe{SPREAD}") == before


def test_a_copy_that_failed_is_over(tmp_path: Path) -> None:
    """Also while its error is looked at, in the same process."""

    def failed(*_: object) -> None:
        raise UsageError("disk-full", "no space left")

    source, dst = FIXTURES / "torch-writers/2.8.0/weights.pt", tmp_path / "safe.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_read_back", failed)
        with pytest.raises(UsageError) as error:
            copying.copy(source, dst)
    assert copying.copy(source, dst).destination == dst and error.value.id == "disk-full"


def test_an_ended_copy_goes_on(tmp_path: Path) -> None:
    write_random(tmp_path / "run", 20_000_000 // 14)
    command = [sys.executable, "-m", "ckpttools.cli", "copy", str(tmp_path / "run"), str(tmp_path / "safe")]
    ledger = tmp_path / f"safe{SPREAD}" / "ledger"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(ledger.glob("piece-*"))) < 5:
            time.sleep(0.001)
        process.kill()
    if (tmp_path / "safe").exists():
        pytest.skip("it was faster")
    assert len(list(ledger.glob("piece-*"))) >= 5
    # what the ledger calls finished is not written again: a finished byte that is changed comes out so
    (out,) = (path for path in ledger.parent.iterdir() if path.name.startswith("out-"))
    first = min(path for path in out.rglob("*") if path.is_file())
    with first.open("r+b") as file:
        file.write(b"?")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "error[write-failed]" in done.stderr
    finished = {path.name: path.stat().st_ino for path in ledger.glob("piece-*")}
    assert len(finished) >= 15 and "piece-0.json" not in finished, "what is on record there is not true"
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "safe") == contents(tmp_path / "run")
    assert not ledger.parent.exists()


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine").touch()
    for dst, words, id in (
        (tmp_path / "there", (), "destination-exists"),
        (tmp_path / "there", ("--force",), "not-replaced"),
        (ZERO2 / "inside", (), "destination-in-source"),
        (tmp_path / "no/folder", (), "destination-parent"),
    ):
        for more in ((), ("--dry-run",)):
            ran = ckpt("copy", ZERO2, dst, *words, *more)
            assert ran.code == 2 and f"error[{id}]" in ran.err, ran
    assert ckpt("copy", tmp_path / "nothing", tmp_path / "x").code == 2
    ran = ckpt("copy", ZERO2, tmp_path / "dry", "--dry-run")
    assert ran.code == 0 and "4 files" in ran.out and not (tmp_path / "dry").exists()
    assert (tmp_path / "there/mine").exists()


def test_links_between_folders_end(tmp_path: Path) -> None:
    shutil.copytree(ZERO2, tmp_path / "run")
    tag = next(path for path in (tmp_path / "run").iterdir() if path.is_dir())
    (tmp_path / "run/last").symlink_to(tag.name)
    assert ckpt("copy", tmp_path / "run", tmp_path / "twice").code == 0  # a link is what it leads to
    assert contents(tmp_path / "twice/last") == contents(tag)
    (tag / "loop").symlink_to(".")
    (tag / "again").symlink_to("..")
    ran = ckpt("copy", tmp_path / "run", tmp_path / "never")
    assert ran.code == 1 and "error[link-loop]" in ran.err and not (tmp_path / "never").exists()


def test_every_file_that_is_copied_is_checked(tmp_path: Path) -> None:
    """Those beside the weights, too: optimizer, scheduler, random states."""
    good = FIXTURES / "hf-trainer/plain/checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt"):
        for damage in ("cut", "flip", "empty"):
            source = tmp_path / f"{name} {damage}"
            shutil.copytree(good, source)
            data = bytearray((source / name).read_bytes())
            with zipfile.ZipFile(source / name) as archive:
                record = max(archive.infolist(), key=lambda info: info.file_size)
            data[record.header_offset + 200] ^= 1
            (source / name).write_bytes({"cut": data[:-300], "flip": data, "empty": b""}[damage])
            ran = ckpt("copy", source, tmp_path / "copy")
            assert ran.code == 1 and name in ran.err and not (tmp_path / "copy").exists(), ran
    assert ckpt("copy", good, tmp_path / "a b").out.strip().endswith("a b")
    assert f"next: ckpt verify '{tmp_path / 'a b'}'" in ckpt("copy", good, tmp_path / "a b", "--force").err
