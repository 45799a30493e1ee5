"""A loop on accelerate's save_state and load_state; the counter is the optimizer update (see jobs.py).

The position on resume is the prepared scheduler's own: it counts once per process (`last_epoch`), and
skip_first_batches passes over what was seen.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState, PartialState
from jobs import LR, Indexed, Job, Network, Recorder, main, order
from train_plain import SCHEDULES


class Order(torch.utils.data.Sampler[int]):
    """The epoch's order of jobs.py."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(order(self.size, self.epoch))

    def __len__(self) -> int:
        return self.size


def run(job: Job, recorder: Recorder) -> None:
    GradientState._reset_state()
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=job.accumulation)
    assert accelerator.num_processes == job.ranks
    sampler = Order(job.size)
    net = Network()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    # prepared schedulers are stepped once per process: their constants are in those steps
    scheduler = SCHEDULES[job.schedule](optimizer, job.updates * job.ranks, job.epochs)
    loader = torch.utils.data.DataLoader(Indexed(job.size), batch_size=job.micro, sampler=sampler)
    net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
    done = 0
    if job.resume:
        accelerator.load_state(job.resume)
        done = scheduler.scheduler.last_epoch // job.ranks
    optimizer.optimizer.register_step_pre_hook(lambda o, *_: recorder.steps(done, o.param_groups))
    while done < job.epochs * job.updates:
        sampler.epoch, inside = divmod(done, job.updates)
        for batch in skip_first_batches(loader, inside * job.accumulation):
            with accelerator.accumulate(net):
                recorder.sees(accelerator.gather(batch["index"]))
                accelerator.backward(net(batch["inputs"]).square().mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                if done in job.saves:
                    accelerator.save_state(job.saves[done])
    accelerator.free_memory()
    assert PartialState._shared_state  # the process group stays for the next job


if __name__ == "__main__":
    main(run)
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)
