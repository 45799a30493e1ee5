"""The other places: Azure (Azurite), Google (fake-gcs-server), https with ranges (nginx), the hub.

Each runs where its server is installed: `azurite-blob` (npm), `fake-gcs-server`, `nginx` and `openssl`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import importlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from commands import run
from stores.servers import Hub, free_port, serving
from support import FIXTURES

import ckpttools
from ckpttools.errors import UsageError
from ckpttools.siblings import MANIFEST, UNFINISHED
from ckpttools.stores import remote
from ckpttools.stores.hub import split

ZERO = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
SINGLE = FIXTURES / "hf/single/model.safetensors"
READS = (["inspect"], ["verify", "--quick"], ["verify"], ["digest", "--tensors"])
pytest.importorskip("obstore")


def installed(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_buckets", {})


def answers(port: int) -> bool:
    try:
        asked(port, "GET", "/")
    except OSError:
        return False
    return True


def asked(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        return connection.getresponse().status
    except http.client.HTTPException:
        return 0  # TLS is wanted
    finally:
        connection.close()


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def as_on_a_disk(there: str, path: Path = ZERO) -> None:
    for command, *options in READS:
        far, near = run(command, there, *options), run(command, path, *options)
        assert far.code == near.code == 0, (far, near)
        assert far.out.replace(there, "X") == near.out.replace(str(path), "X"), command


# --- Azure --------------------------------------------------------------------------------------------

# of every Azurite
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """With one container, `runs`."""
    folder, port = tmp_path_factory.mktemp("azurite"), free_port()
    command = [installed("azurite-blob"), "--blobPort", port, "--location", folder, "--skipApiVersionCheck"]
    with serving([*command, "--silent", "--disableTelemetry"], folder, lambda: answers(port)):
        date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        what = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n/{ACCOUNT}/{ACCOUNT}/runs\nrestype:container"
        digest = hmac.new(base64.b64decode(KEY), b"PUT" + b"\n" * 12 + what.encode(), hashlib.sha256).digest()
        signed = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        path = f"/{ACCOUNT}/runs?restype=container"
        dated = {"x_ms_date": date, "x_ms_version": "2021-08-06"}
        assert asked(port, "PUT", path, Authorization=signed, **dated) == 201
        yield port


@pytest.fixture
def azure(azurite: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The container, as obstore sees it."""
    import obstore

    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{azurite}")
    return obstore.store.from_url("az://runs")


def objects(container: Any, below: str) -> dict[str, bytes]:
    import obstore

    found = [meta["path"] for meta in obstore.list(container, below).collect()]
    return {
        name.removeprefix(f"{below}/"): bytes(obstore.get(container, name).bytes())
        for name in found
        if not name.endswith(MANIFEST)
    }


def test_azure_holds_what_a_disk_holds(azure: Any, tmp_path: Path) -> None:
    assert run("copy", ZERO, "az://runs/copied", "-q").code == 0
    assert objects(azure, "copied") == files_of(ZERO)
    as_on_a_disk("az://runs/copied")
    assert run("latest", "az://runs/copied").out == "az://runs/copied/global_step3\n"
    # long enough for the places to be asked for again: what Azure lists has other ETags than what it heads
    assert run("reshard", "az://runs/copied", "az://runs/three", "--world-size", 3, "-q").code == 0
    assert run("reshard", ZERO, tmp_path / "three", "--world-size", 3, "-q").code == 0
    assert objects(azure, "three") == files_of(tmp_path / "three")
    ran = run("reshard", ZERO, "az://runs/three", "--world-size", 4)
    assert ran.code == 2 and "error[destination-exists]" in ran.err, ran


def test_a_version_is_known_again_in_a_listing(azure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    obstore.put(azure, "versions/a.safetensors", SINGLE.read_bytes())
    monkeypatch.setattr(remote, "FRESH", -1.0)
    bucket = remote.Bucket("az://runs")
    bucket.open("/versions/a.safetensors")
    nbytes = bucket.nbytes
    monkeypatch.setattr(remote, "FRESH", 60.0)
    list(bucket.list("/versions"))
    monkeypatch.setattr(bucket, "_seen", {})
    bucket._objects["/versions/a.safetensors"].at -= 100
    bucket.open("/versions/a.safetensors")
    assert bucket.nbytes == nbytes, "fetched again, though it is the same"


def test_two_names_of_one_container(azure: Any) -> None:
    assert run("copy", ZERO, "az://runs/named", "-q").code == 0
    before = objects(azure, "named")
    there = f"abfs://runs@{ACCOUNT}.dfs.core.windows.net/named"
    as_on_a_disk(there)
    for dst in ("az://runs/named", "az://runs/named/inside", "azure://runs/named/"):
        ran = run("reshard", there, dst, "--world-size", 3, "--force")
        assert ran.code == 2 and "error[destination-in-source]" in ran.err, ran
    assert objects(azure, "named") == before
    assert run("reshard", there, "az://runs/beside", "--world-size", 3, "-q").code == 0


@pytest.mark.heavy
def test_an_upload_to_azure_that_was_killed(azure: Any, tmp_path: Path) -> None:
    from benchmarks.synthetic import write_random

    write_random(tmp_path / "run", 2_000_000)
    dst = "az://runs/killed"
    words = ["reshard", str(tmp_path / "run"), dst, "--world-size", "3"]
    with subprocess.Popen([sys.executable, "-m", "ckpttools.cli", *words, "-q"]) as process:
        while process.poll() is None and len(objects(azure, "killed")) < 2:
            time.sleep(0.02)
        process.kill()
    assert UNFINISHED in objects(azure, "killed"), "it was through before it could be killed"
    assert "error[upload-unfinished]" in run("inspect", dst).err
    ran = run(*words)
    assert ran.code == 0 and "went on" in ran.err, ran
    assert run("reshard", tmp_path / "run", tmp_path / "three", "--world-size", 3, "-q").code == 0
    assert objects(azure, "killed") == files_of(tmp_path / "three")


# --- Google -------------------------------------------------------------------------------------------


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """With one bucket, `runs`. It takes no objects by the requests that obstore makes."""
    port = free_port()
    command = [installed("fake-gcs-server"), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    host = f"127.0.0.1:{port}"
    with serving([*command, "-port", port, "-public-host", host], tmp_path, lambda: answers(port)):
        account = {"gcs_base_url": f"http://{host}", "disable_oauth": True}
        account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        (tmp_path / "account.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
        assert asked(port, "POST", "/storage/v1/b?project=x", b'{"name": "runs"}') == 200
        yield port


def test_google_holds_what_a_disk_holds(google: int, tmp_path: Path) -> None:
    for name, data in files_of(ZERO).items():
        place = f"/upload/storage/v1/b/runs/o?uploadType=media&name={quote('run/' + name, safe='')}"
        assert asked(google, "POST", place, data) == 200
    as_on_a_disk("gs://runs/run")
    assert run("reshard", "gs://runs/run", tmp_path / "three", "--world-size", 3, "-q").code == 0
    ran = run("copy", ZERO, "gs://runs/denied")  # 400: no server of these tests takes it
    assert ran.code == 2 and "error[write-failed]" in ran.err, ran


# --- https --------------------------------------------------------------------------------------------

NGINX = """
pid {0}/pid; error_log {0}/errors; daemon off; worker_processes 1;
events {{}}
http {{
  access_log {0}/asked; {temporary}
  server {{ listen 127.0.0.1:{port} ssl; autoindex on; root {0}/files; ssl_certificate {0}/own.pem; ssl_certificate_key {0}/own.key; }}
}}
"""  # noqa: E501


def certificates(folder: Path) -> None:
    """An authority of our own, and a certificate for this machine by it."""
    openssl = installed("openssl")
    new = ["-newkey", "rsa:2048", "-nodes"]
    (folder / "for").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    for words in (
        ["req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=authority"],
        ["req", *new, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=here"],
        ["x509", "-req", "-in", "own.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
         "-out", "own.pem", "-days", "2", "-extfile", "for"],
    ):  # fmt: skip
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def nginx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """The address, and what was asked of it so far."""
    program, port = installed("nginx"), free_port()
    tmp_path.chmod(0o755)
    (tmp_path / "files").mkdir()
    certificates(tmp_path)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    user = "user root;\n" if Path("/root").stat().st_uid == 0 and sys.platform == "linux" else ""
    (tmp_path / "conf").write_text(user + NGINX.format(tmp_path, port=port, temporary=temporary))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))

    def lines() -> list[str]:
        return [
            line.split('"')[1] for line in (tmp_path / "asked").read_text().splitlines() if "store" in line
        ]

    with serving([program, "-p", tmp_path, "-c", tmp_path / "conf"], tmp_path, lambda: answers(port)):
        yield f"https://127.0.0.1:{port}", lines


def test_a_file_of_nginx(nginx: tuple[str, Callable[[], list[str]]], tmp_path: Path) -> None:
    import torch

    url, lines = nginx
    path = tmp_path / "files/many.pt"
    torch.save({f"layer{i}.weight": torch.randn(100, 60) for i in range(300)}, path)
    shutil.copy(SINGLE, tmp_path / "files")
    assert len(ckpttools.inspect(f"{url}/many.pt")) == 300
    of_it = [line for line in lines() if "many.pt" in line]
    assert len(of_it) <= 4 and sum(line.startswith("GET") for line in of_it) <= 3, of_it
    assert remote.used()[1] < path.stat().st_size / 8
    as_on_a_disk(f"{url}/many.pt", path)
    as_on_a_disk(f"{url}/model.safetensors", SINGLE)
    before = len(lines())
    assert run("inspect", f"{url}/model.safetensors").code == 0
    assert len(lines()) - before <= 4, lines()[before:]
    assert run("extract", f"{url}/model.safetensors", tmp_path / "w", "-q").code == 0
    assert "error[not-found]" in run("inspect", f"{url}/none.pt").err
    (tmp_path / "files/folder").mkdir()
    ran = run("inspect", f"{url}/folder")
    assert ran.code == 2 and "folders have no listing" in ran.err, ran
    assert "error[not-writable]" in run("copy", ZERO, f"{url}/x").err


def test_who_signed_the_certificate_is_asked(
    nginx: tuple[str, Callable[[], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    ran = run("inspect", f"{nginx[0]}/model.safetensors")
    assert ran.code == 2 and "cannot be reached" in ran.err, ran


# --- the hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A server of this test that speaks as the hub does to its file system."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    Hub.files, Hub.seen, Hub.faults, Hub.told = {}, [], [], []
    before = constants.ENDPOINT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(before, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_repository_of_the_hub(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.files = {f"runs/{name}": data for name, data in files_of(ZERO).items()}
    for there in ("hf://org/name/runs", "hf://org/name@main/runs", "hf://datasets/org/name/runs"):
        as_on_a_disk(there)
    assert run("reshard", "hf://org/name/runs", tmp_path / "three", "--world-size", 3, "-q").code == 0
    assert run("inspect", "hf://org/name@refs/pr/1/runs").code == 0
    assert "error[not-found]" in run("inspect", "hf://org/name/none").err
    assert "error[not-found]" in run("inspect", "hf://org/other/none").err
    assert "error[not-writable]" in run("copy", ZERO, "hf://org/name/new").err
    assert any(path.startswith("/elsewhere/") for path in hub.seen) and not hub.told
    of_data = [path for path in hub.seen if "/resolve/" in path]
    assert of_data and all(f"/resolve/{Hub.COMMIT}/" in path for path in of_data), "of one commit"


@pytest.mark.parametrize("fault", ["torn", "busy"])
def test_a_hub_in_trouble_is_asked_again(fault: str, hub: type[Hub]) -> None:
    hub.files, hub.faults = {"model.safetensors": SINGLE.read_bytes()}, [fault]
    assert ckpttools.digest("hf://org/name/model.safetensors").digests == ckpttools.digest(SINGLE).digests
    assert not hub.faults


def test_a_hub_that_knows_no_ranges(hub: type[Hub]) -> None:
    hub.files, hub.faults = {"model.safetensors": SINGLE.read_bytes() * 60}, ["whole"] * 9
    with pytest.raises(UsageError, match="range"):
        ckpttools.inspect("hf://org/name/model.safetensors")


def test_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    ran = run("inspect", "hf://org/name/run")
    assert ran.code == 2 and "error[store-extra]" in ran.err and "pip install huggingface_hub" in ran.err, ran


def test_a_revision_of_the_hubs_own_has_slashes() -> None:
    assert split("org/name@refs/pr/1/run/x.pt") == ("org/name@refs/pr/1", "run/x.pt")
    assert split("datasets/org/name@refs/convert/parquet") == ("datasets/org/name@refs/convert/parquet", "")
    assert split("org/name@main/refs/pr/1") == ("org/name@main", "refs/pr/1")


@pytest.mark.parametrize(
    "place",
    ["hf://", "hf://name", "hf://org/name@refs/pr", "hf://org//x", "hf://datasets/org", "hf://buckets/a/b"],
)
def test_what_is_no_repository(place: str) -> None:
    ran = run("inspect", place)
    assert ran.code == 2 and "error[store-unknown]" in ran.err and "hf://ORG/NAME" in ran.err, ran
