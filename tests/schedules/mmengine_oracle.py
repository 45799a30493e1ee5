"""Runs MMEngine's own schedulers, in an interpreter that has mmengine: jobs as Python literals on stdin.

A job is {"groups": [lr, ...], "optimizer": "sgd" | "adam", "schedulers": [config entries], "epoch": L,
"steps": n, "save": [counts], "load": None | (states, groups, count)}; its answer {"trace": [...],
"saved": {count: (states, groups)}}. This is what Runner.build_param_scheduler and ParamSchedulerHook do.
"""

import ast
import copy
import sys

import torch
from mmengine.optim import OptimWrapper
from mmengine.optim import scheduler as _  # noqa: F401  (registers them)
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope


def plain(value):
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else value.__qualname__


def written(groups):
    return [(g["lr"], g.get("momentum"), g.get("betas")) for g in groups]


def run(job):
    params = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in job["groups"]]
    make = torch.optim.SGD if job["optimizer"] == "sgd" else torch.optim.AdamW
    extra = {"momentum": 0.9} if job["optimizer"] == "sgd" else {}
    wrapper = OptimWrapper(make(params, lr=job["groups"][0], **extra))
    schedulers = []
    for entry in job["schedulers"]:
        entry = copy.deepcopy(entry)
        entry.setdefault(
            "end", job["epochs"] if entry.get("by_epoch", True) else job["epochs"] * job["epoch"]
        )
        args = {"optimizer": wrapper, "epoch_length": job["epoch"]}
        schedulers.append(PARAM_SCHEDULERS.build(entry, default_args=args))
    count = 0
    if job["load"] is not None:
        states, groups, count = job["load"]
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict({k: v for k, v in state.items() if k != "anneal_func"})
        for group, values in zip(wrapper.param_groups, groups, strict=True):
            group.update(values)
    trace, saved = [written(wrapper.param_groups)], {}

    def save():
        if count in job["save"]:
            states = [plain(s.state_dict()) for s in schedulers]
            saved[count] = (
                states,
                [plain({k: v for k, v in g.items() if k != "params"}) for g in wrapper.param_groups],
            )

    save()
    while count < job["steps"]:
        count += 1
        for scheduler in schedulers:
            if not scheduler.by_epoch:
                scheduler.step()
        if count % job["epoch"] == 0:
            for scheduler in schedulers:
                if scheduler.by_epoch:
                    scheduler.step()
        trace.append(written(wrapper.param_groups))
        save()
    return {"trace": trace, "saved": saved}


init_default_scope("mmengine")
for line in sys.stdin:
    if line.strip():
        print("ANSWER", repr(run(ast.literal_eval(line))), flush=True)
