"""How often a file is read: headers cost a few calls, not one for each tensor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import run as ckpt

from ckpttools.containers.archive import read_archive, unexplained
from ckpttools.errors import CkptError
from ckpttools.stores.files import opened

TENSORS = 1200


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than the end of a file that is read at once: headers far from both ends."""
    path = tmp_path_factory.mktemp("reads") / "many.pt"
    torch.save({f"layers.{i}.weight": torch.full((9, 7), float(i)) for i in range(TENSORS)}, path)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    seen: Counter[str] = Counter()
    pread, preadv = os.pread, os.preadv

    def name(fd: int) -> str:
        return Path(f"/proc/self/fd/{fd}").readlink().name

    monkeypatch.setattr(os, "pread", lambda fd, n, at: (seen.update([name(fd)]), pread(fd, n, at))[1])
    monkeypatch.setattr(
        os, "preadv", lambda fd, to, at, *flags: (seen.update([name(fd)]), preadv(fd, to, at, *flags))[1]
    )
    yield seen


@pytest.mark.parametrize(
    ("words", "most"),
    [
        ("inspect", 4),
        ("inspect --tensors", 4),
        ("verify --quick", 10),
        ("extract --dry-run", 10),
        ("convert DST --to hf --dry-run", 10),
        ("verify", 12),
    ],
)
def test_reads_do_not_grow_with_the_tensors(
    words: str, most: int, many: Path, reads: Counter[str], tmp_path: Path
) -> None:
    command, *options = (str(tmp_path / "out") if word == "DST" else word for word in words.split())
    ran = ckpt(command, many, *options)
    assert ran.code == 0, ran
    assert 0 < reads[many.name] <= most


def test_what_was_predicted_is_what_the_headers_say(many: Path) -> None:
    import zipfile

    with opened(many) as file, zipfile.ZipFile(many) as oracle:
        archive = read_archive(file)
        assert sum(record.predicted for record in archive.records.values()) > TENSORS // 2
        for info in oracle.infolist():
            with oracle.open(info) as data:
                data.read()  # zipfile reads the local header, and the checksum proves the start
            record = archive.records[info.filename.partition("/")[2]]
            begin = info.header_offset
            raw = many.read_bytes()[begin + 26 : begin + 30]
            lengths = int.from_bytes(raw[:2], "little") + int.from_bytes(raw[2:], "little")
            assert record.start == begin + 30 + lengths
        assert unexplained(file, archive) == []


@pytest.mark.parametrize("number", [TENSORS // 2, TENSORS // 2 + 1])
def test_every_byte_of_a_predicted_header_and_descriptor_is_proved_by_verify(
    number: int, many: Path, tmp_path: Path
) -> None:
    with opened(many) as file:
        record = read_archive(file).records[f"data/{number}"]
    assert record.predicted
    whole = many.read_bytes()
    places = [*range(record.header, record.start), *range(record.start + record.nbytes, record.end)]
    path = tmp_path / "many.pt"
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        with opened(path) as file:
            try:
                problems = unexplained(file, read_archive(file))
            except CkptError:
                continue
        assert problems and f"'data/{number}'" in problems[0], at
    ran = ckpt("verify", path, "--quick")
    assert ran.code == 1 and "zip-unexplained" in ran.out
    assert ckpt("extract", path, tmp_path / "out.safetensors").code == 1


def test_a_block_of_zeros_over_most_headers_is_no_other_writer(many: Path, tmp_path: Path) -> None:
    with opened(many) as file:
        records = [r for r in read_archive(file).records.values() if r.predicted]
    data = bytearray(many.read_bytes())
    for record in records:
        data[record.header : record.header + 30] = bytes(30)
    (tmp_path / "many.pt").write_bytes(data)
    ran = ckpt("verify", tmp_path / "many.pt", "--quick")
    assert ran.code == 1 and "zip-unexplained" in ran.out
