"""The work of a command grows with the number of tensors, and not with its square."""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from work import at_most

import ckpttools

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from synthetic import write_many

DRY = ckpttools.Writing(dry_run=True)
COMMANDS: dict[str, Callable[[Path], object]] = {
    "extract": lambda path: ckpttools.extract(path, path.with_name("weights"), how=DRY),
    "extract --dtype": lambda path: ckpttools.extract(
        path, path.with_name("weights"), dtype="bf16", strip_prefix="layers.", how=DRY
    ),
    "extract to pt": lambda path: ckpttools.extract(path, path.with_name("weights.pt"), how=DRY),
    "verify": lambda path: ckpttools.verify(path, quick=True),
    "reshard": lambda path: ckpttools.reshard(path, path.with_name("four"), world_size=4, how=DRY),
}
FEW, MANY = 150, 900


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    base = tmp_path_factory.mktemp("many")
    for number in (FEW, MANY):
        write_many(base / str(number), number)
    yield base / str(FEW), base / str(MANY)


@pytest.mark.parametrize("name", COMMANDS)
def test_six_times_the_tensors_are_six_times_the_work(name: str, folders: tuple[Path, Path]) -> None:
    few, many = folders
    COMMANDS[name](few)  # modules are imported
    counted = []
    for folder in (few, many):
        with at_most(20_000_000) as lines:
            COMMANDS[name](folder)
        counted.append(lines.count)
    assert counted[1] < counted[0] * MANY / FEW, counted


def test_damaged_records_are_looked_up_not_searched(tmp_path: Path) -> None:
    """Each damaged range is held against the tensors near it, not against all of the file."""
    counted = []
    for number in (FEW, MANY):
        path = tmp_path / f"{number}.pt"
        torch.save({f"layers.{i}.weight": torch.full((4,), float(i)) for i in range(number)}, path)
        damaged = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            records = [info for info in archive.infolist() if "/data/" in info.filename]
        for info in records:  # the local header, the name, the padding
            low = info.header_offset
            damaged[low + 30 + sum(struct.unpack_from("<HH", damaged, low + 26))] ^= 1
        path.write_bytes(damaged)
        with at_most(40_000_000) as lines:
            verdict = ckpttools.verify(path)
        assert {finding.id for finding in verdict.findings if finding.severity == "error"} == {"checksum"}
        counted.append(lines.count)
    assert counted[1] < counted[0] * 1.2 * MANY / FEW, counted
