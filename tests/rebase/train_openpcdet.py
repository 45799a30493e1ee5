"""A loop as OpenPCDet's: `it` in the checkpoint, a one-cycle schedule in closed form of it, legacy files.

The counter is the iteration. As there: the schedule is set before each update from the absolute iteration; a
resumed run starts its epoch at `it % iterations per epoch` without skipping data; learning rate and betas are
numpy floats; the file is written in torch's format from before zip archives.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import LR, Job, Network, Recorder, main, rows, shares

MOMENTUMS = (0.95, 0.85)
DIVISOR, PEAK = 10, 0.4


def cosine(start: float, end: float, share: float) -> np.float64:
    return np.float64(end + (start - end) / 2 * (np.cos(np.pi * share) + 1))


def set_schedule(optimizer: torch.optim.Optimizer, it: int, total: int) -> None:
    """Up to LR over the first part of all iterations, then down to almost nothing."""
    turn, low = int(total * PEAK), LR / DIVISOR
    if it >= turn:
        share = (it - turn) / (total - turn)
        lr, momentum = cosine(LR, low / 1e4, share), cosine(MOMENTUMS[1], MOMENTUMS[0], share)
    else:
        lr, momentum = cosine(low, LR, it / turn), cosine(*MOMENTUMS, it / turn)
    for group in optimizer.param_groups:
        group.update(lr=lr, betas=(momentum, 0.99))


def run(job: Job, recorder: Recorder) -> None:
    net = Network()
    net.register_buffer("global_step", torch.zeros(1, dtype=torch.long))
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, weight_decay=0)
    epoch, it = 0, 0
    if job.resume:
        saved: dict[str, Any] = torch.load(job.resume, weights_only=False)
        net.load_state_dict(saved["model_state"])
        optimizer.load_state_dict(saved["optimizer_state"])
        epoch, it = saved["epoch"], saved["it"]
    optimizer.register_step_pre_hook(lambda o, *_: recorder.steps(it, o.param_groups))
    total = job.epochs * job.batches
    for current in range(epoch, job.epochs):
        batches = iter(shares(job, current, 0))
        first = it % job.batches if current == epoch else 0
        for _ in range(first, job.batches):
            ids = next(batches)
            set_schedule(optimizer, it, total)
            recorder.sees(ids)
            net(rows(ids)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            it += 1
            net.get_buffer("global_step").fill_(it)
            if it in job.saves:
                # checkpoint_epoch_N at an epoch's end, latest_model within one: epochs that are finished
                state = {
                    "epoch": it // job.batches,
                    "it": it,
                    "model_state": net.state_dict(),
                    "optimizer_state": optimizer.state_dict(),
                    "version": "pcdet+0.6.0",
                }
                Path(job.saves[it]).parent.mkdir(exist_ok=True)
                torch.save(state, job.saves[it], _use_new_zipfile_serialization=False)
    assert math.isfinite(float(sum(p.sum() for p in net.parameters())))


if __name__ == "__main__":
    main(run)
