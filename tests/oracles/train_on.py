"""What ckpt wrote, loaded by its owner's library and trained on: one harness for DeepSpeed and torch.

    jobs = [Job(folder, "z2_bf16", ranks=3), ...]
    results = in_deepspeed(jobs, tmp_path)          # one torchrun for each number of ranks
    apart(results[0]["losses"], truth_of(sample)["losses"])

A variant is one of deepspeed_samples.VARIANTS: the model, the optimizer and the batches of a sample. A
fixture of DeepSpeed comes with the losses of the steps after it (`support.truth_of`), so that whatever it was
converted to can be held against the run that was never interrupted; `plain_run` gives the same for a loop in
torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support import identical

ORACLES = Path(__file__).parent
# Another number of ranks or stage sums the same gradients in another order and rounds the partial sums to the
# model's dtype. A wrongly placed parameter, moment or step costs more than 0.01 at once.
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint to be loaded: `variant` builds the engine, `config` is laid over its ds_config, `lines`
    are code that stands for the load (see deepspeed_resume).
    """

    folder: Path
    variant: str
    ranks: int = 2
    tag: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[str] = ()


def environment() -> dict[str, str]:
    """Ranks compute on the CPU."""
    ours = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours}


def in_deepspeed(jobs: Sequence[Job], scratch: Path, timeout: float = 1500) -> list[dict[str, Any]]:
    """Load each, train on; what deepspeed_resume tells, in the order of the jobs: `ok`, `error`, `loaded`
    (masters and state by name), `losses` of the next steps.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    results = [scratch / f"job{i}.result.pt" for i in range(len(jobs))]
    for ranks in dict.fromkeys(job.ranks for job in jobs):
        chosen = [(job, result) for job, result in zip(jobs, results, strict=True) if job.ranks == ranks]
        # the first engine of stage 3 replaces F.linear for the whole process by one that rounds otherwise
        chosen.sort(key=lambda pair: _stage3(pair[0]))
        listed = [
            {
                "load_dir": str(job.folder),
                "tag": job.tag,
                "variant": job.variant,
                "config": dict(job.config),
                "lines": list(job.lines),
                "result": str(result),
            }
            for job, result in chosen
        ]
        path = scratch / f"jobs{ranks}.json"
        path.write_text(json.dumps(listed))
        torchrun("deepspeed_resume.py", ranks, [path], timeout)
    return [torch.load(path, weights_only=False) for path in results]


def _stage3(job: Job) -> bool:
    stated = job.config.get("zero_optimization", {}).get("stage")
    return job.variant.startswith("z3_") if stated is None else stated == 3


def torchrun(script: str, ranks: int, arguments: Sequence[object], timeout: float = 1500) -> None:
    """A script of this folder on some ranks; those that get out of step are started again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--max-restarts=99", str(ORACLES / script), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference between two runs' losses, which are as many."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def stage(number: int) -> dict[str, Any]:
    """The `config` of a job that is to run another stage than its variant."""
    return {"zero_optimization": {"stage": number}}


def same_tensors(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Where two trees of tensors by name differ; the order of names is not looked at."""
    if isinstance(theirs, dict):
        if theirs.keys() != ours.keys():
            return [f"{path}: {sorted(theirs.keys() ^ ours.keys())}"]
        return [each for key in theirs for each in same_tensors(theirs[key], ours[key], f"{path}.{key}")]
    return [] if identical(theirs, ours) else [path]


# --- the same model in a plain loop -------------------------------------------------------------------


def plain(variant: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A variant's model and its optimizer in fp32, as deepspeed_samples makes them, without an engine."""
    import deepspeed_samples as samples

    v = samples.VARIANTS[variant]
    torch.manual_seed(1)
    model = samples.Net(**v.model)
    optimizer = samples.make_optimizer(v.optimizer, samples.param_groups(model, v.groups))
    assert optimizer is not None
    return model, optimizer


def plain_run(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int
) -> list[float]:
    """Train from step `first` on the samples' batches; the losses."""
    from deepspeed_samples import batch

    losses = []
    for step in range(first, first + steps):
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach().double()))
    return losses
