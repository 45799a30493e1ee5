"""What DeepSpeed refuses to build, and the batch: the questions that a configuration alone answers.

Each error was seen with DeepSpeed 0.19.8 and torch 2.13 on real engines; sources are relative to deepspeed/.
"""

from __future__ import annotations

from collections.abc import Callable

from ckpttools.frameworks.rules import CAREFUL, SAFE, About
from ckpttools.resume.deepspeed import optimizers, schedulers
from ckpttools.resume.deepspeed.case import Case
from ckpttools.resume.deepspeed.rows import Question, Row
from ckpttools.resume.forecast import Moment
from ckpttools.resume.new_run import section

_ENGINE = "runtime/engine.py"


def _batch(c: Case) -> tuple[object, object]:
    return c.was.total, c.batch.total


BATCH: Question = (
    Row(
        about=About.BATCH, setting="train_batch_size", values=_batch,
        when=lambda c: c.configured and c.batch.problem,
        why="the batch settings contradict each other on this number of ranks",
        hint="leave one of train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps "
        "out",
        moment=Moment.CONFIG, error="AssertionError", text="{x}",
        source="runtime/config.py, _batch_assertion",
    ),
    Row(
        about=About.BATCH, setting="train_batch_size", values=_batch, cls=CAREFUL,
        when=lambda c: c.configured and c.batch.total is not None and c.was.total is None,
        why="the checkpoint does not state its batch: whether it is the same cannot be told",
        hint="ckpt batch {c.place} shows what is known",
    ),
    Row(
        about=About.BATCH, setting="train_batch_size", values=_batch, cls=CAREFUL,
        when=lambda c: c.configured and c.batch.total not in (None, c.was.total),
        why="it loads, and every counter goes on as if nothing had changed{c.batch_meaning}",
        hint="ckpt rebase-schedule {c.place} --old-bs {c.was.total} --new-bs {c.batch.total}",
    ),
    Row(
        about=About.BATCH, setting="micro batch x accumulation", cls=SAFE,
        when=lambda c: c.configured
        and c.batch.total is not None
        and (c.was.micro, c.was.accumulation) != (c.batch.micro, c.batch.accumulation),
        values=lambda c: (
            f"{c.was.micro} x {c.was.accumulation}", f"{c.batch.micro} x {c.batch.accumulation}"
        ),
        why="the effective batch is still {c.batch.total}; sums are rounded in another order",
    ),
)  # fmt: skip


def _dtypes(c: Case) -> tuple[str, str] | None:
    """The model's and the accumulation dtype, where stage 0 does not mix them."""
    names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    wanted = section(c.config, "data_types").get("grad_accum_dtype")
    if not c.configured or c.stage != 0 or wanted not in names or wanted == c.dtype:
        return None
    return names[c.dtype], names[str(wanted)]


ACCUMULATION: Question = (
    Row(
        about=About.ENGINE, setting="data_types.grad_accum_dtype", when=_dtypes,
        values=lambda c: (None, section(c.config, "data_types").get("grad_accum_dtype")),
        why="DeepSpeed does not build this engine", hint="use ZeRO stage 1, or leave data_types out",
        moment=Moment.DTYPES, error="NotImplementedError", source=f"{_ENGINE}, _do_optimizer_sanity_check",
        text="unsupported mix of model_dtype=torch.{x[0]} and grad_accum_dtype=torch.{x[1]}",
    ),
)  # fmt: skip
UNIVERSAL: Question = (
    Row(
        about=About.ENGINE, setting="checkpoint.load_universal", values=lambda c: (False, True),
        when=lambda c: c.configured and section(c.config, "checkpoint").get("load_universal") is True,
        why="this is no universal checkpoint",
        hint='remove "load_universal", or convert with DeepSpeed\'s ds_to_universal.py',
        moment=Moment.UNIVERSAL, error="ValueError", text="Invalid for universal checkpoint",
        source=f"{_ENGINE}, _load_checkpoint",
    ),
)  # fmt: skip


# --- optimizer ----------------------------------------------------------------------------------------

OPTIMIZER_NAME: Question = (
    Row(
        about=About.OPTIMIZER, setting="optimizer.type",
        values=lambda c: (c.old_optimizer, c.optimizer_type),
        when=lambda c: c.optimizer_type is not None and not c.known_optimizer,
        why="there is no such optimizer in DeepSpeed or torch", hint="correct optimizer.type",
        moment=Moment.OPTIMIZER_NAME, error="AssertionError", source=f"{_ENGINE}, _do_sanity_check",
        text="{c.optimizer_type} is not a supported DeepSpeed Optimizer",
    ),
)  # fmt: skip
OPTIMIZER_SETTING: Question = (
    Row(
        about=About.OPTIMIZER, setting="optimizer.params.{x[1]}",
        when=lambda c: c.optimizer_type and c.known_optimizer and optimizers.unknown_setting(c.config),
        why="{x[0]} has no such setting", hint="remove it",
        moment=Moment.OPTIMIZER, error="TypeError", source=f"{_ENGINE}, _configure_basic_optimizer",
        text="{x[0]}.__init__() got an unexpected keyword argument '{x[1]}'",
    ),
)  # fmt: skip
UNTESTED_OPTIMIZER: Question = (
    Row(
        about=About.OPTIMIZER, setting="zero_allow_untested_optimizer",
        values=lambda c: (None, c.config.get("zero_allow_untested_optimizer")),
        when=lambda c: c.optimizer_type
        and c.known_optimizer
        and section(c.config, "zero_optimization").get("stage")
        and not c.tested_optimizer
        and c.config.get("zero_allow_untested_optimizer") is not True,
        why="ZeRO refuses {c.optimizer} unless it is allowed",
        hint='set "zero_allow_untested_optimizer": true',
        moment=Moment.UNTESTED_OPTIMIZER, error="AssertionError",
        text="You are using an untested ZeRO Optimizer.", source=f"{_ENGINE}, _do_optimizer_sanity_check",
    ),
)  # fmt: skip

# --- scheduler ----------------------------------------------------------------------------------------


def _unbuildable(when: Callable[[Case, str], object], error: str, text: str, why: str, hint: str) -> Row:
    def named(c: Case) -> object:
        name = schedulers.type_of(c.config)
        return None if name is None or c.run.scheduler is not None else when(c, name)

    return Row(
        about=About.SCHEDULE, setting="scheduler", values=lambda c: (None, schedulers.type_of(c.config)),
        when=named, why=why, hint=hint, moment=Moment.SCHEDULER, error=error, text=text,
        source=f"{_ENGINE}, _configure_lr_scheduler",
    )  # fmt: skip


_FIVE = "DeepSpeed builds its own five schedulers; one of torch's has to be passed by the code"
_USE = f"use one of {', '.join(schedulers.ARGUMENTS)}"
_CANNOT = "the scheduler cannot be built with these settings"
_CORRECT = "correct scheduler.params"
SCHEDULER: Question = (
    _unbuildable(lambda c, name: name in schedulers.TORCH and name, "TypeError",
                 "DeepSpeedZeroOptimizer is not an Optimizer", _FIVE, _USE),
    _unbuildable(lambda c, name: name not in schedulers.ARGUMENTS and name, "AssertionError",
                 "DeepSpeed does not recognize LR scheduler {x}", _FIVE, _USE),
    _unbuildable(lambda c, name: schedulers.unknown(c.config, name), "TypeError",
                 "{x[0]}.__init__() got an unexpected keyword argument '{x[1]}'", _CANNOT, _CORRECT),
    _unbuildable(lambda c, name: schedulers.missing(c.config, name), "TypeError",
                 "{x[0]}.__init__() missing {x[1]} required positional argument", _CANNOT, _CORRECT),
    _unbuildable(lambda c, name: schedulers.bad_warmup(c.config), "ValueError",
                 "warmup_num_steps must be a positive integer, got {x[0]}", _CANNOT, _CORRECT),
)  # fmt: skip
