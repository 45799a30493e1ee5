"""Reading from object stores: a real server of S3 (SeaweedFS), and servers that misbehave as told."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.synthetic import write_random
from commands import run
from stores.servers import KEY, SECRET, Files, Proxy, upload
from support import FIXTURES

import ckpttools
from ckpttools.errors import CkptError, UsageError
from ckpttools.stores.files import named, opened, stat

ZERO = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
CONFIG = Path(ckpttools.__file__).parent / "trainer/demo.yaml"
needs_obstore = pytest.mark.skipif(
    importlib.util.find_spec("obstore") is None, reason="obstore is not installed"
)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for command in ("inspect", "verify", "ls", "latest", "digest"):
        ran = run(command, "s3://bucket-without-extra/run")
        assert ran.code == 2 and "store-extra" in ran.err and "ckpttools[remote]" in ran.err, ran


@pytest.mark.parametrize(
    "place",
    [
        "foo://bucket/x",
        "s3://",
        "https://me:password@host/x",
        "https://host/x?sig=abc",
        "https://host?sig=abc",
    ],
)
def test_what_is_no_place_is_said(place: str) -> None:
    ran = run("inspect", place)
    assert ran.code == 2 and "error[store-unknown]" in ran.err, ran
    assert "password" not in ran.err.replace("holds a password", "") and "abc" not in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "s3://b/x", "--keep-last", 1),
        ("average", ZERO, ZERO, "-o", "s3://b/x"),
        ("demo", "s3://b/x"),
        ("train", CONFIG, "--work-dir", "s3://b/x"),
        ("train", CONFIG, "--resume-from", "s3://b/x"),
    ],
)
def test_what_is_only_done_on_this_machine(words: tuple[object, ...]) -> None:
    ran = run(*words)
    assert ran.code == 2 and "error[not-local]" in ran.err, ran


def test_a_file_that_is_named_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    shutil.copytree(ZERO, tmp_path / "s3:" / "run")
    assert run("verify", "./s3://run").code == 0


# --- S3 -----------------------------------------------------------------------------------------------


FOLDERS = [
    "deepspeed-0.19.8/z2_bf16_ws2", "deepspeed-0.19.8/z3_bf16_ws2", "dcp/fsdp2_ws2", "hf/sharded",
    "hf/bin_sharded", "hf-trainer/plain/checkpoint-4", "lightning/deepspeed",
]  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bucket_answers_as_a_disk(name: str, bucket: Any) -> None:
    path = FIXTURES / name
    there = upload(bucket, path, name)
    for words in (["inspect"], ["verify", "--quick"], ["verify"], ["digest", "--tensors"], ["ls"]):
        far, near = run(words[0], there, *words[1:]), run(words[0], path, *words[1:])
        assert far.code == near.code, (words, far, near)
        if words != ["ls"]:  # which shows the time
            assert far.out.replace(there, "X") == near.out.replace(str(path), "X"), words


def test_what_is_written_from_a_bucket(bucket: Any, tmp_path: Path) -> None:
    there = upload(bucket, ZERO, "written")
    ran = run("reshard", there, tmp_path / "three", "--world-size", 3, "-q")
    assert ran.code == 0, ran
    assert ckpttools.digest(tmp_path / "three").digests.state == ckpttools.digest(ZERO).digests.state
    assert run("extract", there, tmp_path / "w", "-q").code == 0
    assert run("convert", there, tmp_path / "all.pt", "--to", "pt", "-q").code == 0
    assert run("reshard", there, "--world-size", 3).code == 2


def test_a_header_takes_four_requests(bucket: Any, tmp_path: Path) -> None:
    from ckpttools.stores import remote

    path = tmp_path / "many.pt"
    torch.save({f"layer{i}.weight": torch.randn(100, 60) for i in range(300)}, path)
    bucket("many/many.pt", path.read_bytes())
    found = ckpttools.inspect("s3://runs/many/many.pt")
    requests, nbytes, _ = remote.used()
    # two folders above it are asked whether an upload to them is unfinished
    assert len(found) == 300 and requests <= 1 + 2 + 4, (requests, nbytes)
    assert nbytes < path.stat().st_size / 8
    ran = run("inspect", "s3://runs/many/many.pt", "--stats")
    assert "requests" in ran.err


def test_what_cannot_be_is_not_asked_for(bucket: Any, proxy: type[Proxy], tmp_path: Path) -> None:
    """Nothing lies below a file, and a manifest is no folder."""
    torch.save({f"layer{i}.weight": torch.randn(100, 60) for i in range(300)}, tmp_path / "many.pt")
    bucket("one/many.pt", (tmp_path / "many.pt").read_bytes())
    assert run("verify", "s3://runs/one/many.pt", "--quick").code == 0
    asked = [path for _, path in proxy.seen]
    assert not any("many.pt/" in path or "many.pt%2F" in path for path in asked), asked
    assert sum("manifest" in path for path in asked) == 2


def test_every_byte_once(bucket: Any, tmp_path: Path) -> None:
    from ckpttools.stores import remote

    path = tmp_path / "large.pt"
    torch.save({f"layer{i}.weight": torch.randn(1000, 700) for i in range(8)}, path)
    bucket("large.pt", path.read_bytes())
    assert ckpttools.verify("s3://runs/large.pt").ok
    assert remote.used()[1] < 1.3 * path.stat().st_size


def test_an_object_that_changes_while_it_is_read(bucket: Any, tmp_path: Path) -> None:
    torch.save(torch.randn(1000, 1000), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    bucket("changing.pt", data)
    place = named("s3://runs/changing.pt")
    with opened(place) as file:
        bucket("changing.pt", data[:-1] + b"!")
        with pytest.raises(CkptError) as caught:
            file.read(2_000_000, 100)
    assert "changed while it was read" in str(caught.value)


def test_what_is_missing_and_what_is_denied(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpttools.stores import remote

    assert "error[not-found]" in run("inspect", "s3://runs/none/at/all").err
    with pytest.raises(FileNotFoundError):
        stat(named("s3://runs/none"))
    monkeypatch.setattr(remote, "_buckets", {})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-secret")
    ran = run("inspect", "s3://runs/written")
    assert ran.code == 2 and "denies access" in ran.err, ran
    assert "AKIAWRONG" not in ran.err + ran.out and "hidden-secret" not in ran.err + ran.out


# --- S3, far away and in trouble ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 ranks, one file each, and the model's."""
    folder = tmp_path_factory.mktemp("shards") / "run"
    write_random(folder, 200_000, ranks=64)
    return folder


def test_64_shards_are_read_beside_each_other(shards: Path, bucket: Any, proxy: type[Proxy]) -> None:
    there = upload(bucket, shards, "shards")
    proxy.seen.clear()
    proxy.latency, proxy.most = 0.03, 0
    ran = run("inspect", there, "--stats")
    assert ran.code == 0 and "64 ranks" in ran.out, ran
    of_each = Counter(path for method, path in proxy.seen if method == "GET" and path.endswith(".pt"))
    assert len(of_each) == 65 and max(of_each.values()) <= 4, of_each
    assert len(proxy.seen) < 65 * 2 + 20, len(proxy.seen)
    assert 8 <= proxy.most <= 32 + 2
    assert "http" not in ran.err


TROUBLE = {
    "busy": lambda method, path, n: "busy" if method == "GET" and n % 4 == 1 else "",
    "torn": lambda method, path, n: "torn" if method == "GET" and n % 4 == 1 else "",
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_what_a_store_in_trouble_holds(kind: str, bucket: Any, proxy: type[Proxy]) -> None:
    there = upload(bucket, ZERO, f"trouble-{kind}")
    proxy.fault = staticmethod(TROUBLE[kind])
    assert ckpttools.digest(there).digests == ckpttools.digest(ZERO).digests
    assert run("verify", there).code == 0


@pytest.mark.parametrize("fault", ["torn", "denied"])
def test_what_never_comes_is_said_without_a_word_of_the_stores(
    fault: str, bucket: Any, proxy: type[Proxy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ckpttools.stores import remote

    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 0})
    there = upload(bucket, ZERO, f"never-{fault}")
    proxy.fault = staticmethod(lambda method, path, n: fault if method == "GET" and n > 3 else "")
    for words in (("verify", there), ("reshard", there, tmp_path / "x", "--world-size", 3)):
        ran = run("--debug", *words)
        assert ran.code == 2 and "error[internal]" not in ran.err, ran
        assert not any(
            word in ran.out + ran.err for word in (KEY, SECRET, "Signature", "127.0.0.1", "<Error>")
        )
        assert fault == "torn" or "denies access" in ran.out + ran.err, ran
    assert not list(tmp_path.iterdir())


def test_the_whole_object_in_place_of_a_range(bucket: Any, proxy: type[Proxy]) -> None:
    there = upload(bucket, ZERO, "no-ranges")
    proxy.fault = staticmethod(lambda method, path, n: "whole" if ".pt" in path else "")
    ran = run("verify", there)
    assert ran.code == 2 and "error[" in (ran.out + ran.err).lower(), ran


# --- HTTP ---------------------------------------------------------------------------------------------


@needs_obstore
@pytest.mark.parametrize("faults", ["", "busy", "busy busy", "torn"])
def test_a_file_over_http(faults: str, web: str) -> None:
    path = FIXTURES / "hf/single/model.safetensors"
    Files.files["/a/model.safetensors"] = path.read_bytes()
    Files.faults[:] = faults.split()
    assert ckpttools.digest(f"{web}/a/model.safetensors").digests == ckpttools.digest(path).digests
    assert not Files.faults, "the faults were met"


@needs_obstore
def test_a_server_without_ranges_is_an_error(web: str) -> None:
    Files.files["/model.safetensors"] = (FIXTURES / "hf/single/model.safetensors").read_bytes()
    Files.faults[:] = ["whole"] * 50
    with pytest.raises(UsageError, match="range"):
        ckpttools.inspect(f"{web}/model.safetensors")


@needs_obstore
def test_a_file_that_is_not_there(web: str) -> None:
    with pytest.raises(UsageError) as caught:
        ckpttools.inspect(f"{web}/none.pt")
    assert caught.value.id == "not-found"


def test_what_a_store_says_is_in_no_message(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing is asked for page by page: what fails there is told as everything else is."""
    for words in (("copy", ZERO, "s3://nobucket/x"), ("inspect", "s3://nobucket/x"), ("ls", "s3://nobucket")):
        ran = run(*words)
        assert ran.code == 2 and ("404 Not Found" in ran.err or "no such" in ran.err), ran
        assert "error[internal]" not in ran.err and "127.0.0.1" not in ran.err and "<Error>" not in ran.err
    ran = run("copy", ZERO, "s3://runs/../x")
    assert ran.code == 2 and "error[store-unknown]" in ran.err, ran


def test_resume_check_of_what_lies_in_a_store(bucket: Any) -> None:
    there = upload(bucket, ZERO, "resumed")
    here, far = (run("resume-check", place) for place in (ZERO, there))
    assert here.code == far.code and "error[" not in far.err, far


def test_a_bucket_is_a_folder(bucket: Any) -> None:
    bucket("some/notes.txt", b"mine")
    ran = run("inspect", "s3://runs")
    assert ran.code == 2 and "error[file-empty]" not in ran.err, ran
