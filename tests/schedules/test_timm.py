"""timm's schedulers by update, rebased: the real ones go on as from scratch; skipped without timm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from schedules.batches import BY_SIZE, changes
from schedules.torch_families import optimizer, plain_groups

from ckpttools.schedules import recognise

EPOCHS = 6
CLASSES = {
    "Cosine": ("cosine_lr", {"t_initial": 6, "lr_min": 1e-4}),
    "Cosine, cycles": ("cosine_lr", {"t_initial": 2, "cycle_limit": 3, "cycle_decay": 0.5, "warmup_t": 1}),
    "Cosine, growing": ("cosine_lr", {"t_initial": 1, "cycle_limit": 3, "cycle_mul": 2.0, "k_decay": 0.8}),
    "Tanh": ("tanh_lr", {"t_initial": 6, "warmup_t": 1, "warmup_lr_init": 0.01}),
    "Poly": ("poly_lr", {"t_initial": 5, "warmup_t": 1, "warmup_prefix": True}),
    "Step": ("step_lr", {"decay_t": 2, "decay_rate": 0.5, "warmup_t": 1}),
    "MultiStep": ("multistep_lr", {"decay_t": [1, 3, 4], "decay_rate": 0.5}),
}


def start(name: str, per_epoch: int) -> tuple[Any, Any]:
    module, own = CLASSES[name]
    lengths = {"t_initial", "warmup_t", "decay_t"}
    arguments = {
        k: ([x * per_epoch for x in v] if isinstance(v, list) else v * per_epoch) if k in lengths else v
        for k, v in own.items()
    }
    opt = optimizer(2)
    found = pytest.importorskip(f"timm.scheduler.{module}")
    return getattr(found, f"{name.partition(',')[0]}LRScheduler")(opt, t_in_epochs=False, **arguments), opt


def trace(scheduler: Any, opt: Any, begin: int, end: int) -> list[list[float]]:
    out = [[g["lr"] for g in opt.param_groups]]
    for count in range(begin + 1, end + 1):
        scheduler.step_update(count)
        out.append([g["lr"] for g in opt.param_groups])
    return out


@BY_SIZE
@pytest.mark.parametrize("name", CLASSES)
def test_goes_on_as_from_scratch(name: str, sizes: tuple[int, int]) -> None:
    pytest.importorskip("timm.scheduler")
    for change in changes(EPOCHS, sizes):
        total = change.steps.new_total
        assert total is not None
        truth = trace(*start(name, change.new), 0, total)
        for at in change.places():
            scheduler, opt = start(name, change.old)
            trace(scheduler, opt, 0, at)
            program = recognise("timm", [scheduler.state_dict()], plain_groups(opt), {"count": at})
            assert program.known and program.by_epoch is False
            rebased = program.rebased(change.steps)
            count = change.steps.position(at)
            resumed, opt = start(name, change.old)
            resumed.load_state_dict(copy.deepcopy(rebased.states()[0]))
            for group, values in zip(opt.param_groups, rebased.groups(), strict=True):
                group.update(values)
            assert trace(resumed, opt, count, total) == truth[count:], (change.name, at)
