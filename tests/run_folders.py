"""Random run folders for prune: what is in each file is known here, and nothing of ckpttools is asked."""

from __future__ import annotations

import functools
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import strategies as st
from support import FIXTURES

LOSSES = (9.0, 4.0, 3.5, 2.0, 2.5, 1.0, 1.5, 1.2, 3.0, 0.9, 1.1, 5.0, 6.0)  # by step, no two alike
TEMPLATE = FIXTURES / "hf-trainer" / "plain" / "checkpoint-2"
FOREIGN = {
    "notes.txt": b"mine",
    "train.py": b"print()",
    "epoch_3.log": b"log",
    "checkpoint-x": b"",
    "iter_7.pth": b"this is no checkpoint at all",
}
GUARDS = ("", "", "", "", "pin", "pointer", "link", "adapter", "hardlink", "foreign")


@dataclass(frozen=True)
class One:
    """A checkpoint to be made. `torn` is good, cut or not there in part; `guard` is why it must stay."""

    run: str  # two runs may share a folder: their names differ
    kind: str
    step: int
    torn: bool = False
    guard: str = ""

    @property
    def name(self) -> str:
        return (
            f"{self.run}checkpoint-{self.step}"
            if self.kind == "hf"
            else f"{self.run}{self.kind}_{self.step}.pth"
        )

    @property
    def series(self) -> str:
        return f"{self.run}{self.kind == 'hf'}"


@dataclass(frozen=True)
class Folder:
    checkpoints: tuple[One, ...]
    foreign: tuple[str, ...] = field(default=())

    def series(self) -> dict[str, list[One]]:
        """The good ones of each series, newest first."""
        out: dict[str, list[One]] = {}
        for one in sorted(self.checkpoints, key=lambda one: -one.step):
            if not one.torn:
                out.setdefault(one.series, []).append(one)
        return out

    def make(self, root: Path) -> Path:
        """The folder on disk, below `root`: other things lie beside it."""
        folder = root / "run"
        folder.mkdir(parents=True)
        for age, one in enumerate(sorted(self.checkpoints, key=lambda one: one.step)):
            path = folder / one.name
            _hf(path, one) if one.kind == "hf" else _file(path, one)
            _guard(root, path, one)
            for file in path.iterdir() if path.is_dir() else (path,):
                os.utime(file, (10_000 + age, 10_000 + age))
        for name in self.foreign:
            if not (folder / name).exists():
                (folder / name).write_bytes(FOREIGN[name])
        return folder


def _file(path: Path, one: One) -> None:
    data = saved(one.step)
    path.write_bytes(data[: len(data) // 2] if one.torn else data)


@functools.cache
def saved(step: int) -> bytes:
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    adam.step()
    state = {"model.weight": weight.data}
    out = io.BytesIO()
    torch.save(
        {"state_dict": state, "optimizer": adam.state_dict(), "global_step": step, "val_loss": LOSSES[step]},
        out,
    )
    return out.getvalue()


@functools.cache
def _template() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in TEMPLATE.iterdir()}


def _hf(path: Path, one: One) -> None:
    path.mkdir()
    for name, data in _template().items():
        (path / name).write_bytes(data)
    state = path / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": one.step}))
    if one.torn:
        os.truncate(path / "model.safetensors", 100)


def _guard(root: Path, path: Path, one: One) -> None:
    beside = root / "beside"
    beside.mkdir(exist_ok=True)
    match one.guard:
        case "pin":
            (path.parent / f".ckpt-pin-{path.name}.json").write_text("{}")
        case "pointer":
            (path.parent / "last_checkpoint").write_text(f"/once/here/{path.name}")
        case "link":
            (root / f"good-{path.name}").symlink_to(path)
        case "adapter":
            (path.parent / f"lora-{path.name}").mkdir(exist_ok=True)
            config = path.parent / f"lora-{path.name}" / "adapter_config.json"
            config.write_text(json.dumps({"base_model_name_or_path": f"/elsewhere/{path.name}"}))
        case "hardlink":
            for file in path.iterdir() if path.is_dir() else (path,):
                os.link(file, beside / f"{path.name}-{file.name}")
        case "foreign" if path.is_dir():
            (path / "my notes.txt").write_text("keep")


def kept_by_guard(one: One, pointed: str | None) -> bool:
    """`pointed` is what the pointer names in the end: it is one file."""
    match one.guard:
        case "pin" | "link" | "adapter":
            return True
        case "pointer":
            return one.name == pointed
        case "foreign":
            return one.kind == "hf"
    return False


ONES = st.builds(
    One,
    run=st.sampled_from(["", "", "b_"]),
    kind=st.sampled_from(["iter", "iter", "epoch", "hf"]),
    step=st.integers(1, 12),
    torn=st.sampled_from([False, False, False, True]),
    guard=st.sampled_from(GUARDS),
)
FOLDERS = st.builds(
    Folder,
    checkpoints=st.lists(ONES, min_size=1, max_size=9, unique_by=lambda one: (one.series, one.step)).map(
        tuple
    ),
    foreign=st.lists(st.sampled_from(sorted(FOREIGN)), max_size=3, unique=True).map(tuple),
)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything below, byte for byte; a link by where it leads."""
    out: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            out[name] = b"-> " + os.fsencode(path.readlink())
        elif path.is_file():
            out[name] = path.read_bytes()
    return out
