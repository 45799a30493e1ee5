"""What each framework does with a resumed run: its batch, its schedule, its names, and its configuration.

Seen in runs of the libraries, and in their sources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckpttools.resume.report import CAREFUL, IMPOSSIBLE, SAFE, About, Class
from ckpttools.training import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a framework does with another batch, and where the schedule's constants come from.

    `saved` says that they come from the checkpoint; `strict` that names are compared while loading; `prefix`
    that DDP's `module.` is removed before; `needs_optimizer` that weights alone are refused.
    """

    batch: str
    constants: str
    saved: bool = True
    strict: bool = True
    prefix: bool = True
    needs_optimizer: bool = False


RULES = {
    "mmengine": Rule(
        batch="the saved begin, end and T_max win over the new configuration: the run goes on along the old "
        "curve, in old iterations, and skips or repeats data",
        constants="the checkpoint",
        strict=False,
    ),
    "hf-trainer": Rule(
        batch="the schedule is computed anew for the new number of steps and continued at the old step: the "
        "learning rate jumps, and data is repeated or left out",
        constants="the new arguments; the base learning rate is the saved one",
        saved=False,
        strict=False,
    ),
    "lightning": Rule(
        batch="the saved schedule goes on in old steps: it ends too early or too late",
        constants="the checkpoint",
        prefix=False,
        needs_optimizer=True,
    ),
    "openpcdet": Rule(
        batch="`it` is taken as it is and the learning rate is computed from it: it jumps, and the epoch is "
        "cut short",
        constants="the new configuration",
        saved=False,
        strict=False,
    ),
    "accelerate": Rule(
        batch="the scheduler's counter goes on as it is; it counts per process, so another number of "
        "processes with the same batch each needs no change",
        constants="as the scheduler's class has it",
    ),
    "timm": Rule(
        batch="counters are epochs, which do not change", constants="the new configuration", saved=False
    ),
}
PLAIN = Rule(
    batch="the saved schedule and counters go on in old steps",
    constants="the checkpoint, where the code loads it",
    prefix=False,
)


def rule_of(training: Training | None) -> Rule:
    return RULES.get(training.framework, PLAIN) if training is not None else PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Settings of a framework's configuration, by a pattern of their paths, and what another value does."""

    pattern: str
    about: About = About.SETTING
    cls: Class
    why: str


# of an MMEngine configuration; the first pattern that matches the whole path counts
MMENGINE = (
    Setting(
        pattern=r"train_dataloader\.batch_size|optim_wrapper\.accumulative_counts|optim_wrapper\.optimizer\.lr|"
        r"strategy\..*|train_cfg\.max_.*|optim_wrapper\.optimizer\.params.*",
        cls=SAFE,
        why="",  # looked at by rules of their own
    ),
    Setting(
        pattern=r"param_scheduler.*", about=About.SCHEDULE, cls=SAFE,
        why="no effect: the saved ones are loaded",
    ),
    Setting(
        pattern=r"optim_wrapper\.optimizer\.type", about=About.OPTIMIZER, cls=IMPOSSIBLE,
        why="the optimizer's state is saved for its class",
    ),
    Setting(
        pattern=r"optim_wrapper\.optimizer\..*", cls=SAFE, why="no effect: the saved param_groups are loaded"
    ),
    Setting(
        pattern=r"model\..*", about=About.MODEL, cls=CAREFUL,
        why="whether every tensor still fits, a configuration does not tell: name the model with --model",
    ),
    Setting(
        pattern=r"(default|custom)_hooks.*|env_cfg.*|vis.*|log_.*|work_dir|(val|test)_.*|resume|load_from|"
        r"experiment_name|launcher|auto_scale_lr.*|.*(num_workers|persistent_workers|pin_memory|"
        r"prefetch_factor|interval|pipeline.*|transforms?)",
        cls=SAFE,
        why="it has no part in what is saved",
    ),
    Setting(
        pattern=r"train_dataloader\..*|randomness.*", about=About.DATA, cls=CAREFUL,
        why="it decides which samples come next",
    ),
    Setting(pattern=r".*", cls=CAREFUL, why="what it does to a resumed run is not judged here"),
)  # fmt: skip


def setting(path: str) -> Setting:
    return next(s for s in MMENGINE if re.fullmatch(s.pattern, path))
