"""Writing to object stores: what appears is whole, and what is not whole is no checkpoint."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from benchmarks.synthetic import write_random
from commands import run
from stores.servers import Proxy, upload
from support import FIXTURES

import ckpttools
from ckpttools.siblings import MANIFEST, UNFINISHED

ZERO = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
COMMANDS: dict[str, tuple[object, ...]] = {
    "reshard": ("reshard", ZERO, "--world-size", 3),
    "extract": ("extract", ZERO, "--max-shard-size", "200B"),
    "one file": ("convert", ZERO, "--to", "pt"),
    "dcp": ("convert", ZERO, "--to", "dcp"),
    "universal": ("convert", ZERO, "--to", "universal"),
    "copy": ("copy", ZERO),
    "rebase": ("rebase-schedule", FIXTURES / "mmengine-deepspeed/iter_50.pth", "--old-bs", 8, "--new-bs", 4),
}


class Objects:
    """What a test has in the bucket, below a folder of its own."""

    def __init__(self, name: str) -> None:
        import obstore

        self.obstore, self.name = obstore, name
        self.store = obstore.store.from_url("s3://runs")

    def __str__(self) -> str:
        return f"s3://runs/{self.name}"

    def __truediv__(self, name: str) -> str:
        return f"{self}/{name}"

    def meta(self) -> dict[str, Any]:
        found = self.obstore.list(self.store, self.name).collect()
        return {meta["path"].removeprefix(f"{self.name}/"): meta for meta in found}

    def files(self, below: str = "") -> dict[str, bytes]:
        """All but manifests, which on this machine also hold a digest."""
        found = [name for name in self.meta() if name.startswith(below) and not name.endswith(MANIFEST)]
        return {name.removeprefix(below): bytes(self.get(name)) for name in found}

    def get(self, name: str) -> Any:
        return self.obstore.get(self.store, f"{self.name}/{name}").bytes()

    def put(self, name: str, data: bytes) -> None:
        self.obstore.put(self.store, f"{self.name}/{name}", data)


@pytest.fixture
def here(bucket: Any, request: pytest.FixtureRequest) -> Objects:
    return Objects(f"{request.node.name}-{time.monotonic_ns()}".translate({ord(c): "-" for c in "[] "}))


def uploads(endpoint: str, here: Objects) -> int:
    """How many uploads in parts are begun and not ended."""
    url = f"{endpoint}/runs?uploads"
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read()).count(f"<Key>{here.name}")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 MB in two ranks: files of more than one part."""
    folder = tmp_path_factory.mktemp("large") / "run"
    write_random(folder, 2_000_000)
    return folder


def local(words: tuple[object, ...], dst: Path) -> dict[str, bytes]:
    command, src, *options = words
    assert run(command, src, dst, *options, "-q").code == 0
    if dst.is_file():
        return {"": dst.read_bytes()}
    found = (path for path in dst.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(dst).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_bytes_that_a_disk_gets(name: str, here: Objects, tmp_path: Path) -> None:
    command, src, *options = COMMANDS[name]
    dst = here / ("x.pt" if name == "one file" else "x")
    ran = run(command, src, dst, *options)
    assert ran.code == 0 and ran.out == f"{dst}\n", ran
    found = {path.removeprefix(Path(dst).name).lstrip("/"): data for path, data in here.files().items()}
    assert found == local(COMMANDS[name], tmp_path / Path(dst).name)
    assert name == "copy" or any(path.endswith(MANIFEST) for path in here.meta())
    assert run("verify", dst).code == 0
    again = run(command, src, dst, *options)
    assert again.code == 2 and "error[destination-exists]" in again.err, again


def test_files_in_parts(large: Path, here: Objects, endpoint: str, tmp_path: Path) -> None:
    for words in (("convert", large, "--to", "pt"), ("reshard", large, "--world-size", 1)):
        name = tmp_path / f"{words[0]}.pt"
        ran = run(words[0], large, here / name.name, *words[2:], "-q", "--stats")
        assert ran.code == 0 and " MB sent (" in ran.err, ran
        want = {f"{name.name}/{path}".rstrip("/"): data for path, data in local(words, name).items()}
        found = here.files()
        assert max(map(len, want.values())) > 2 * 8 * 1024 * 1024
        assert all(found[path] == data for path, data in want.items())
    assert uploads(endpoint, here) == 0


def test_from_store_to_store(bucket: Any, here: Objects) -> None:
    there = upload(bucket, ZERO, f"{here.name}/source")
    assert run("reshard", there, here / "three", "--world-size", 3, "-q").code == 0
    assert run("copy", there, here / "copy", "-q").code == 0
    digests = {ckpttools.digest(place).digests.state for place in (ZERO, here / "three", here / "copy")}
    assert len(digests) == 1
    ran = run("copy", there, f"{there}/inside")
    assert ran.code == 2 and "error[destination-in-source]" in ran.err, ran


def test_what_force_replaces(here: Objects) -> None:
    assert run("reshard", ZERO, here / "x", "--world-size", 4, "-q").code == 0
    assert run("reshard", ZERO, here / "x", "--world-size", 2, "-q", "--force").code == 0
    assert sum("optim" in name for name in here.meta()) == 2
    assert run("verify", here / "x").code == 0
    here.put("x/notes.txt", b"mine")
    before = here.files()
    ran = run("reshard", ZERO, here / "x", "--world-size", 3, "--force")
    assert ran.code == 2 and "error[not-replaced]" in ran.err and "notes.txt" in ran.err, ran
    assert run("convert", ZERO, here / "x", "--to", "pt", "--force").code == 2
    assert here.files() == before


def killed(words: list[object], after: float, seen: Objects, file: str) -> None:
    """End the command `after` seconds after the first sign of it, or after it is through."""
    command = [sys.executable, "-m", "ckpttools.cli", *map(str, words), "-q"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(name.startswith(file) for name in seen.meta()):
            time.sleep(0.01)
        time.sleep(after)
        process.kill()


def kill_and_go_on(large: Path, here: Objects, rng: random.Random, want: dict[str, bytes], n: int) -> str:
    """What was there after the kill: "whole", "unfinished" or "nothing"."""
    dst = here / f"run{n}/x"
    words: list[object] = ["reshard", large, dst, "--world-size", 3]
    killed(words, rng.uniform(0, 1.2), here, f"run{n}/")
    found = {name: meta for name, meta in here.meta().items() if name.startswith(f"run{n}/")}
    ran = run("inspect", dst)
    if f"run{n}/x/{UNFINISHED}" in found:
        state = "unfinished"
        assert ran.code == 2 and "error[upload-unfinished]" in ran.err, ran
        for command in ("verify", "latest"):
            assert run(command, here / f"run{n}").code == 2
        assert run("inspect", f"{dst}/global_step1").code == 2
    else:
        state = "whole" if found else "nothing"
        assert ran.code == (0 if found else 2)
    if state != "whole":
        ran = run(*words)
        assert ran.code == 0, ran
    assert here.files(f"run{n}/x/") == want
    return state


def test_killed_and_run_again(large: Path, here: Objects, tmp_path: Path) -> None:
    want = local(("reshard", large, "--world-size", 3), tmp_path / "x")
    rng = random.Random(3)
    assert "unfinished" in {kill_and_go_on(large, here, rng, want, n) for n in range(2)}


@pytest.mark.heavy
def test_60_kills(large: Path, here: Objects, tmp_path: Path) -> None:
    want = local(("reshard", large, "--world-size", 3), tmp_path / "x")
    rng = random.Random()
    states = [kill_and_go_on(large, here, rng, want, n) for n in range(60)]
    assert states.count("unfinished") > 10


def fail_at(name: str) -> Any:
    return lambda method, path, n: "busy" if method in ("PUT", "POST") and name in path else ""


def test_a_store_that_fails_and_comes_back(
    large: Path, here: Objects, proxy: type[Proxy], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpttools.stores import remote

    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 1})
    words = ("reshard", large, here / "x", "--world-size", 2)
    proxy.fault = staticmethod(fail_at("rank_1_mp_rank"))
    ran = run(*words)
    assert ran.code == 2 and "error[write-failed]" in ran.err and "goes on" in ran.err, ran
    assert os.environ["AWS_ACCESS_KEY_ID"] not in ran.err and "http" not in ran.err
    assert uploads(endpoint, here) == 0
    assert run("inspect", here / "x").code == 2
    finished = {name: meta["last_modified"] for name, meta in here.meta().items()}
    assert len(finished) > 1
    other = run("reshard", large, here / "x", "--world-size", 3)
    assert other.code == 2 and "error[destination-exists]" in other.err, other
    proxy.fault = staticmethod(lambda method, path, n: "")
    ran = run(*words)
    assert ran.code == 0 and "went on" in ran.err, ran
    now = {name: meta["last_modified"] for name, meta in here.meta().items()}
    finished.pop(f"x/{UNFINISHED}")
    assert finished.items() <= now.items(), "a finished file was sent again"
    assert run("verify", here / "x").code == 0


def test_a_busy_store_is_asked_again(large: Path, here: Objects, proxy: type[Proxy]) -> None:
    proxy.fault = staticmethod(lambda method, path, n: "busy" if method == "PUT" and n % 3 == 2 else "")
    assert run("reshard", large, here / "x", "--world-size", 2, "-q").code == 0
    assert run("verify", here / "x").code == 0


def test_what_changes_on_its_way_is_found(here: Objects, proxy: type[Proxy], large: Path) -> None:
    proxy.fault = staticmethod(
        lambda method, path, n: "flipped" if "rank_1" in path and method == "PUT" else ""
    )
    ran = run("reshard", large, here / "x", "--world-size", 2)
    assert ran.code == 2 and "is not what was written" in ran.err, ran
    assert not here.meta()


def test_two_that_write_the_same_place(here: Objects, proxy: type[Proxy]) -> None:
    proxy.latency = 0.1
    commands = [
        [sys.executable, "-m", "ckpttools.cli", "reshard", str(ZERO), here / "x", "--world-size", str(n)]
        for n in (2, 3)
    ]
    both = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    assert run("verify", here / "x").code == 0
    ranks = 2 + codes.index(0)
    assert sum("optim" in name for name in here.meta()) == ranks


def test_a_source_that_is_damaged(here: Objects, tmp_path: Path, large: Path) -> None:
    shutil.copytree(large, tmp_path / "run")
    shard = max(tmp_path.rglob("*optim_states.pt"))
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(b"?!")
    ran = run("reshard", tmp_path / "run", here / "x", "--world-size", 3)
    assert ran.code == 1 and "error[checksum]" in ran.err, ran
    assert not here.meta()


def test_force_that_was_ended_goes_on_to_replace(
    large: Path, here: Objects, proxy: type[Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpttools.stores import remote

    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 0})
    assert run("reshard", large, here / "x", "--world-size", 4, "-q").code == 0
    words = ("reshard", large, here / "x", "--world-size", 2, "--force", "-q")
    proxy.fault = staticmethod(fail_at("rank_1_mp_rank"))
    assert run(*words).code == 2
    proxy.fault = staticmethod(lambda method, path, n: "")
    assert run(*words).code == 0
    assert sum("optim" in name for name in here.meta()) == 2
    assert run("verify", here / "x").code == 0
