"""Run folders, and the names of checkpoints in each of the four layouts (`save.layout`).

    iter         work_dirs/<experiment>/<timestamp>/{iter_000100.pth, epoch_001.pth}
    bundle       .../checkpoint-100/{deepspeed/global_step100/, hf_model/, training_info.json}
    monolithic   .../epoch_1_step_100.pt
    experiment   output/<group>/<config>/<tag>/{ckpt/checkpoint_epoch_1.pth, tensorboard/, log_train_*.txt}

A checkpoint is a directory that DeepSpeed fills, with `.pth` in its name as MMEngine has it, or a single file
where zero.stage is 0. Beside the checkpoints:

    latest             DeepSpeed's pointer: the newest tag's name
    last_checkpoint    ours, the same name, written when the checkpoint is whole, flushed and verified
    best_model.pt      the weights with the lowest validation loss

and in the run's folder config.yaml (the settings of the launch that last used it), hf_config/ (the model's
config.json, for `ckpt extract --hf-config`), train_log.jsonl (one JSON object per update and per evaluation),
logs/rank_N.log (everything that rank N printed), tensorboard/.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ckpttools.errors import UsageError
from ckpttools.formats import locate, read
from ckpttools.runs.find import Entry
from ckpttools.runs.find import paths as checkpoints_below
from ckpttools.runs.kinds import kind
from ckpttools.stores.files import local

if TYPE_CHECKING:
    from ckpttools.trainer.config import Config

POINTER = "last_checkpoint"
HF_CONFIG = "hf_config"
BEST = "best_model.pt"
BUNDLE = "deepspeed"
CKPT = "ckpt"  # of the layout `experiment`
_NAMES = {
    "iter": r"(iter|epoch)_\d+\.pth",
    "bundle": r"checkpoint-\d+",
    "monolithic": r"epoch_\d+_step_\d+\.pt",
    "experiment": r"checkpoint_(step|epoch)_\d+\.pth",
}
_TAG = re.compile(r"(iter|epoch)_(\d+)\.pth")
_SHARD = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")


def step_name(layout: str, *, epoch: int, iteration: int) -> str:
    """`epoch` counts from 1: the one that is running."""
    return {
        "iter": f"iter_{iteration:06d}.pth",
        "bundle": f"checkpoint-{iteration}",
        "monolithic": f"epoch_{epoch}_step_{iteration}.pt",
        "experiment": f"checkpoint_step_{iteration}.pth",
    }[layout]


def epoch_name(layout: str, *, epoch: int, iteration: int) -> str:
    """The name at the end of an epoch, counted from 1."""
    if layout in ("bundle", "monolithic"):
        return step_name(layout, epoch=epoch, iteration=iteration)
    return f"epoch_{epoch:03d}.pth" if layout == "iter" else f"checkpoint_epoch_{epoch}.pth"


def is_ours(name: str, layout: str) -> bool:
    """Whether `step_name` or `epoch_name` gives such a name."""
    return re.fullmatch(_NAMES[layout], name) is not None


def place(run: Path, layout: str) -> Path:
    """Where a run's checkpoints lie."""
    return run / CKPT if layout == "experiment" else run


def log(run: Path, layout: str, rank: int) -> Path:
    """Where a rank's full log goes; a new file for each launch of an experiment."""
    if layout == "experiment" and rank == 0:
        return run / f"log_train_{time.strftime('%Y%m%d-%H%M%S')}.txt"
    return run / "logs" / f"rank_{rank}.log"


def run_of(checkpoint: Path) -> Path:
    """The run's folder of one of its checkpoints."""
    folder = checkpoint.parent
    return folder.parent if folder.name == CKPT else folder


def experiment(config: Config) -> Path:
    """The folder that holds all runs of a configuration."""
    group = (config.save.group,) if config.save.layout == "experiment" else ()
    return Path(config.work_dirs or "work_dirs").joinpath(*group, config.experiment)


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
    """The tag folders of the layout `iter` in a run, oldest first: by time, then by number."""
    found = [(m, p) for p in run.glob("*.pth") if (m := _TAG.fullmatch(p.name)) and is_tag_folder(p)]
    return [p for _, p in sorted(found, key=lambda mp: (mp[1].stat().st_mtime_ns, int(mp[0][2])))]


def held(run: Path) -> int:
    """How many checkpoints a run's folder holds."""
    return len(checkpoints_below(run)) if run.is_dir() else 0


def resumable(entry: Entry) -> Path | None:
    """A checkpoint of this trainer that a run below holds, None for any other."""
    path = local(entry.path)
    ours = kind(entry) in ("step", "epoch")
    if path.is_dir():
        lost = path if ours and entry.damaged else None  # without its model file
        return path if (path / BUNDLE).is_dir() else tag_of(path) or lost
    # of a damaged file it is not known: the search looks at it and says so
    return path if entry.resumes is not False and ours else None


def inner(checkpoint: Path) -> Path:
    """What the engine loads: a bundle's tag folder, else the checkpoint itself. Raises UsageError."""
    if checkpoint.is_dir() and (checkpoint / BUNDLE).is_dir():
        return resolve(checkpoint / BUNDLE)
    return checkpoint if checkpoint.is_file() else resolve(checkpoint)


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


def stage(checkpoint: Path) -> int | None:
    """The ZeRO stage that saved it; 0 for a single file, None where it is neither."""
    layout = read(locate(checkpoint)).layout
    return 0 if layout.format == "pt" else layout.zero_stage
