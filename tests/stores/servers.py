"""Servers that misbehave as the tests tell them: one of files over HTTP, and a proxy before one of S3."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

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


@contextmanager
def seaweed(folder: Path) -> Iterator[str]:
    """SeaweedFS in a folder, with one bucket, `runs`: its address."""
    assert WEED is not None
    keys = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write"]}
    anonymous = {"name": "anonymous", "actions": ["Admin"]}  # makes the bucket without a signature
    (folder / "s3.json").write_text(json.dumps({"identities": [anonymous, {"name": "t"} | keys]}))
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    command = [WEED, "server", f"-dir={folder}", "-s3", f"-s3.config={folder / 's3.json'}", "-ip=127.0.0.1"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-volume.max=64", *(f"-{name}.port={port}" for name, port in ports.items())]
    url = f"http://127.0.0.1:{ports['s3']}"
    with serving(command, folder, lambda: _has_bucket(url)):
        yield url


@contextmanager
def serving(command: Sequence[object], folder: Path, ready: Callable[[], bool]) -> Iterator[None]:
    """A server, from when it is ready to the end of the tests."""
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not ready():
            alive = server.poll() is None and time.monotonic() < deadline
            assert alive, (folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield
    finally:
        server.terminate()  # a killed nginx would leave its workers
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _has_bucket(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/runs", method="PUT"), timeout=60):
            return True
    except OSError:
        return False


class Files(BaseHTTPRequestHandler):
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


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on to S3. `fault` says of (method, path, the how manieth of them) what to do instead."""

    target = ""
    latency = 0.0
    fault: Callable[[str, str, int], str] = staticmethod(lambda method, path, n: "")
    seen: list[tuple[str, str]] = []
    running = most = 0
    lock = threading.Lock()
    protocol_version = "HTTP/1.1"

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            n = sum(method == self.command for method, _ in self.seen)
            self.seen.append((self.command, self.path))
            type(self).running += 1
            type(self).most = max(self.most, self.running)
        time.sleep(self.latency)
        try:
            self.answer(type(self).fault(self.command, self.path, n), body)
        finally:
            with self.lock:
                type(self).running -= 1

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

    def answer(self, fault: str, body: bytes) -> None:
        if fault == "busy":
            self.reply(503, [], b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "denied":
            self.reply(403, [], b"<Error><Code>ExpiredToken</Code></Error>")
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "content-length")}
        if fault == "whole":  # asked for without a signature, which holds the range
            headers = {"Host": headers.get("Host", headers.get("host", ""))}
        if fault == "flipped":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        server = http.client.HTTPConnection(self.target, timeout=60)
        server.request(self.command, self.path, body, headers)
        got = server.getresponse()
        data = got.read()
        kept = ("etag", "last-modified", "content-range", "content-type", "x-amz-version-id")
        shown = [(k, v) for k, v in got.getheaders() if k.lower() in kept]
        if self.command == "HEAD":
            shown.append(("Content-Length", got.getheader("Content-Length") or "0"))
        self.reply(got.status, shown, data, torn=fault == "torn")
        server.close()

    def reply(self, status: int, headers: list[tuple[str, str]], data: bytes, *, torn: bool = False) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if torn else data)
        self.close_connection = torn

    def log_message(self, *args: object) -> None:
        pass


class Hub(BaseHTTPRequestHandler):
    """One revision of org/name, model and data set, as huggingface_hub asks for it: files longer than `LFS`
    lie with another host, to which requests for them are sent on, and folders are listed in pages.
    """

    LFS, PAGE = 4096, 3
    told: list[str] = []  # the credentials that the other host was given
    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    files: dict[str, bytes] = {}
    faults: list[str] = []  # of the next answers with data
    seen: list[str] = []
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = unquote(self.path).partition("?")
        self.seen.append(path)
        if path.startswith("/elsewhere/"):
            self.told.extend(value for name, value in self.headers.items() if name.lower() == "authorization")
            return self.part(self.files[path.removeprefix("/elsewhere/")])
        for kind in ("models", "datasets"):
            root = f"/api/{kind}/org/name"
            named = ("main", "refs/pr/1", self.COMMIT)
            if path in (root, *(f"{root}/revision/{name}" for name in named)):
                told = {"id": "org/name", "sha": self.COMMIT, "lastModified": "2025-11-01T10:00:00.000Z"}
                return self.reply(200, json.dumps({**told, "siblings": [], "tags": [], "private": False}))
            if path.startswith(f"{root}/tree/{self.COMMIT}"):
                return self.tree(path.removeprefix(f"{root}/tree/{self.COMMIT}").strip("/"), query)
        for root in ("/org/name", "/datasets/org/name"):
            name = path.removeprefix(f"{root}/resolve/{self.COMMIT}/")
            if name in self.files and len(self.files[name]) > self.LFS:
                port = self.headers["Host"].rpartition(":")[2]
                return self.reply(
                    302, "", Location=f"http://localhost:{port}/elsewhere/{name}?Signature=secret"
                )
            if name in self.files:
                return self.part(self.files[name])
        return self.reply(404, "{}", code="EntryNotFound" if "/org/name" in path else "RepoNotFound")

    def tree(self, folder: str, query: str) -> None:
        inside = f"{folder}/" if folder else ""
        found: dict[str, dict[str, object]] = {}
        for name, data in self.files.items():
            if name.startswith(inside):
                first, _, more = name.removeprefix(inside).partition("/")
                entry = {"path": inside + first, "oid": hashlib.sha1(data).hexdigest()}
                found[first] = entry | (
                    {"type": "directory", "size": 0} if more else {"type": "file", "size": len(data)}
                )
                if not more and len(data) > self.LFS:
                    oid = hashlib.sha256(data).hexdigest()
                    found[first] |= {"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}}
        if not found:
            return self.reply(404, "{}", code="EntryNotFound")
        at = int(dict(parse_qsl(query)).get("cursor", 0))
        more_of_it = {}
        if at + self.PAGE < len(found):
            here = f"http://{self.headers['Host']}{self.path.partition('?')[0]}"
            more_of_it = {"Link": f'<{here}?cursor={at + self.PAGE}>; rel="next"'}
        page = list(found.values())[at : at + self.PAGE]
        return self.reply(200, json.dumps(page), **more_of_it)

    def part(self, data: bytes) -> None:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "busy":
            return self.reply(503, "{}")
        if fault == "whole":
            return self.reply(200, data)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return self.reply(206, data[int(first) : int(last) + 1], torn=fault == "torn")

    def reply(
        self, status: int, body: str | bytes, *, code: str = "", torn: bool = False, **headers: str
    ) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if torn else data)
        self.close_connection = torn

    def log_message(self, *args: object) -> None:
        pass


def upload(put: Any, folder: Path, to: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            put(f"{to}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://runs/{to}"
