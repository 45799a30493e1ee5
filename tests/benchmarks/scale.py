"""Rows of `run.py` on what grows: past the page cache, with the size, with requests, with processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import synthetic
from deepspeed_checkpoint import BYTES_PER_PARAMETER
from measure import measure

sys.path.insert(0, str(Path(__file__).parents[1]))
from stores import servers

GB = (0.3, 1.2, 5, 20)
ROOM = 8e9  # bytes of the disk that are left alone
LATENCY = 0.03  # seconds


def grow(folder: Path, ckpt: tuple[str, ...], environment: dict[str, str], most: float) -> None:
    """Each command at 0.3, 1.2, 5 and 20 GB, as far as the disk has room: seconds per GB, and memory."""
    print(f"  {'':12} {'GB':>6} {'wall s':>8} {'cpu s':>8} {'cpu s/GB':>9} {'rss MB':>8} {'anon MB':>8}")
    for size in (each for each in GB if each * 1e9 <= most):
        source, out = folder / f"growth-{size}GB", folder / "out"
        if shutil.disk_usage(folder).free < 2.4 * size * 1e9 + ROOM:
            print(f"  {size} GB: the disk has no room for it")
            continue
        if not source.exists():
            synthetic.write_random(source, int(size * 1e9 / BYTES_PER_PARAMETER))
        for words in (
            ("inspect", source),
            ("verify", source, "-q"),
            ("extract", source, out, "-q"),
            ("reshard", source, out, "--world-size", "4", "-q"),
        ):
            cost = measure([*ckpt, *words], environment)
            print(
                f"  {words[0]:12} {size:6} {cost.wall:8.2f} {cost.cpu:8.2f} {cost.cpu / size:9.2f} "
                f"{cost.rss / 1e6:8.0f} {cost.anonymous / 1e6:8.0f}",
                flush=True,
            )
            shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(source)


def among(world: int, words: list[str | Path], ckpt: tuple[str, ...]) -> list[str | Path]:
    """One command line that runs a command as `world` workers, and fails where one fails."""
    script = (
        "world=$1; shift; pids=; for rank in $(seq 0 $((world - 1))); do "
        'RANK=$rank WORLD_SIZE=$world "$@" --spread & pids="$pids $!"; done; '
        "for pid in $pids; do wait $pid || exit 1; done"
    )
    return ["sh", "-c", script, "sh", str(world), *ckpt, *words]


@contextmanager
def _proxy(target: str) -> Iterator[str]:
    servers.Proxy.target, servers.Proxy.latency = target.removeprefix("http://"), LATENCY
    server = ThreadingHTTPServer(("127.0.0.1", 0), servers.Proxy)
    server.daemon_threads, server.request_queue_size = True, 256
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def far(folder: Path, ckpt: tuple[str, ...], environment: dict[str, str]) -> None:
    """Requests, bytes and seconds of each command on SeaweedFS behind a proxy that adds 30 ms a request."""
    sources = _sources(folder, ckpt, environment)
    keys = {"AWS_ACCESS_KEY_ID": servers.KEY, "AWS_SECRET_ACCESS_KEY": servers.SECRET}
    here = environment | keys | {"AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    data = folder / "weed"
    data.mkdir(exist_ok=True)
    print(f"  {'':52} {'files':>6} {'requests':>9} {'MB read':>8} {'MB sent':>8} {'wall s':>8}")
    with servers.seaweed(data) as endpoint, _proxy(endpoint) as slow:
        for name, source in sources.items():
            _run([*ckpt, "copy", source, f"s3://runs/{source.name}"], here | {"AWS_ENDPOINT_URL": endpoint})
            files = sum(path.is_file() for path in source.rglob("*")) if source.is_dir() else 1
            place = f"s3://runs/{source.name}"
            todo: list[list[str]] = [["inspect", place], ["verify", place, "--quick"]]
            if name != "zero2, 64 ranks":
                todo += [["verify", place], ["digest", place]]
            todo.append(["extract", place, f"{place}-w", "--weights-only", "--dry-run"])
            if name == "zero2":
                todo += [
                    ["latest", place],
                    ["ls", place],
                    ["diff", place, place],
                    ["extract", place, f"{place}-w", "--weights-only"],
                    ["reshard", place, f"{place}-4", "--world-size", "4"],
                    ["copy", place, f"{place}-copy"],
                    ["copy", place, str(folder / "out")],
                ]
            for words in todo:
                seconds, said = _run([*ckpt, *words, "--stats"], here | {"AWS_ENDPOINT_URL": slow})
                shown = " ".join("s3" if "://" in w else "disk" if "/" in w else w for w in words)
                print(f"  {name + ': ' + shown:52} {files:6} {_counts(said)} {seconds:8.2f}", flush=True)
            shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(data)


def _counts(said: str) -> str:
    """Of what --stats prints."""
    found = re.search(r"stores: (\d+) requests, .*?\((\d+) bytes\)(?:.*?\((\d+) bytes\))?", said)
    requests, came, went = map(int, found.groups("0")) if found else (0, 0, 0)
    return f"{requests:9} {came / 1e6:8.2f} {went / 1e6:8.2f}"


def _run(command: list[str | Path], environment: dict[str, str]) -> tuple[float, str]:
    started = time.monotonic()
    words = list(map(str, command))
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.monotonic() - started, done.stderr


def _sources(folder: Path, ckpt: tuple[str, ...], environment: dict[str, str]) -> dict[str, Path]:
    """28 MB as each format, and a folder of many ranks."""
    zero = folder / "far-zero2"
    made: dict[str, tuple[Path, Callable[[Path], None]]] = {
        "zero2": (zero, lambda path: synthetic.write_random(path, 2_000_000)),
        "zero2, 64 ranks": (folder / "far-64", lambda path: synthetic.write_random(path, 2_000_000, 64)),
    }
    for name, to, more in (
        ("zero3", "zero3", ("--world-size", "2")),
        ("universal", "universal", ()),
        ("dcp", "dcp", ("--world-size", "2")),
        ("pt", "pt", ()),
        ("hf", "hf", ()),
    ):
        words = ("--to", to, *more, "-q", "--no-digest")

        def convert(path: Path, words: tuple[str, ...] = words) -> None:
            measure([*ckpt, "convert", zero, path, *words], environment)

        made[name] = folder / f"far-{name}{'.pt' if name == 'pt' else ''}", convert
    for path, make in made.values():
        if not path.exists():
            make(path)
    return {name: path for name, (path, _) in made.items()}
