"""Real DeepSpeed engines, saved and resumed under other settings: what `ckpt resume-check` must foretell.

    torchrun --standalone --nproc_per_node=W --max-restarts=99 launch.py JOBS OUT

JOBS is a JSON list. A job either saves a checkpoint or loads one, on W ranks:

    {"id", "run", "save": FOLDER}     trains STEPS updates, saves, trains STEPS_AFTER more
    {"id", "run", "load": FOLDER}     builds an engine, loads, trains STEPS_AFTER updates

`run` says what a user's script and configuration say: {"model": options of Net, "groups": 1 to 3,
"config": the ds_config, "client_scheduler": a name or null, "strict": "
"load_module_strict}. The outcome goes to OUT/<id>.json:

    stage         build, load, train or done: how far it came
    error, text   class and message of the first error of any rank
    lr            per update, the learning rate of each group that it was made with; hyper: all of the groups'
                  settings right after the load
    losses        the mean over the global batch of each update, before it
    step          global_steps after the load

Every job stands alone. One that fails on some ranks only leaves others inside a collective: the ranks
exit, and torchrun starts them again on the jobs that have no outcome yet.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed_samples import allow_fp16_on_cpu, attempt, close, go_on, is_first_start, start
from net import SEQ, VOCAB, Net
from torch import nn
from torch.nn import functional as F

STEPS, STEPS_AFTER = 4, 3
LINEAR = F.linear  # ZeRO-3 replaces it for the whole process, and then bf16 sums round differently


def param_groups(model: nn.Module, number: int) -> list[dict[str, Any]]:
    """One group; or matrices and vectors; or those and the head."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if number == 1:
        return [{"params": [p for _, p in named]}]
    head = [p for n, p in named if n.startswith(("head", "classifier"))] if number == 3 else []
    rest = [p for _, p in named if all(p is not q for q in head)]
    split = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        {"params": head, "lr": 0.004},
    ]
    return split[:number]


def build(run: dict[str, Any]) -> Any:
    allow_fp16_on_cpu()
    torch.manual_seed(1)
    model = Net(**run.get("model", {}))
    schedulers = {
        "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 1 / (1 + n)),
        "ExponentialLR": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.9),
        "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3, 0.5),
    }
    return deepspeed.initialize(
        model=model,
        model_parameters=param_groups(model, run.get("groups", 1)),
        lr_scheduler=schedulers.get(run.get("client_scheduler") or ""),
        config=json.loads(json.dumps(run["config"])),
    )[0]


def learning_rates(engine: Any) -> list[float]:
    return [float(group["lr"]) for group in engine.optimizer.param_groups]


def hyper(engine: Any) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.tolist() if value.numel() == 1 else str(tuple(value.shape))
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    groups = engine.optimizer.param_groups
    return [{k: plain(v) for k, v in group.items() if k != "params"} for group in groups]


def train(engine: Any, steps: int, result: dict[str, Any]) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    accumulation = engine.gradient_accumulation_steps()
    size = engine.train_batch_size()
    for _ in range(steps):
        # a global batch is a function of the step alone, however it is cut
        generator = torch.Generator().manual_seed(1000 + engine.global_steps)
        x = torch.randint(0, VOCAB, (size, SEQ), generator=generator)
        y = (x.sum(1) * 3 + x[:, 0]) % VOCAB
        result["lr"].append(learning_rates(engine))
        total = torch.zeros(1, dtype=torch.float64)
        for micro in range(accumulation):
            part = slice(micro * ranks + rank, None, ranks * accumulation)
            loss = engine(x[part], y[part])
            engine.backward(loss)
            engine.step()
            total += loss.detach().double().cpu()
        dist.all_reduce(total)
        result["losses"].append(total.item() / ranks / accumulation)


def work(job: dict[str, Any], result: dict[str, Any]) -> None:
    engine = None
    result.update(stage="build", lr=[], losses=[])
    try:
        engine = build(job["run"])
        if "save" in job:
            train(engine, STEPS, {"lr": [], "losses": []})
            result["stage"] = "save"
            engine.save_checkpoint(job["save"], client_state={"epoch": 1})
            if dist.get_rank() == 0:
                torch.save(engine.module.state_dict(), f"{job['save']}.model.pt")
        else:
            result["stage"] = "load"
            path, _ = engine.load_checkpoint(
                job["load"], tag=job.get("tag"), load_module_strict=job["run"].get("strict", True)
            )
            result["found"] = path is not None
        result["step"] = engine.global_steps
        result["hyper"] = hyper(engine)
        result["stage"] = "train"
        train(engine, STEPS_AFTER, result)
        result["lr"].append(learning_rates(engine))
        result["stage"] = "done"
    finally:
        close(engine)
        F.linear = LINEAR


def last_line(error: str) -> tuple[str, str]:
    """Class and message of a traceback's error."""
    lines = error.strip().splitlines()
    tail = len(lines) - 1
    while tail and (lines[tail].startswith((" ", "\t")) or ":" not in lines[tail].split(" ")[0]):
        if not lines[tail].startswith((" ", "\t")) and lines[tail].split(" ")[0].isidentifier():
            break
        tail -= 1
    name, _, text = "\n".join(lines[tail:]).partition(":")
    return name.rpartition(".")[2], text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    start()
    jobs = json.loads(args.jobs.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    if is_first_start() and dist.get_rank() == 0:
        for job in jobs:
            (args.out / f"{job['id']}.json").unlink(missing_ok=True)
    dist.barrier()
    todo = [job for job in jobs if not (args.out / f"{job['id']}.json").exists()]
    dist.barrier()
    for job in todo:
        result: dict[str, Any] = {"id": job["id"], "world_size": dist.get_world_size()}
        outcome = attempt(job["id"], lambda job=job, result=result: work(job, result))  # type: ignore[misc]
        if outcome.is_writer:
            if outcome.error:
                result["error"], result["text"] = last_line(outcome.error)
                result["traceback"] = outcome.error
            partial = args.out / f".{job['id']}.{dist.get_rank()}"
            partial.write_text(json.dumps(result))
            partial.rename(args.out / f"{job['id']}.json")
        go_on(outcome)
    dist.barrier()
    os._exit(0)  # engines of several kinds in one process do not always shut down cleanly


if __name__ == "__main__":
    main()
