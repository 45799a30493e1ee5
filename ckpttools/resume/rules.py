"""DeepSpeed's loader, rule by rule: what a changed setting does to a saved engine.

Each rule is a function of what was saved and of the new run; it gives the differences that it sees, with
the error that DeepSpeed raises because of each. The errors were seen with DeepSpeed 0.19.8; sources:
runtime/config.py, runtime/engine.py (_load_checkpoint, _load_zero_checkpoint), runtime/zero/stage_1_and_2.py
(_load_legacy_checkpoint).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckpttools.errors import escape
from ckpttools.formats.zero.flat import original
from ckpttools.resume import report
from ckpttools.resume.engine import Saved
from ckpttools.resume.report import CAREFUL, IMPOSSIBLE, SAFE, Difference, Refusal
from ckpttools.resume.run import section, whole

DTYPES = ("bf16", "fp16")
ALIGNMENT = Refusal(
    moment=report.ALIGNMENT,
    error="RuntimeError",
    text="The ZeRO checkpoint parameter-alignment layout does not match the current "
    "zero_optimization.parameter_alignment setting.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Triple:
    """micro x accumulation x ranks = total, as DeepSpeed completes it; `problem` where it refuses."""

    total: int | None
    micro: int | None
    accumulation: int | None
    problem: str = ""


def triple(config: Mapping[str, object], ranks: int) -> Triple:
    """DeepSpeedConfig._set_batch_related_parameters and _batch_assertion."""
    total = whole(config.get("train_batch_size"))
    micro = whole(config.get("train_micro_batch_size_per_gpu"))
    steps = whole(config.get("gradient_accumulation_steps"))
    match total is not None, micro is not None, steps is not None:
        case True, True, False:
            assert total is not None and micro is not None
            steps = total // max(1, micro) // ranks
        case True, False, True:
            assert total is not None and steps is not None
            micro = total // ranks // max(1, steps)
        case False, True, True:
            assert micro is not None and steps is not None
            total = micro * steps * ranks
        case True, False, False:
            assert total is not None
            micro, steps = total // ranks, 1
        case False, True, False:
            assert micro is not None
            total, steps = micro * ranks, 1
        case True, True, True:
            pass
        case _:
            return Triple(total=None, micro=None, accumulation=None)
    assert total is not None and micro is not None and steps is not None
    problem = ""
    if min(total, micro, steps) < 1:
        problem = "has to be greater than 0"
    elif total != micro * steps * ranks:
        problem = (
            "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
            f"gradient_acc_step * world_size {total} != {micro} * {steps} * {ranks}"
        )
    return Triple(total=total, micro=micro, accumulation=steps, problem=problem)


def batch(saved: Saved, config: Mapping[str, object], ranks: int) -> Iterator[Difference]:
    """The batch triple. Nothing of it is compared on load: counters go on as they are."""
    old, new = triple(saved.config, saved.ranks), triple(config, ranks)
    if new.problem:
        yield Difference(
            setting="train_batch_size",
            old=old.total,
            new=new.total,
            cls=IMPOSSIBLE,
            why="the batch settings contradict each other on this number of ranks",
            hint="leave one of train_batch_size, train_micro_batch_size_per_gpu and "
            "gradient_accumulation_steps out",
            refusal=Refusal(moment=report.CONFIG, error="AssertionError", text=new.problem),
        )
    elif new.total is not None and old.total is not None and new.total != old.total:
        meaning = ""
        if saved.step is not None:
            seen = saved.step * old.total
            meaning = (
                f": {saved.step} updates of {old.total} were {seen} samples; {new.total} at a time, the same "
                f"number would be {saved.step * new.total}"
            )
        yield Difference(
            setting="train_batch_size",
            old=old.total,
            new=new.total,
            cls=CAREFUL,
            why=f"it loads, and every counter goes on as if nothing had changed{meaning}",
            hint=f"ckpt rebase-schedule {escape(saved.place)} --old-bs {old.total} --new-bs {new.total}",
        )
    elif (old.micro, old.accumulation) != (new.micro, new.accumulation) and new.total is not None:
        yield Difference(
            setting="micro batch x accumulation",
            old=f"{old.micro} x {old.accumulation}",
            new=f"{new.micro} x {new.accumulation}",
            cls=SAFE,
            why=f"the effective batch is still {new.total}; sums are rounded in another order",
        )


def ranks(saved: Saved, new_ranks: int) -> Iterator[Difference]:
    """The number of ranks: ZeRO's shards are cut for one."""
    if new_ranks == saved.ranks:
        return
    common: dict[str, Any] = {"setting": "ranks", "old": saved.ranks, "new": new_ranks}
    if saved.stage == 0:
        yield Difference(**common, cls=SAFE, why="without ZeRO every rank holds the whole state")
        return
    hint = f"ckpt reshard {escape(saved.place)} --world-size {new_ranks}"
    if saved.stage == 3:
        hint = f"start {saved.ranks} ranks, or use DeepSpeed's universal checkpoint"
    yield Difference(
        **common,
        cls=IMPOSSIBLE,
        why="each rank holds its own part of the optimizer's state, cut for this number of ranks",
        hint=hint,
        refusal=Refusal(
            moment=report.RANKS,
            error="ZeRORuntimeException",
            text=f"The checkpoint being loaded used a DP world size of {saved.ranks} but the current world "
            f"size is {new_ranks}.",
        ),
    )


def dtype_of(config: Mapping[str, object]) -> str:
    """The training dtype that a ds_config asks for."""
    for name in DTYPES:
        enabled = section(config, name).get("enabled")
        if enabled is True or (name == "bf16" and section(config, "bfloat16").get("enabled") is True):
            return name
    return "fp32"


def stage_of(config: Mapping[str, object], default: int) -> int:
    found = whole(section(config, "zero_optimization").get("stage"))
    if found is not None:
        return found
    return 0 if "zero_optimization" not in config else default


def stage_and_dtype(saved: Saved, new_stage: int, new_dtype: str) -> Iterator[Difference]:
    """Which files are looked for, by the stage and the dtype of the new engine."""
    weights = f"to start from the weights alone: ckpt extract {escape(saved.place)} --weights-only"
    if new_stage != saved.stage:
        between = {new_stage, saved.stage} <= {1, 2}
        yield Difference(
            setting="zero_optimization.stage",
            old=saved.stage,
            new=new_stage,
            cls=SAFE if between else IMPOSSIBLE,
            why="stages 1 and 2 save the same"
            if between
            else "the state lies in other files, in another form",
            hint="" if between else f"stay at stage {saved.stage}; {weights}",
            refusal=None if between else _stage_refusal(saved, new_stage, new_dtype),
        )
        if not between:
            return
    if new_dtype == saved.dtype:
        return
    common: dict[str, Any] = {"setting": "dtype", "old": saved.dtype, "new": new_dtype}
    if saved.stage == 0:
        if saved.whole is not None and (saved.whole == "torch") != (new_dtype == "fp32"):
            missing = "dynamic_loss_scale" if saved.whole == "torch" else "param_groups"
            yield Difference(
                **common,
                cls=IMPOSSIBLE,
                why="a 16-bit engine saves its optimizer with masters and a loss scale, one in fp32 without",
                hint=f"train in {saved.dtype}; {weights}",
                refusal=Refusal(moment=report.WHOLE_OPTIMIZER, error="KeyError", text=f"'{missing}'"),
            )
            return
    elif (saved.prefix == "bf16_") != (new_dtype == "bf16"):
        name = f"{'bf16_' if new_dtype == 'bf16' else ''}zero_pp_rank_0_mp_rank_00_optim_states.pt"
        yield Difference(
            **common,
            cls=IMPOSSIBLE,
            why="the optimizer files are named after the engine's dtype, and are not found under "
            "the other name",
            hint=f"train in {saved.dtype}; {weights}",
            refusal=Refusal(
                moment=report.SHARDS,
                error="FileNotFoundError",
                text=f"[Errno 2] No such file or directory: '{saved.folder / name}'",
            ),
        )
        return
    yield Difference(
        **common,
        cls=CAREFUL,
        why="it loads: the fp32 masters are the same, forward and backward are computed in the other dtype"
        + ("; the loss scale is the saved one" if "fp16" in (saved.dtype, new_dtype) else ""),
    )


def _stage_refusal(saved: Saved, new_stage: int, new_dtype: str) -> Refusal:
    if 3 in (saved.stage, new_stage):
        return Refusal(moment=report.FILES, error="AssertionError", text="")
    if new_stage == 0:
        if new_dtype == "fp32":
            error, text = "AttributeError", "'NoneType' object has no attribute 'copy'"
        else:
            error, text = "TypeError", "'NoneType' object is not subscriptable"
        return Refusal(moment=report.WHOLE_OPTIMIZER, error=error, text=text)
    name = f"{'bf16_' if new_dtype == 'bf16' else ''}zero_pp_rank_0_mp_rank_00_optim_states.pt"
    return Refusal(
        moment=report.SHARDS,
        error="FileNotFoundError",
        text=f"[Errno 2] No such file or directory: '{saved.folder / name}'",
    )


def compares_layout(saved: Saved, config: Mapping[str, object], stage: int, dtype: str) -> bool:
    """Whether the loader compares param_alignment_paddings: saved since 0.19.7, unread by BF16_Optimizer."""
    accumulated = section(config, "data_types").get("grad_accum_dtype")
    device = section(config, "zero_optimization", "offload_optimizer").get("device")
    bf16_optimizer = (
        stage == 1 and dtype == "bf16" and accumulated == "fp32" and device not in ("cpu", "nvme")
    )
    return saved.gaps is not None and stage in (1, 2) and not bf16_optimizer


def groups(saved: Saved, wanted: int | None, *, compared: bool) -> Iterator[Difference]:
    """The number of parameter groups; `compared`: see `compares_layout`."""
    held = len(saved.hyper) or len(saved.groups)
    if wanted is None or wanted == held:
        return
    refusal = Refusal(
        moment=report.WHOLE_OPTIMIZER if saved.stage == 0 else report.OPTIMIZER_STATE,
        error="ValueError",
        text="loaded state dict has a different number of parameter groups",
    )
    yield Difference(
        setting="parameter groups",
        old=held,
        new=wanted,
        cls=IMPOSSIBLE,
        why="the optimizer's state is saved group by group",
        hint="give the optimizer the parameter groups of the run that saved it",
        refusal=ALIGNMENT if compared else refusal,
    )


def layout(
    saved: Saved, config: Mapping[str, object], new_stage: int, new_dtype: str
) -> Iterator[Difference]:
    """Settings that order or space the parameters in ZeRO's flat groups."""
    if saved.stage not in (1, 2) or new_stage not in (1, 2):
        return
    old_zero, zero = section(saved.config, "zero_optimization"), section(config, "zero_optimization")
    was, now = (z.get("round_robin_gradients") is True for z in (old_zero, zero))
    if was != now:
        moved = any(list(original(tuple(g), saved.ranks)) != list(g) for g in saved.groups)
        yield Difference(
            setting="zero_optimization.round_robin_gradients",
            old=was,
            new=now,
            cls=IMPOSSIBLE if moved else SAFE,
            why="it loads without an error, and every parameter gets another one's master weights "
            "and moments: "
            "the setting decides the order in the flat groups"
            if moved
            else "with these parameters on this number of ranks both orders are the same",
            hint=f"set it to {str(was).lower()}, as in the run that saved it" if moved else "",
        )
    aligned = zero.get("parameter_alignment") is True
    if saved.gaps is not None and saved.gaps != _gaps(saved, aligned, new_dtype):
        yield Difference(
            setting="zero_optimization.parameter_alignment",
            old=old_zero.get("parameter_alignment", False),
            new=aligned,
            cls=IMPOSSIBLE,
            why="it decides where each parameter starts in the flat groups",
            hint="keep the setting of the run that saved it",
            refusal=ALIGNMENT,
        )


def _gaps(saved: Saved, aligned: bool, dtype: str) -> tuple[tuple[int, ...], ...]:
    """param_alignment_paddings: every parameter but the last starts at 16 bytes of the model's dtype."""
    unit = 4 if dtype == "fp32" else 8
    out = []
    for group in saved.groups:
        numels = [_numel(shape) for shape in group.values()]
        gaps = [-n % unit if aligned else 0 for n in numels]
        out.append((*gaps[:-1], 0) if gaps else ())
    return tuple(out)


def _numel(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def elastic(saved: Saved, config: Mapping[str, object]) -> Iterator[Difference]:
    """Elastic files have no param_groups, and DeepSpeed does not load its own."""
    if saved.variant != "elastic":
        return
    on = section(config, "zero_optimization").get("elastic_checkpoint") is True
    yield Difference(
        setting="zero_optimization.elastic_checkpoint",
        old=True,
        new=on,
        cls=IMPOSSIBLE,
        why="DeepSpeed fails to load the elastic form that it saved",
        hint=f"ckpt reshard {escape(saved.place)} --world-size {saved.ranks} writes the usual form",
        refusal=Refusal(
            moment=report.OPTIMIZER_STATE,
            error="AssertionError" if on else "KeyError",
            text="" if on else "'base_optimizer_state_step'",
        ),
    )


def universal(config: Mapping[str, object]) -> Iterator[Difference]:
    if section(config, "checkpoint").get("load_universal") is True:
        yield Difference(
            setting="checkpoint.load_universal",
            old=False,
            new=True,
            cls=IMPOSSIBLE,
            why="this is no universal checkpoint",
            hint='remove "load_universal", or convert with DeepSpeed\'s ds_to_universal.py',
            refusal=Refusal(
                moment=report.FILES - 1, error="ValueError", text="Invalid for universal checkpoint"
            ),
        )
