"""What DeepSpeed refuses to build, and what becomes of the optimizer's state under another class.

Sources: deepspeed/runtime/engine.py (_do_sanity_check, _configure_basic_optimizer,
_do_optimizer_sanity_check). The order of the errors is the order of these functions there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpttools.resume import optimizers, report
from ckpttools.resume.engine import Saved
from ckpttools.resume.report import IMPOSSIBLE, Difference, Refusal
from ckpttools.resume.run import NewRun, section, whole


def optimizer(saved: Saved, run: NewRun, config: Mapping[str, object]) -> Iterator[Difference]:
    """The optimizer's class, its constructor, and whether ZeRO accepts it."""
    old = optimizers.configured(saved.config)
    if old is None and saved.hyper:
        old = optimizers.of_state(saved.hyper[0], saved.state[0])
    new = run.optimizer or optimizers.configured(config) or old
    if new is None or old is None:
        return
    yield from _buildable(config, old, new)
    if new == old or not saved.hyper:
        return
    found = optimizers.changed(old, new, saved.hyper[0], saved.state[0])
    refusal = found.refusal
    if refusal is not None and saved.stage == 0 and refusal.moment < report.UPDATE:
        refusal = Refusal(moment=report.WHOLE_OPTIMIZER, error=refusal.error, text=refusal.text)
    yield Difference(
        setting="optimizer.type",
        old=old,
        new=new,
        cls=found.cls,
        why=found.why,
        hint=f"go on with {old}" if found.cls == IMPOSSIBLE else "",
        refusal=refusal,
    )


def _buildable(config: Mapping[str, object], old: str, new: str) -> Iterator[Difference]:
    """What DeepSpeed refuses before anything is loaded."""
    name = section(config, "optimizer").get("type")
    if not isinstance(name, str):
        return
    known = new in optimizers.TORCH or name.lower() in optimizers.DEEPSPEED or name in _OTHERS
    if not known:
        yield Difference(
            setting="optimizer.type",
            old=old,
            new=name,
            cls=IMPOSSIBLE,
            why="there is no such optimizer in DeepSpeed or torch",
            hint="correct optimizer.type",
            refusal=Refusal(
                moment=report.OPTIMIZER - 5,
                error="AssertionError",
                text=f"{name} is not a supported DeepSpeed Optimizer",
            ),
        )
        return
    wrong = optimizers.unknown_setting(config)
    if wrong is not None:
        yield Difference(
            setting=f"optimizer.params.{wrong[1]}",
            old=None,
            new=section(config, "optimizer", "params")[wrong[1]],
            cls=IMPOSSIBLE,
            why=f"{wrong[0]} has no such setting",
            hint="remove it",
            refusal=Refusal(
                moment=report.OPTIMIZER,
                error="TypeError",
                text=f"{wrong[0]}.__init__() got an unexpected keyword argument '{wrong[1]}'",
            ),
        )
    zero = whole(section(config, "zero_optimization").get("stage")) or 0
    tested = (
        new in optimizers.ADAM
        or optimizers.is_native(new)
        or name.lower() in ("adam", "adamw", "lion", "adagrad", "muon")
    )
    if zero and not tested and config.get("zero_allow_untested_optimizer") is not True:
        yield Difference(
            setting="zero_allow_untested_optimizer",
            old=None,
            new=config.get("zero_allow_untested_optimizer"),
            cls=IMPOSSIBLE,
            why=f"ZeRO refuses {new} unless it is allowed",
            hint='set "zero_allow_untested_optimizer": true',
            refusal=Refusal(
                moment=report.OPTIMIZER + 5,
                error="AssertionError",
                text="You are using an untested ZeRO Optimizer.",
            ),
        )


_OTHERS = ("Rprop", "LBFGS", "SparseAdam", "Adadelta", "Adafactor", "Muon")  # torch's that are not forecast


def accumulation_dtype(config: Mapping[str, object], new_stage: int, new_dtype: str) -> Iterator[Difference]:
    """Stage 0 has no fp32 accumulation beside a 16-bit model."""
    wanted = section(config, "data_types").get("grad_accum_dtype")
    names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    if new_stage == 0 and wanted in names and wanted != new_dtype:
        yield Difference(
            setting="data_types.grad_accum_dtype",
            old=None,
            new=wanted,
            cls=IMPOSSIBLE,
            why="DeepSpeed does not build this engine",
            hint="use ZeRO stage 1, or leave data_types out",
            refusal=Refusal(
                moment=report.OPTIMIZER + 6,
                error="NotImplementedError",
                text=f"unsupported mix of model_dtype=torch.{names[new_dtype]} and "
                f"grad_accum_dtype=torch.{names[str(wanted)]}",
            ),
        )
