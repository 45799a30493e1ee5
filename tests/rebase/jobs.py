"""One training run of a framework: what it is told, the data it sees, and what it records.

The scripts train_*.py of this folder are programs `train_X.py JOBS`: JOBS is a JSON list of `Job`s, done one
after the other. Each writes to `job.out` {"error", "records"}: the last line of what went wrong, or null, and
one record per unit of the framework's own counter (an update, or a micro-batch where it counts these):

    at      the counter before the unit
    lr      the learning rate of the optimizer's groups at the moment of its step (not what a scheduler says)
    momentum  beside it: the momentum or first beta, which some schedules move too
    ids     the samples that all ranks together consumed for it

A sample is its index. The order of an epoch depends on the epoch alone, not on the batch size, so that the
next sample can be compared between runs of different batch sizes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LR = 0.1
WIDTH = 4


@dataclass(frozen=True)
class Job:
    """One run: from the start, or from the checkpoint `resume`.

    `saves` gives the counts at which checkpoints are wanted and their paths (where the framework does not
    choose the path itself). `settings` replaces constants of the schedule that the script would derive.
    """

    out: str
    schedule: str
    size: int
    epochs: int
    micro: int
    accumulation: int = 1
    ranks: int = 1
    folder: str = ""
    saves: dict[int, str] = field(default_factory=dict)
    resume: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        """Micro-batches per epoch and rank."""
        return math.ceil(math.ceil(self.size / self.ranks) / self.micro)

    @property
    def updates(self) -> int:
        """Updates per epoch where an epoch's last group of micro-batches is flushed."""
        return math.ceil(self.batches / self.accumulation)


def order(size: int, epoch: int) -> list[int]:
    """The samples of one epoch."""
    generator = torch.Generator().manual_seed(1000 + epoch)
    permutation: list[int] = torch.randperm(size, generator=generator).tolist()
    return permutation


def shares(job: Job, epoch: int, rank: int) -> list[list[int]]:
    """The micro-batches of one rank in one epoch, cut as torch's DistributedSampler and DataLoader do."""
    ids = order(job.size, epoch)
    ids += ids[: -job.size % job.ranks]
    mine = ids[rank :: job.ranks]
    return [mine[i : i + job.micro] for i in range(0, len(mine), job.micro)]


def sample(index: int) -> torch.Tensor:
    """The input of one sample."""
    return torch.sin(torch.arange(WIDTH, dtype=torch.float32) * (index + 1))


def rows(ids: Sequence[int]) -> torch.Tensor:
    return torch.stack([sample(i) for i in ids])


class Indexed(torch.utils.data.Dataset[dict[str, Any]]):
    """The data set for frameworks that load data themselves."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": sample(index), "index": index}


class Network(torch.nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(torch.nn.Linear(WIDTH, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


class Recorder:
    """Collects the records of a run: `sees` what enters the model, `steps` when the optimizer moves."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self._ids: list[int] = []

    def sees(self, ids: Sequence[int] | torch.Tensor) -> None:
        self._ids += [int(i) for i in ids]

    def steps(self, at: int, groups: Sequence[dict[str, Any]]) -> None:
        momentum = [float(g["betas"][0] if "betas" in g else g["momentum"]) for g in groups]
        lr = [float(g["lr"]) for g in groups]
        self.records.append({"at": at, "lr": lr, "momentum": momentum, "ids": sorted(self._ids)})
        self._ids = []


def main(run: Callable[[Job, Recorder], None]) -> None:
    """The jobs of the file named on the command line, one after the other; one that fails ends alone."""
    for fields in json.loads(Path(sys.argv[1]).read_text()):
        fields["saves"] = {int(at): path for at, path in fields["saves"].items()}
        job, recorder, error = Job(**fields), Recorder(), None
        try:
            run(job, recorder)
        except Exception as problem:
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"
        if os.environ.get("RANK", "0") == "0":
            Path(job.out).write_text(json.dumps({"error": error, "records": recorder.records}))


def everywhere(ids: Sequence[int]) -> list[int]:
    """The samples of all ranks, where there are several."""
    if not dist.is_initialized():
        return list(ids)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(ids))
    return [i for part in gathered for i in part]


def dump(jobs: Sequence[Job], path: Path) -> Path:
    path.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    return path
