"""Run folders and tags: `work_dirs/<experiment>/<timestamp>/{iter_000100.pth, epoch_001.pth, ...}`.

A tag is a directory that DeepSpeed fills, with `.pth` in its name as MMEngine has it. Beside the tags:

    latest             DeepSpeed's pointer: the newest tag's name
    last_checkpoint    ours, the same name, written when every rank has finished its files
    config.yaml        the settings of the launch that last used the folder
    hf_config/         the model's config.json, for `ckpt extract --hf-config`
    train_log.jsonl    one JSON object per update and per evaluation
    logs/rank_N.log    everything that rank N printed
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from ckpttools.errors import UsageError

POINTER = "last_checkpoint"
HF_CONFIG = "hf_config"
_TAG = re.compile(r"(iter|epoch)_(\d+)\.pth")
_SHARD = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")


def step_tag(iteration: int) -> str:
    return f"iter_{iteration:06d}.pth"


def epoch_tag(epoch: int) -> str:
    return f"epoch_{epoch:03d}.pth"


def new_run(work_dirs: Path, experiment: str) -> Path:
    """A folder name that no earlier run of the experiment has; nothing is created."""
    stamp = time.strftime("%Y%m%d_%H%M%S")
    run, again = work_dirs / experiment / stamp, 1
    while run.exists():
        again += 1
        run = work_dirs / experiment / f"{stamp}_{again}"
    return run


def write_text(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new text, never a part."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staging.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself reaches the disk
    finally:
        os.close(folder)


def is_tag_folder(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*_model_states.pt"))


def tags(run: Path) -> list[Path]:
    """The trainer's own tag folders in a run, oldest first: by time, then by number."""
    found = [(m, p) for p in run.glob("*.pth") if (m := _TAG.fullmatch(p.name)) and is_tag_folder(p)]
    return [p for _, p in sorted(found, key=lambda mp: (mp[1].stat().st_mtime_ns, int(mp[0][2])))]


def tag_of(path: Path) -> Path | None:
    """A tag folder, or the one that `latest` in a folder names; None where there is neither."""
    if is_tag_folder(path):
        return path
    tag = _latest(path)
    return path / tag if tag and Path(tag).name == tag and is_tag_folder(path / tag) else None


def resolve(path: Path) -> Path:
    """The same for a path that somebody named. Raises UsageError where there is neither."""
    found = tag_of(path)
    if found is not None:
        return found
    tag = _latest(path)
    raise UsageError(
        "not-a-checkpoint",
        f"`latest` names {tag}, which holds no checkpoint" if tag else "no DeepSpeed checkpoint here",
        where=path,
        why="a checkpoint is a folder with *_model_states.pt, or one whose file `latest` names such a folder",
        hint="give the tag folder itself, for example RUN/iter_000100.pth",
    )


def _latest(path: Path) -> str:
    try:
        return (path / "latest").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def shards(tag_folder: Path) -> tuple[int, bool]:
    """Number of data-parallel ranks that saved optimizer states, and whether a bf16 engine did."""
    found = [m for p in tag_folder.iterdir() if (m := _SHARD.fullmatch(p.name))]
    return len({int(m[2]) for m in found}), any(m[1] for m in found)
