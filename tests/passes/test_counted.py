"""Bytes are counted where the system is called: read once and written once, whatever is done with them."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from benchmarks.synthetic import write_random
from commands import run as ckpt
from support import FIXTURES

import ckpttools
from ckpttools.compare.content import content
from ckpttools.passes.hashes import FileHash
from ckpttools.tensors import TensorRef

HEADERS = 1.02  # headers and pickles are read for themselves


class Traffic:
    """Bytes by real path, as the calls return them."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()

    def clear(self) -> None:
        self.read.clear()
        self.written.clear()

    def below(self, counts: Counter[str], folder: Path) -> int:
        return sum(n for path, n in counts.items() if path.startswith(f"{folder.resolve()}"))


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    seen = Traffic()
    preadv, pread, pwrite = os.preadv, os.pread, os.pwrite

    def name(fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    def counted_preadv(fd, buffers, at, *flags):  # type: ignore[no-untyped-def]
        n = preadv(fd, buffers, at, *flags)
        seen.read[name(fd)] += n
        return n

    def counted_pread(fd, n, at):  # type: ignore[no-untyped-def]
        data = pread(fd, n, at)
        seen.read[name(fd)] += len(data)
        return data

    def counted_pwrite(fd, data, at):  # type: ignore[no-untyped-def]
        n = pwrite(fd, data, at)
        seen.written[name(fd)] += n
        return n

    monkeypatch.setattr(os, "preadv", counted_preadv)
    monkeypatch.setattr(os, "pread", counted_pread)
    monkeypatch.setattr(os, "pwrite", counted_pwrite)
    yield seen


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks of ZeRO-2, 30 MB."""
    folder = tmp_path_factory.mktemp("counted") / "big"
    write_random(folder, 30_000_000 // 14)
    return folder


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("workers", [1, 3])
def test_verify_reads_each_byte_once_with_and_without_a_manifest(
    traffic: Traffic, big: Path, tmp_path: Path, workers: int
) -> None:
    folder = shutil.copytree(big, tmp_path / "run")
    total = size(folder)
    for options in ([], ["--write-manifest"], []):
        traffic.clear()
        ran = ckpt("verify", folder, *options, "--workers", workers)
        assert ran.code == 0, ran
        assert 0.98 * total < traffic.below(traffic.read, folder) < HEADERS * total, options
    assert list(folder.rglob("ckpt-manifest.json"))


@pytest.mark.parametrize(
    "words",
    [
        "reshard {src} {dst} --world-size 3",
        "extract {src} {dst}",
        "extract {src} {dst}.safetensors",
        "convert {src} {dst} --to zero1 --world-size 3",
        "convert {src} {dst} --to dcp --mesh 2x2",
        "convert {src} {dst}.pt --to pt",
    ],
)
def test_writing_reads_the_source_once_writes_once_and_reads_back_once(
    traffic: Traffic, big: Path, tmp_path: Path, words: str
) -> None:
    traffic.clear()
    digest = [] if "extract" in words else ["--no-digest"]
    ran = ckpt(*words.format(src=big, dst=tmp_path / "out").split(), *digest)
    assert ran.code == 0, ran
    total = sum(size(p) if p.is_dir() else p.stat().st_size for p in tmp_path.glob("out*"))
    source, back = traffic.below(traffic.read, big), traffic.below(traffic.read, tmp_path)
    assert 0.85 * total < source < HEADERS * size(big)
    assert 0.99 * total < back < HEADERS * total + 100_000
    assert 0.98 * total < traffic.below(traffic.written, tmp_path) < HEADERS * total


@pytest.mark.parametrize("to", ["ws3", "pt"])
def test_the_digest_reads_the_source_once_too(traffic: Traffic, big: Path, tmp_path: Path, to: str) -> None:
    """Each source byte once, copied or not; of the result, what lies in several pieces is read once more."""
    out = tmp_path / ("out" if to == "ws3" else "out.pt")
    made = ["reshard", big, out, "--world-size", "3"] if to == "ws3" else ["convert", big, out, "--to", "pt"]
    ran = ckpt(*made)
    assert ran.code == 0 and "note: digest" in ran.err, ran
    source, back = traffic.below(traffic.read, big), traffic.below(traffic.read, tmp_path)
    total, state = size(tmp_path), ckpttools.digest(big).digests.state
    cut = [
        ref.nbytes
        for held in content(ckpttools.open(out).checkpoint).held.values()
        for ref in held.values()
        if isinstance(ref, TensorRef) and len(ref.chunks) > 1
    ]
    assert f"digest {state}" in ran.err and 0.98 * size(big) < source < HEADERS * size(big)
    assert 0.98 * total < back < HEADERS * total + sum(cut) + 100_000
    assert sum(cut) < 0.6 * total and (to == "ws3") == bool(cut)
    traffic.clear()
    assert ckpt("digest", out).code == 0  # taken from the manifest
    assert 0.98 * total < traffic.below(traffic.read, tmp_path) < HEADERS * total + 100_000


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.pt"])
def test_a_byte_that_goes_wrong_on_its_way_to_disk_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The first large write takes place with a wrong byte: in a header, or in the bytes of a tensor."""
    source = FIXTURES / "deepspeed-0.19.8" / "z2_groups_ws2"
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    assert ckpt("extract", source, tmp_path / "right" / name).code == 0
    pwrite = os.pwrite
    said = Counter[str]()
    for twelfth in range(12):
        done = []

        def wrong(fd, data, at, done=done, twelfth=twelfth):  # type: ignore[no-untyped-def]
            if len(data) > 1000 and not done and "wrong" in str(Path(f"/proc/self/fd/{fd}").readlink()):
                done.append(at)
                data = bytearray(data)
                data[len(data) * twelfth // 12] ^= 0x10
            return pwrite(fd, data, at)

        monkeypatch.setattr(os, "pwrite", wrong)
        ran = ckpt("extract", source, tmp_path / "wrong" / name)
        monkeypatch.setattr(os, "pwrite", pwrite)
        assert done
        if ran.code == 0:  # a checksum's place, which is written again when the file is complete
            assert contents(tmp_path / "wrong") == contents(tmp_path / "right")
            said["written again"] += 1
            shutil.rmtree(tmp_path / "wrong")
            (tmp_path / "wrong").mkdir()
            continue
        assert list((tmp_path / "wrong").iterdir()) == []
        said[ran.err.partition("[")[2].partition("]")[0]] += 1
    assert set(said) <= {"write-failed", "written-wrong", "written again"}, said
    assert said["write-failed"] >= 3 and said["written again"] <= 2, said


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_digests_of_a_file_and_of_ranges_that_blocks_cut() -> None:
    data = bytes(range(256)) * 4
    ranges = {"in": (10, 20), "over": (90, 250), "all": (0, 1024), "none": (5, 0), "end": (1024, 0)}
    hashed = FileHash(len(data), ranges)
    for at in range(0, 1024, 100):
        hashed.update(memoryview(data)[at : at + 100])
    whole, parts = hashed.digests()
    assert whole == xxhash.xxh3_128_hexdigest(data)
    assert list(parts.items()) == [
        (name, xxhash.xxh3_128_hexdigest(data[start : start + nbytes]))
        for name, (start, nbytes) in ranges.items()
    ]
