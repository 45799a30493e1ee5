"""What each command asks a store for: few requests for the headers of a file, and no tensor with them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.synthetic import write_random
from commands import run

from ckpttools.checksums import crc32, of_crc32
from ckpttools.stores import remote

obstore = pytest.importorskip("obstore")
PARTS = 16  # of a distributed checkpoint below: pieces of tensors on two ranks


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same state in each format: tensors of a megabyte, so that headers between them lie apart."""
    folder = tmp_path_factory.mktemp("requests")
    write_random(folder / "zero", 1_300_000)
    for name, *words in (("all.pt", "pt"), ("hf", "hf"), ("dcp", "dcp", "--world-size", "2")):
        made = run("convert", folder / "zero", folder / name, "-q", "--no-digest", "--to", *words)
        assert made.code == 0, made
    (weights,) = (folder / "hf").glob("*.safetensors")
    shutil.copy(weights, folder / "one.safetensors")
    return folder


class Asked:
    """obstore's functions, which note what is asked for."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()
        self.lists = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(obstore, name)

        def call(store: Any, key: Any = None, *args: Any, **more: Any) -> Any:
            if name in ("get", "head"):
                self.of[key] += 1
            else:
                self.lists += 1
            return function(store, key, *args, **more)

        return call


@pytest.fixture
def asked(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """A bucket, `s3://runs`, that is a folder of this machine."""
    noted = Asked()
    monkeypatch.setattr(remote, "_buckets", {})
    monkeypatch.setattr(remote, "FRESH", 60.0)  # a busy machine asks again
    monkeypatch.setattr(remote, "client", lambda *_: (noted, obstore.store.LocalStore(sources)))
    yield noted


def size_of(path: Path) -> int:
    return sum(
        each.stat().st_size for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()
    )


HEADERS = {
    "inspect": (),
    "inspect --tensors": (),
    "verify --quick": (),
    "extract DST --weights-only --dry-run": (),
    "convert DST --to pt --dry-run": ("hf", "one.safetensors"),  # weights alone
    "convert DST --to hf --dry-run": (),
    "reshard DST --world-size 3 --dry-run": ("all.pt", "hf", "one.safetensors"),
    "ls": ("all.pt", "one.safetensors"),
    "latest": ("all.pt", "one.safetensors"),
}
PLACES = ["zero", "all.pt", "hf", "one.safetensors", "dcp"]
CASES = [(words, place) for words, without in HEADERS.items() for place in PLACES if place not in without]


@pytest.mark.parametrize(("words", "place"), CASES)
def test_headers_take_few_requests(
    words: str, place: str, asked: Asked, sources: Path, tmp_path: Path
) -> None:
    command, *options = (str(tmp_path / "out") if word == "DST" else word for word in words.split())
    ran = run(command, f"s3://runs/{place}", *options)
    assert ran.code == 0, ran
    for key, count in asked.of.items():
        # each part of a distributed checkpoint is a torch file of its own
        assert count <= (PARTS if key.endswith(".distcp") else 4), asked.of
    assert asked.lists <= 4
    nbytes = remote.used()[1]
    assert nbytes < size_of(sources / place) / 3, nbytes


@pytest.mark.parametrize("words", ["verify", "digest", "diff OTHER"])
@pytest.mark.parametrize("place", PLACES)
def test_every_byte_is_read_once(words: str, place: str, asked: Asked, sources: Path) -> None:
    command, *options = (str(sources / place) if word == "OTHER" else word for word in words.split())
    assert run(command, f"s3://runs/{place}", *options).code == 0
    assert remote.used()[1] < 1.15 * size_of(sources / place) + 400_000
    assert max(asked.of.values()) <= 4 + 2 * PARTS, asked.of


def test_the_steps_of_an_optimizer_are_told_by_their_checksums(asked: Asked, sources: Path) -> None:
    far, near = (run("inspect", place, "--json").out for place in ("s3://runs/all.pt", sources / "all.pt"))
    assert far.replace("s3://runs/all.pt", "X") == near.replace(str(sources / "all.pt"), "X")


@pytest.mark.parametrize("value", [0.0, 1.0, 3.0, 12345.0, -1.5, float("inf")])
def test_four_bytes_by_their_checksum(value: float) -> None:
    data = torch.tensor(value).numpy().tobytes()
    assert of_crc32(crc32(data)) == data


def test_what_a_quick_look_leaves_out_is_said_and_found_by_the_whole(asked: Asked, sources: Path) -> None:
    ran = run("verify", "s3://runs/all.pt", "--quick", "--json")
    assert '"headers-apart"' in ran.out, ran
    assert '"headers-apart"' not in run("verify", "s3://runs/all.pt", "--json").out
    assert '"headers-apart"' not in run("verify", sources / "all.pt", "--quick", "--json").out
