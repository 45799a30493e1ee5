"""What each framework does with a changed batch, and whose constants its schedule has after a resume.

Seen in runs of the libraries, and in their sources.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckpttools.training import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a framework does with another batch, and where the schedule's constants come from.

    `saved` says that they come from the checkpoint; `strict` that names are compared while loading.
    """

    batch: str
    constants: str
    saved: bool = True
    strict: bool = True


RULES = {
    "mmengine": Rule(
        batch="the saved begin, end and T_max win over the new configuration: the run goes on along "
        "the old curve, "
        "in old iterations, and skips or repeats data",
        constants="the checkpoint",
        strict=False,
    ),
    "hf-trainer": Rule(
        batch="the schedule is computed anew for the new number of steps and continued at the old "
        "step: the learning "
        "rate jumps, and data is repeated or left out",
        constants="the new arguments; the base learning rate is the saved one",
        saved=False,
        strict=False,
    ),
    "lightning": Rule(
        batch="the saved schedule goes on in old steps: it ends too early or too late",
        constants="the checkpoint",
    ),
    "openpcdet": Rule(
        batch="`it` is taken as it is and the learning rate is computed from it: it jumps, and the "
        "epoch is cut short",
        constants="the new configuration",
        saved=False,
    ),
    "accelerate": Rule(
        batch="the scheduler's counter goes on as it is; it counts per process, so another number "
        "of processes with "
        "the same batch each needs no change",
        constants="as the scheduler's class has it",
    ),
    "timm": Rule(
        batch="counters are epochs, which do not change", constants="the new configuration", saved=False
    ),
}
PLAIN = Rule(
    batch="the saved schedule and counters go on in old steps",
    constants="the checkpoint, where the code loads it",
)


def rule_of(training: Training | None) -> Rule:
    return RULES.get(training.framework, PLAIN) if training is not None else PLAIN
