"""A plain torch loop with a monolithic .pt; the counter is the optimizer update (see jobs.py).

The loop is the usual one: `global_step` says where to go on, `load_state_dict` restores the optimizer and the
scheduler, and the scheduler is stepped once per update.
"""

from __future__ import annotations

from typing import Any

import torch
from jobs import LR, Job, Network, Recorder, main, rows, shares
from torch.optim import lr_scheduler as lrs

# a schedule's constants are defined by epochs: `u` updates each, `e` of them in all
SCHEDULES: dict[str, Any] = {
    "StepLR": lambda o, u, e: lrs.StepLR(o, step_size=u, gamma=0.5),
    "MultiStepLR": lambda o, u, e: lrs.MultiStepLR(o, milestones=[u, (e - 1) * u], gamma=0.1),
    "ExponentialLR": lambda o, u, e: lrs.ExponentialLR(o, gamma=0.3 ** (1 / u)),
    "PolynomialLR": lambda o, u, e: lrs.PolynomialLR(o, total_iters=e * u, power=2.0),
    "LinearLR": lambda o, u, e: lrs.LinearLR(o, start_factor=0.1, end_factor=1.0, total_iters=2 * u),
    "ConstantLR": lambda o, u, e: lrs.ConstantLR(o, factor=0.25, total_iters=u),
    "CosineAnnealingLR": lambda o, u, e: lrs.CosineAnnealingLR(o, T_max=e * u, eta_min=LR / 100),
    "CosineAnnealingWarmRestarts": lambda o, u, e: lrs.CosineAnnealingWarmRestarts(o, T_0=u, T_mult=2),
    "CyclicLR": lambda o, u, e: lrs.CyclicLR(
        o, base_lr=LR / 10, max_lr=LR, step_size_up=u, step_size_down=2 * u
    ),
    "OneCycleLR": lambda o, u, e: lrs.OneCycleLR(o, max_lr=LR, total_steps=e * u),
    "SequentialLR": lambda o, u, e: lrs.SequentialLR(
        o,
        [
            lrs.LinearLR(o, start_factor=0.01, total_iters=u),
            lrs.CosineAnnealingLR(o, T_max=(e - 1) * u),
        ],
        milestones=[u],
    ),
    "ChainedScheduler": lambda o, u, e: lrs.ChainedScheduler(
        [lrs.LinearLR(o, start_factor=0.1, total_iters=u), lrs.StepLR(o, step_size=2 * u, gamma=0.1)]
    ),
    "LambdaLR": lambda o, u, e: lrs.LambdaLR(o, lambda step: 1 / (1 + step / u)),
}


def run(job: Job, recorder: Recorder) -> None:
    net = Network()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    scheduler = SCHEDULES[job.schedule](optimizer, job.updates, job.epochs)
    done = 0
    if job.resume:
        saved = torch.load(job.resume, weights_only=False)
        net.load_state_dict(saved["model_state_dict"])
        optimizer.load_state_dict(saved["optimizer_state_dict"])
        scheduler.load_state_dict(saved["scheduler_state_dict"])
        done = saved["global_step"]
    optimizer.register_step_pre_hook(lambda o, *_: recorder.steps(done, o.param_groups))
    loss = torch.zeros(())
    while done < job.epochs * job.updates:
        epoch, inside = divmod(done, job.updates)
        micro = shares(job, epoch, 0)
        for start in range(inside * job.accumulation, len(micro), job.accumulation):
            for ids in micro[start : start + job.accumulation]:
                recorder.sees(ids)
                loss = net(rows(ids)).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            scheduler.step()
            if done in job.saves:
                saved = {
                    "epoch": done // job.updates,
                    "global_step": done,
                    "model_state_dict": net.state_dict(),
                    "optimizer_state_dict": optimizer.state_dict(),
                    "scheduler_state_dict": scheduler.state_dict(),
                    "train_loss": float(loss),
                    "val_loss": None,
                }
                torch.save(saved, job.saves[done])


if __name__ == "__main__":
    main(run)
