"""Checkpoints loaded by an unmodified DeepSpeed, saved again and trained on.

    torchrun --standalone --nproc_per_node=M --max-restarts=99 deepspeed_resume.py JOBS

JOBS is a JSON list of {"load_dir", "tag", "variant", "resave_dir"} and, optionally, "result", "config"
and "lines"; `tag` may be null (use `latest`) and so may `resave_dir` (do not save again). `config` is laid
over the variant's ds_config. `lines` are lines of Python that stand for the load: those that name `engine`
are run when it is there, the others before, where they see `model` and `ds_config`. For each job the
variant's engine is built on M ranks, load_dir/tag is loaded, saved at once to resave_dir under the same tag,
and trained for the steps that follow those of the sample. The variant may be another than the one that wrote
the checkpoint (what was z2_elastic must be loaded as z2_bf16, stage 1 can be loaded as stage 2). One rank
writes to `result` (default: <resave_dir or load_dir>.resume.pt):

    ok, error       whether all of it went well, and otherwise the first error of any rank
    stage           build, load, read, resave or train: how far it came
    path            what load_checkpoint returned; client_state what it gave back
    loaded          what the engine held right after the load (see deepspeed_samples.truth)
    losses          of the next STEPS_AFTER steps, to compare with the sample's truth["losses"]
    fp32_after      master weights after those, to compare with truth["fp32_after"]

A job that fails alike on all ranks does not disturb the next. One that fails on some ranks, or in different
places, may leave others inside a collective: the ranks then exit and torchrun starts them again
(--max-restarts) on the jobs that have no result yet.
"""

import argparse
import datetime
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed_samples import (
    STEPS_AFTER,
    VARIANTS,
    attempt,
    build,
    close,
    go_on,
    is_first_start,
    pipelines_last,
    start,
    train,
    truth,
)

# the classes of the samples' own client values
KNOWN = [
    argparse.Namespace,
    datetime.datetime,
    datetime.timedelta,
    datetime.timezone,
    frozenset,
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
]


def resume(job: dict[str, Any], result: dict[str, Any]) -> None:
    v = VARIANTS[job["variant"]]
    engine = None
    try:
        result["stage"] = "build"
        lines = job.get("lines", [])
        engine = build(job["variant"], lambda model, config: prepare(job, model, config))
        result["stage"] = "load"
        if lines:
            names: dict[str, Any] = {"engine": engine, "torch": torch, "deepspeed": deepspeed}
            for line in lines:
                if re.search(r"\bengine\b", line):
                    exec(line, names)
            path, client_state = names.get("path"), names.get("client_state", {})
        else:
            path, client_state = engine.load_checkpoint(
                str(job["load_dir"]), tag=job.get("tag"), load_module_strict=not v.exclude_frozen
            )
        assert path is not None, "load_checkpoint found nothing"
        result.update(path=path, client_state=client_state)
        result["stage"] = "read"
        result["loaded"] = truth(engine)
        if job.get("resave_dir"):
            result["stage"] = "resave"
            if dist.get_rank() == 0:
                shutil.rmtree(job["resave_dir"], ignore_errors=True)
            dist.barrier()
            tag = job.get("tag") or f"global_step{engine.global_steps}"
            # 0.19.8 hands some of its own keys back as client state, and then refuses to save them
            for key in ("checkpoint_parallel_dimensions", "ds_autoep_layers"):
                client_state.pop(key, None)
            options = {"exclude_frozen_parameters": True} if v.exclude_frozen else {}
            engine.save_checkpoint(str(job["resave_dir"]), tag=tag, client_state=client_state, **options)
        result["stage"] = "train"
        result["losses"] = train(engine, STEPS_AFTER)
        result["fp32_after"] = truth(engine).get("fp32")
    finally:
        close(engine)


def prepare(job: dict[str, Any], model: torch.nn.Module, config: dict[str, Any]) -> None:
    for key, value in job.get("config", {}).items():
        both = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if both else value
    names: dict[str, Any] = {"model": model, "ds_config": config, "torch": torch}
    for line in job.get("lines", []):
        if "torch.serialization.add_safe_globals" in line:  # words for the reader, who knows the class
            torch.serialization.add_safe_globals(KNOWN)
        elif not re.search(r"\bengine\b", line):
            exec(line, names)


def write(result: dict[str, Any], error: str | None, out: Path) -> None:
    result.update(ok=error is None, error=error)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{out}.{dist.get_rank()}.partial")
    torch.save(result, partial)
    partial.rename(out)
    last = error.strip().splitlines()[-1] if error else "ok"
    print(f"RESUME {result['load_dir']}: {result['stage']}: {last}", flush=True)


def run(number: int, job: dict[str, Any], out: Path) -> None:
    result: dict[str, Any] = {**job, "world_size": dist.get_world_size(), "deepspeed": deepspeed.__version__}
    outcome = attempt(str(number), lambda: resume(job, result))
    if outcome.is_writer:
        write(result, outcome.error, out)
    go_on(outcome)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("jobs", type=Path, help="a JSON list")
    args = parser.parse_args()
    start()
    jobs = json.loads(args.jobs.read_text())
    outs = [
        Path(j.get("result") or f"{j.get('resave_dir') or j['load_dir']}.resume.pt").absolute() for j in jobs
    ]
    if is_first_start() and dist.get_rank() == 0:
        for out in outs:
            out.unlink(missing_ok=True)
    dist.barrier()
    todo = [(n, job, out) for n, (job, out) in enumerate(zip(jobs, outs, strict=True)) if not out.exists()]
    todo.sort(key=lambda t: pipelines_last(t[1]["variant"]))
    dist.barrier()
    for n, job, out in todo:
        run(n, job, out)
    dist.barrier()
    os._exit(0)  # engines of several kinds in one process do not always shut down cleanly


if __name__ == "__main__":
    main()
