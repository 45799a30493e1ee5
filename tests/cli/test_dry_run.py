"""--dry-run refuses exactly what the run refuses, with the same words, and touches nothing."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from commands import Ckpt
from support import FIXTURES

ZERO = FIXTURES / "deepspeed-0.19.8" / "z2_groups_ws2"
TRAINER = FIXTURES / "hf-trainer" / "plain" / "checkpoint-2"
COMMANDS = {
    "extract": ("extract", "{src}", "{dst}"),
    "extract to a file": ("extract", "{src}", "{dst}", "--format", "pt"),
    "reshard": ("reshard", "{src}", "{dst}", "--world-size", "3"),
    "convert": ("convert", "{src}", "{dst}", "--to", "pt"),
    "rebase-schedule": ("rebase-schedule", "{src}", "{dst}", "--old-bs", "2", "--new-bs", "1"),
    "copy": ("copy", "{src}", "{dst}"),
    "average": ("average", "{src}", "{src}", "-o", "{dst}"),
}


def words(name: str, src: Path, dst: Path) -> list[object]:
    return [{"{src}": src, "{dst}": dst}.get(word, word) for word in COMMANDS[name]]


def make(kind: str, base: Path, src: Path) -> tuple[Path, list[str]]:
    """A destination that is refused, and the options that go with it."""
    dst = base / "out.pt"
    match kind:
        case "exists":
            dst.write_bytes(b"mine")
        case "somebody's own file":
            dst.write_bytes(b"mine")
            return dst, ["--force"]
        case "somebody's own folder":
            dst.mkdir()
            (dst / "notes.txt").write_text("mine")
            return dst, ["--force"]
        case "link":
            dst.symlink_to(base)
            return dst, ["--force"]
        case "no folder":
            return base / "nowhere" / "out.pt", []
        case "in the source":
            return src / "out.pt", []
        case "the source":
            return src, ["--force"]
    return dst, []


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "kind",
    [
        "exists",
        "somebody's own file",
        "somebody's own folder",
        "link",
        "no folder",
        "in the source",
        "the source",
    ],
)
def test_it_refuses_what_the_run_refuses(kind: str, name: str, ckpt: Ckpt, tmp_path: Path) -> None:
    src = shutil.copytree(TRAINER if name.startswith("rebase") else ZERO, tmp_path / "src")
    dst, options = make(kind, tmp_path, src)
    before = sorted(p.as_posix() for p in tmp_path.rglob("*"))
    dry = ckpt(*words(name, src, dst), *options, "--dry-run")
    assert sorted(p.as_posix() for p in tmp_path.rglob("*")) == before
    ran = ckpt(*words(name, src, dst), *options)
    assert (dry.code, ran.code) == (2, 2), (dry, ran)
    errors = [text[text.index("error[") :] for text in (dry.err, ran.err)]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["extract to a file", "reshard", "convert", "copy"])
def test_it_refuses_a_source_that_the_run_refuses(name: str, ckpt: Ckpt, tmp_path: Path) -> None:
    """A bit of the padding in front of a record, of which no checksum tells."""
    src = shutil.copytree(ZERO, tmp_path / "src")
    (model,) = src.rglob("mp_rank_00_model_states.pt")
    with zipfile.ZipFile(model) as archive:
        (at,) = (each.header_offset for each in archive.infolist() if each.filename.endswith("/data/1"))
    data = bytearray(model.read_bytes())
    names, padding = (int.from_bytes(data[at + n : at + n + 2], "little") for n in (26, 28))
    data[at + 30 + names + padding - 1] ^= 1
    model.write_bytes(data)
    dry, ran = (ckpt(*words(name, src, tmp_path / "out.pt"), *more) for more in (["--dry-run"], []))
    assert (dry.code, ran.code) == (1, 1) and "error[zip-unexplained]" in ran.err, (dry, ran)
    assert dry.err == ran.err
