"""What DeepSpeed does while it loads.

Each error was seen with DeepSpeed 0.19.8 and torch 2.13 on real engines; sources are relative to deepspeed/.
"""

from __future__ import annotations

from collections.abc import Callable

from ckpttools.frameworks.rules import CAREFUL, SAFE, About
from ckpttools.resume.deepspeed import schedulers
from ckpttools.resume.deepspeed.case import Case
from ckpttools.resume.deepspeed.rows import Question, Row
from ckpttools.resume.forecast import Moment

_NO_WEIGHTS = "to start from the weights alone: ckpt extract {c.place} --weights-only"
_LAYOUT = (
    "The ZeRO checkpoint parameter-alignment layout does not match the current "
    "zero_optimization.parameter_alignment setting."
)
_SIZES = "The size of tensor a"
_ENGINE, _ZERO = "runtime/engine.py", "runtime/zero/stage_1_and_2.py"
_LOAD = f"{_ENGINE}, _load_checkpoint"
_ALIGNED = f"{_ZERO}, _load_legacy_checkpoint"
_TORCH_OPTIMIZER = "torch/optim/optimizer.py, load_state_dict"


def _ranks(c: Case) -> tuple[object, object]:
    return c.saved.ranks, c.ranks


RANKS: Question = (
    Row(
        about=About.ENGINE, setting="ranks", values=_ranks, cls=SAFE,
        when=lambda c: c.ranks != c.saved.ranks and c.saved.stage == 0,
        why="without ZeRO every rank holds the whole state",
    ),
    *(
        Row(
            about=About.ENGINE, setting="ranks", values=_ranks, when=when, hint=hint,
            why="each rank holds its own part of the optimizer's state, cut for this number of ranks",
            moment=Moment.RANKS, error="ZeRORuntimeException",
            text="The checkpoint being loaded used a DP world size of {c.saved.ranks} but the current world "
            "size is {c.ranks}.", source=f"{_ENGINE}, _get_all_zero_checkpoint_names",
        )
        for when, hint in (
            (lambda c: c.ranks != c.saved.ranks and c.saved.stage == 3,
             "start {c.saved.ranks} ranks, or use DeepSpeed's universal checkpoint"),
            (lambda c: c.ranks != c.saved.ranks, "ckpt reshard {c.place} --world-size {c.ranks}"),
        )
    ),
)  # fmt: skip


def _stage(when: Callable[[Case], object], moment: Moment, error: str, text: str, source: str) -> Row:
    return Row(
        about=About.ENGINE, setting="zero_optimization.stage", values=lambda c: (c.saved.stage, c.stage),
        when=lambda c: c.other_files and when(c), why="the state lies in other files, in another form",
        hint="stay at stage {c.saved.stage}; " + _NO_WEIGHTS,
        moment=moment, error=error, text=text, source=source,
    )  # fmt: skip


_MISSING_SHARD = "[Errno 2] No such file or directory: '{c.shard}'"
_SHARD_NAMES = f"{_ENGINE}, _get_zero_ckpt_name"
STAGE: Question = (
    Row(
        about=About.ENGINE, setting="zero_optimization.stage", cls=SAFE,
        values=lambda c: (c.saved.stage, c.stage), when=lambda c: c.other_stage and not c.other_files,
        why="stages 1 and 2 save the same",
    ),
    _stage(lambda c: 3 in (c.saved.stage, c.stage), Moment.FILES, "AssertionError", "",
           f"{_ENGINE}, _get_ckpt_name"),
    _stage(lambda c: c.stage == 0 and c.dtype == "fp32", Moment.WHOLE_OPTIMIZER, "AttributeError",
           "'NoneType' object has no attribute 'copy'", _TORCH_OPTIMIZER),
    _stage(lambda c: c.stage == 0, Moment.WHOLE_OPTIMIZER, "TypeError",
           "'NoneType' object is not subscriptable", "runtime/fp16/fused_optimizer.py, load_state_dict"),
    _stage(lambda c: True, Moment.SHARDS, "FileNotFoundError", _MISSING_SHARD, _SHARD_NAMES),
)  # fmt: skip


def _dtype(c: Case) -> tuple[object, object]:
    return c.saved.dtype, c.dtype


def _other_whole(c: Case) -> str:
    """Stage 0: the key that the new engine's optimizer looks for in the old one's state."""
    if c.saved.stage != 0 or c.saved.whole is None or (c.saved.whole == "torch") == (c.dtype == "fp32"):
        return ""
    return "dynamic_loss_scale" if c.saved.whole == "torch" else "param_groups"


DTYPE: Question = (
    Row(  # answered by STAGE
        about=About.ENGINE, setting="", when=lambda c: c.other_files or c.dtype == c.saved.dtype, why=""
    ),
    Row(
        about=About.ENGINE, setting="dtype", values=_dtype, when=_other_whole,
        why="a 16-bit engine saves its optimizer with masters and a loss scale, one in fp32 without",
        hint="train in {c.saved.dtype}; " + _NO_WEIGHTS,
        moment=Moment.WHOLE_OPTIMIZER, error="KeyError", text="'{x}'", source=_LOAD,
    ),
    Row(
        about=About.ENGINE, setting="dtype", values=_dtype,
        when=lambda c: c.saved.stage and (c.saved.prefix == "bf16_") != (c.dtype == "bf16"),
        why="the optimizer files are named after the engine's dtype, and are not found under the other name",
        hint="train in {c.saved.dtype}; " + _NO_WEIGHTS,
        moment=Moment.SHARDS, error="FileNotFoundError", text=_MISSING_SHARD, source=_SHARD_NAMES,
    ),
    Row(
        about=About.ENGINE, setting="dtype", values=_dtype, cls=CAREFUL,
        when=lambda c: "fp16" in (c.saved.dtype, c.dtype),
        why="it loads: the fp32 masters are the same, forward and backward are computed in the other dtype; "
        "the loss scale is the saved one",
    ),
    Row(
        about=About.ENGINE, setting="dtype", values=_dtype, cls=CAREFUL, when=lambda c: True,
        why="it loads: the fp32 masters are the same, forward and backward are computed in the other dtype",
    ),
)  # fmt: skip


def _groups(when: Callable[[Case], object], moment: Moment, error: str, text: str, source: str) -> Row:
    return Row(
        about=About.OPTIMIZER, setting="parameter groups", values=lambda c: (c.held_groups, c.run.groups),
        when=lambda c: c.other_groups and when(c), why="the optimizer's state is saved group by group",
        hint="give the optimizer the parameter groups of the run that saved it",
        moment=moment, error=error, text=text, source=source,
    )  # fmt: skip


_OTHER_GROUPS = "loaded state dict has a different number of parameter groups"
GROUPS: Question = (
    _groups(lambda c: c.compares_layout, Moment.ALIGNMENT, "RuntimeError", _LAYOUT, _ALIGNED),
    _groups(lambda c: c.saved.stage == 0, Moment.WHOLE_OPTIMIZER, "ValueError", _OTHER_GROUPS,
            _TORCH_OPTIMIZER),
    _groups(lambda c: True, Moment.OPTIMIZER_STATE, "ValueError", _OTHER_GROUPS, _TORCH_OPTIMIZER),
)  # fmt: skip


def _elastic(on: bool, error: str, text: str) -> Row:
    return Row(
        about=About.ENGINE, setting="zero_optimization.elastic_checkpoint", values=lambda c: (True, on),
        when=lambda c: c.saved.variant == "elastic" and c.zero("elastic_checkpoint")[1] is on,
        why="DeepSpeed fails to load the elastic form that it saved",
        hint="ckpt reshard {c.place} --world-size {c.saved.ranks} writes the usual form",
        moment=Moment.OPTIMIZER_STATE, error=error, text=text, source=f"{_ZERO}, _load_legacy_checkpoint",
    )  # fmt: skip


ELASTIC: Question = (
    _elastic(True, "AssertionError", ""),
    _elastic(False, "KeyError", "'base_optimizer_state_step'"),
)


def _round_robin(c: Case) -> str:
    """The saved setting, where the new one is another."""
    was, now = c.zero("round_robin_gradients")
    return str(was).lower() if c.flat and was != now else ""


ROUND_ROBIN: Question = (
    Row(
        about=About.ENGINE, setting="zero_optimization.round_robin_gradients", cls=SAFE,
        values=lambda c: c.zero("round_robin_gradients"),
        when=lambda c: _round_robin(c) and not c.round_robin_moves,
        why="with these parameters on this number of ranks both orders are the same",
    ),
    Row(
        about=About.ENGINE, setting="zero_optimization.round_robin_gradients",
        values=lambda c: c.zero("round_robin_gradients"), when=_round_robin,
        why="it loads without an error, and every parameter gets another one's master weights and moments: "
        "the setting decides the order in the flat groups",
        hint="set it to {x}, as in the run that saved it",
    ),
)  # fmt: skip
ALIGNMENT: Question = (
    Row(
        about=About.ENGINE, setting="zero_optimization.parameter_alignment",
        values=lambda c: c.zero("parameter_alignment"), when=lambda c: c.flat and c.other_gaps,
        why="it decides where each parameter starts in the flat groups",
        hint="keep the setting of the run that saved it",
        moment=Moment.ALIGNMENT, error="RuntimeError", text=_LAYOUT, source=_ALIGNED,
    ),
)  # fmt: skip


def _unpicklable(c: Case) -> bool:
    deepspeed, torch = (_numbers(c.run.versions.get(name)) for name in ("deepspeed", "torch"))
    return bool(deepspeed and torch and c.saved.stage and deepspeed < (0, 16) and torch >= (2, 6))


def _numbers(version: str | None) -> tuple[int, ...]:
    parts = (version or "").split("+")[0].split(".")[:2]
    return tuple(int(p) for p in parts if p.isdigit())


VERSIONS: Question = (
    Row(
        about=About.ENGINE, setting="installed DeepSpeed", when=_unpicklable,
        values=lambda c: (c.saved.version, c.run.versions.get("deepspeed")),
        why="torch from 2.6 on loads weights only, and the optimizer files hold objects of DeepSpeed",
        hint="install DeepSpeed 0.16 or newer, or set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1",
        moment=Moment.SHARDS, error="UnpicklingError", text="Weights only load failed",
        source="torch/serialization.py, load",
    ),
)  # fmt: skip

# --- what is trained ----------------------------------------------------------------------------------

_LAID_OUT = "the optimizer's state is laid out for the parameters that were trained"


def _other_trained(
    when: Callable[[Case], object], why: str, moment: Moment | None, error: str, text: str, source: str
) -> Row:
    return Row(
        about=About.MODEL, setting="trained parameters", why=why, when=when,
        values=lambda c: c.trained.numbers if c.trained is not None else (None, None),
        hint="train the parameters that were trained", moment=moment, error=error, text=text, source=source,
    )  # fmt: skip


def _resized(c: Case) -> bool:
    return c.trained is not None and c.trained.other_number


_PARTITIONS = "runtime/zero/stage3.py, _rigid_load_state_dict"
TRAINED: Question = (
    _other_trained(lambda c: c.trained is not None and c.trained.counted is not None,
                   "the optimizer's state is saved for each parameter that was trained",
                   Moment.WHOLE_OPTIMIZER, "ValueError", "loaded state dict contains a parameter group that "
                   "doesn't match the size of optimizer's group", _TORCH_OPTIMIZER),
    _other_trained(lambda c: c.trained is not None and c.trained.lost,
                   "DeepSpeed looks for the frozen parameter among those that were frozen when it saved",
                   Moment.FROZEN, "KeyError", "'{x}'", f"{_ENGINE}, load_module_state_dict"),
    _other_trained(lambda c: _resized(c) and c.saved.stage == 3, _LAID_OUT,
                   Moment.OPTIMIZER_STATE, "RuntimeError", _SIZES, _PARTITIONS),
    _other_trained(lambda c: _resized(c) and c.compares_layout, _LAID_OUT,
                   Moment.ALIGNMENT, "RuntimeError", _LAYOUT, _ALIGNED),
    _other_trained(lambda c: _resized(c) and c.saved.variant == "bf16_optimizer", _LAID_OUT,
                   Moment.OPTIMIZER_STATE, "RuntimeError", _SIZES,
                   "runtime/bf16_optimizer.py, load_state_dict"),
    _other_trained(_resized,
                   f"{_LAID_OUT}: it loads without an error, and the values land in other parameters",
                   None, "", "", ""),
    Row(
        about=About.MODEL, setting="trained parameters", cls=CAREFUL,
        when=lambda c: c.trained is not None and c.trained.shapes_now == c.trained.shapes_before,
        values=lambda c: c.trained.names if c.trained is not None else (None, None),
        why="their master weights and moments are loaded by place, not by name: the first forward pass is "
        "made with fresh values, and after the first update they are the saved ones",
    ),
    _other_trained(lambda c: c.trained is not None,
                   "the values would land in other parameters, without an error",
                   None, "", "", ""),
)  # fmt: skip


_EXCLUDED = "saved with exclude_frozen_parameters: {x} is not in it"
LEFT_OUT: Question = (
    Row(
        about=About.MODEL, setting="load_module_strict", values=lambda c: (None, c.run.strict), cls=SAFE,
        when=lambda c: not c.run.strict and c.left_out, why=_EXCLUDED + ", and keeps the new model's values",
    ),
    Row(
        about=About.MODEL, setting="load_module_strict", values=lambda c: (None, c.run.strict), cls=CAREFUL,
        when=lambda c: c.left_out,
        why=_EXCLUDED + ". DeepSpeed's own default, a strict load, ends in RuntimeError: Missing key(s) in "
        "state_dict; with load_module_strict=False it keeps the new model's values",
        hint="pass load_module_strict=False (here: --no-strict), and load what was frozen as at first",
    ),
)  # fmt: skip


def _unloadable(when: Callable[[Case, str], object], error: str, text: str) -> Row:
    def named(c: Case) -> object:
        return c.other_scheduler and c.scheduler is not None and when(c, c.scheduler)

    return Row(
        about=About.SCHEDULE, setting="scheduler.type", values=lambda c: (c.old_scheduler, c.scheduler),
        when=named, why="{c.scheduler} does not find its own state in the checkpoint",
        hint="use the scheduler of the run that saved it, or pass load_lr_scheduler_states=False",
        moment=Moment.SCHEDULE_STATE, error=error, text=text, source=_LOAD,
    )  # fmt: skip


SCHEDULE_STATE: Question = (
    _unloadable(lambda c, name: c.saved.scheduler is None and name in schedulers.ARGUMENTS, "TypeError",
                "'NoneType' object is not subscriptable"),
    _unloadable(lambda c, name: c.saved.scheduler is None and name in schedulers.TAKES, "AttributeError",
                "'NoneType' object has no attribute 'pop'"),
    _unloadable(lambda c, name: c.saved.scheduler is None, "TypeError", "'NoneType' object is not iterable"),
    _unloadable(lambda c, name: schedulers.absent_key(c.saved.scheduler, name), "KeyError", "'{x}'"),
    Row(
        about=About.SCHEDULE, setting="scheduler.type", cls=CAREFUL,
        values=lambda c: (c.old_scheduler, None), when=lambda c: c.other_scheduler and c.scheduler is None,
        why="the learning rate stays at the saved one for ever", hint="keep the scheduler",
    ),
    *(
        Row(
            about=About.SCHEDULE, setting="scheduler.type", cls=CAREFUL, when=when,
            values=lambda c: (c.old_scheduler, c.scheduler),
            why=f"it loads: {what}, and the curve is {{c.scheduler}}'s from the second update on",
        )
        for when, what in (
            (lambda c: c.other_scheduler and c.scheduler in schedulers.ARGUMENTS,
             "only the counter is taken over"),
            (lambda c: c.other_scheduler and not schedulers.same_class(c.saved.scheduler, c.scheduler or ""),
             "the saved fields are taken over as they are"),
        )
    ),
)  # fmt: skip
