"""A store that serves from memory passes for a disk: every fixture, through every reader."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from msgspec.structs import replace
from stores.memory import Memory
from support import FIXTURES

import ckpttools
from ckpttools import runs
from ckpttools.errors import CkptError
from ckpttools.location import Location

FOLDERS = sorted(path for path in FIXTURES.iterdir() if path.is_dir() and path.name != "logs")


def stored(folder: Path) -> Location:
    """A folder's files, in memory, under the same path as on disk: so messages are equal too."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return Memory(files, name="").root / PurePosixPath(folder)


def checkpoints(folder: Path) -> list[Path]:
    return [found for entry in runs.find(folder) if isinstance(found := entry.path, Path)]


def answer(ask: Any, path: Location, **options: Any) -> str:
    """What is found, or the error, as text: places are shown alike."""
    try:
        found = ask(path, **options)
    except CkptError as error:
        return error.problem.shown()
    return re.sub(r"(?:Stored|PosixPath)\(('[^']*')\)", lambda match: match[1], str(found))


def inspected(path: Location) -> str:
    opened = ckpttools.inspect(path)
    checkpoint = replace(opened.checkpoint, template=None)
    return f"{opened!r} {checkpoint.layout} {checkpoint.training} {list(checkpoint.tensors)} " + " ".join(
        f"{file.path}:{file.nbytes}:{file.role}" for file in checkpoint.files
    )


def verified(path: Location, **options: Any) -> str:
    verdict = ckpttools.verify(path, **options)
    return f"{verdict.words} {verdict.state} {verdict.nbytes_read} " + "\n".join(map(str, verdict.findings))


def digested(path: Location) -> str:
    return str(ckpttools.digest(path).digests)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_reader_answers_as_from_disk(folder: Path) -> None:
    below = checkpoints(folder)
    assert below, "a fixture folder without a checkpoint tests nothing"
    place = stored(folder)
    for path in below:
        there = place / path.relative_to(folder)
        assert answer(inspected, there) == answer(inspected, path), path
        assert answer(verified, there) == answer(verified, path), path
        assert answer(verified, there, quick=True) == answer(verified, path, quick=True), path
        assert answer(digested, there) == answer(digested, path), path


def test_arrays_from_memory() -> None:
    path = FIXTURES / "hf/single"
    there, here = ckpttools.open(stored(path)), ckpttools.open(path)
    assert len(here) > 0
    for name in here:
        assert (there[name] == here[name]).all()
