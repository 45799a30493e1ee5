"""The learning rates with which a DeepSpeed run goes on: of the first update, and of the one after it.

The first is the saved param_groups'. The second is what the scheduler in effect writes after its next step:
one of DeepSpeed's own takes its constants from the new configuration, and where these name no peak the
learning rate that the optimizer was built with, which is the new configuration's too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ckpttools.errors import CkptError
from ckpttools.resume.deepspeed import schedulers
from ckpttools.resume.deepspeed.case import Case
from ckpttools.resume.deepspeed.saved import Saved
from ckpttools.resume.forecast import Rates
from ckpttools.resume.new_run import real, section, whole
from ckpttools.resume.rates import unexplained
from ckpttools.schedules.deepspeed.formulas import rule_of
from ckpttools.schedules.deepspeed.program import DeepSpeedProgram, recognise_deepspeed
from ckpttools.schedules.torch.program import recognise_torch


def rates(case: Case) -> Rates:
    """Both, per group."""
    saved = case.saved
    first = tuple(float(lr) for group in saved.hyper if (lr := real(group.get("lr"))) is not None)
    if not first or len(first) != len(saved.hyper):
        return Rates(note="the checkpoint holds no param_groups")
    try:
        following, note = _following(case, first)
    except CkptError as error:
        following, note = None, f"not forecast: {error.message}"
    return Rates(first=first, next=following, note=note)


def _following(case: Case, first: tuple[float, ...]) -> tuple[tuple[float, ...] | None, str]:
    saved, config, name = case.saved, case.config, case.scheduler
    if name is None:
        return first, "no scheduler: the learning rate stays as it is"
    if name in schedulers.ARGUMENTS:
        count = whole((saved.scheduler or {}).get(schedulers.OWN))
        if count is None:
            return None, "not forecast: the scheduler's counter is not in the checkpoint"
        params = dict(section(config, "scheduler", "params"))
        old = section(saved.config, "scheduler", "params")
        params = {k: old.get(k) if v == "auto" else v for k, v in params.items()}
        params = {k: v for k, v in params.items() if v is not None}
        rule = rule_of(name, params, [dict(group) for group in saved.hyper], _bases(saved, config))
        found = tuple(float(lr) for lr in rule(count + 1).lrs)
        if not case.configured and not _told(saved).explained:
            return None, f"not forecast: {unexplained(_told(saved))}"
        if any(map(math.isnan, found)):
            return (
                None,
                "not forecast: the optimizer's own learning rate, which the schedule multiplies, is "
                "not known",
            )
        return found, ""
    if saved.scheduler is None or schedulers.OWN in saved.scheduler:
        return None, f"not forecast: the constants of {name} are in the code"
    if case.run.scheduler is not None and not schedulers.same_class(saved.scheduler, name):
        return None, f"not forecast: the constants of {name} are in the code"
    program = recognise_torch([saved.scheduler], [dict(group) for group in saved.hyper], {})
    if not program.explained:
        return None, f"not forecast: {unexplained(program)}"
    machine = program.machine(fresh=False)
    machine.step()
    found = tuple(float(group["lr"]) for group in machine.groups)
    if any(map(math.isnan, found)):
        return None, "not forecast: the function that computes the learning rate is in the code"
    return found, ""


def _told(saved: Saved) -> DeepSpeedProgram:
    """What the saved run's own configuration makes of the saved schedule."""
    lr = real(section(saved.config, "optimizer", "params").get("lr"))
    about = {**section(saved.config, "scheduler"), "lr": lr}
    return recognise_deepspeed([dict(saved.scheduler or {})], list(saved.hyper), about)


def _bases(saved: Saved, config: Mapping[str, object]) -> list[float]:
    """The learning rates of the optimizer as the new run builds it, per group.

    A group has one of its own where the saved run's differs from that run's optimizer.params.lr.
    """
    old = real(section(saved.config, "optimizer", "params").get("lr"))
    new = real(section(config, "optimizer", "params").get("lr"))
    new = old if new is None else new
    inferred = _told(saved).bases
    if schedulers.type_of(saved.config) not in ("WarmupCosineLR",) and not (
        schedulers.type_of(saved.config) == "WarmupLR"
        and "warmup_max_lr" not in section(saved.config, "scheduler", "params")
    ):
        # the saved schedule does not show them
        return [math.nan if new is None else new for _ in saved.hyper]
    return [
        base if new is None or (old is not None and not math.isclose(base, old, rel_tol=1e-9)) else new
        for base in inferred
    ]
