"""The settings of a ds_config that no table looks at, and those that the checkpoint overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ckpttools.frameworks.rules import CAREFUL, SAFE, About
from ckpttools.resume.deepspeed.case import Case
from ckpttools.resume.forecast import Difference, Overridden
from ckpttools.resume.new_run import leaves, section

# looked at by rows of their own
JUDGED = re.compile(
    r"train_batch_size|train_micro_batch_size_per_gpu|gradient_accumulation_steps|optimizer\.type|"
    r"optimizer\.params\..*|scheduler\..*|(bf16|bfloat16)\.enabled|fp16\..*|gradient_clipping|"
    r"zero_optimization\.(stage|round_robin_gradients|parameter_alignment|elastic_checkpoint)|"
    r"checkpoint\.load_universal|zero_allow_untested_optimizer"
)
# say how fast and how loudly, not what is computed
SPEED = re.compile(
    r"steps_per_print|wall_clock_breakdown|dump_state|memory_breakdown|.*bucket_size|comms_logger\..*|"
    r"zero_optimization\.(overlap_comm|contiguous_gradients|reduce_scatter|allgather_partitions|"
    r"sub_group_size|ignore_unused_parameters|offload_optimizer\..*|offload_param\..*|stage3_.*|cpu_offload.*|"
    r"zero_hpz_.*|memory_efficient_linear|.*_checkpointing)|activation_checkpointing\..*|flops_profiler\..*|"
    r"tensorboard\..*|wandb\..*|csv_monitor\..*|aio\..*|autotuning\..*|zero_force_ds_cpu_optimizer|"
    r"checkpoint\.(tag_validation|parallel_write|use_node_local_storage).*|dataloader_drop_last|"
    r"disable_allgather"
)
# of the optimizer: the constructor's, which the saved param_groups replace
HYPER = ("lr", "betas", "eps", "weight_decay", "momentum", "amsgrad", "dampening", "nesterov", "alpha")
_GROUPS = "param_groups of the checkpoint are taken whole, from every rank's own file"
_BASE = f"{_GROUPS}; the schedule is built on the new one and takes it up after the first update"
_LATER = (
    "the first resumed update uses the saved learning rate; the schedule multiplies the new one from the "
    "second update on"
)


def others(case: Case) -> Iterator[Difference]:
    """Every other setting that differs."""
    old, new = dict(leaves(case.saved.config)), dict(leaves(case.config))
    for key in sorted({*old, *new}):
        *path, last = key.split(".")
        unset = section(case.config, *path).get(last) == "auto"
        if old.get(key) == new.get(key) or JUDGED.fullmatch(key) or unset:
            continue
        speed = SPEED.fullmatch(key) is not None and "nvme" not in (old.get(key), new.get(key))
        harmless = speed or not (old.get(key) or new.get(key))
        yield Difference(
            about=About.SETTING,
            setting=key,
            old=old.get(key),
            new=new.get(key),
            cls=SAFE if harmless else CAREFUL,
            why="it has no part in what is saved"
            if harmless
            else "what it does to a resumed run is not judged here",
        )
    was, now = case.saved.config.get("gradient_clipping"), case.config.get("gradient_clipping")
    if was != now and now not in (None, "auto") and not _clip_is_loaded(case):
        yield Difference(
            about=About.SETTING,
            setting="gradient_clipping",
            old=was,
            new=now,
            cls=CAREFUL,
            why="gradients are clipped at another norm from the first update on",
        )


def _clip_is_loaded(case: Case) -> bool:
    return case.saved.clip is not None and case.saved.stage in (1, 2)


def overridden(case: Case) -> Iterator[Overridden]:
    """Values of the new configuration that the checkpoint's replace."""
    saved, config = case.saved, case.config
    old, new = section(saved.config, "optimizer", "params"), section(config, "optimizer", "params")
    for key in HYPER:
        wanted = new.get(key)
        if wanted is None or wanted == "auto" or wanted == old.get(key) or not saved.hyper:
            continue
        used = [group.get(key) for group in saved.hyper]
        shown = used[0] if all(value == used[0] for value in used) else used
        common: dict[str, Any] = {"saved": old.get(key), "configured": wanted, "used": shown}
        if key == "lr" and _scales(case):
            yield Overridden(setting=f"optimizer.params.{key}", **common, why=_BASE, effect=_LATER)
        else:
            hint = f"to use it, set it in the param_groups after loading: {shown} is used"
            yield Overridden(setting=f"optimizer.params.{key}", **common, why=_GROUPS, hint=hint)
    was, now = saved.config.get("gradient_clipping"), config.get("gradient_clipping")
    if _clip_is_loaded(case) and now not in (None, "auto", was, saved.clip):
        why = "clip_grad is loaded with the optimizer's state"
        yield Overridden(setting="gradient_clipping", saved=was, configured=now, used=saved.clip, why=why)
    if saved.scaled or saved.whole == "scaled":
        scale, wanted_scale = _fp16(saved.config), _fp16(config)
        for key in sorted({*scale, *wanted_scale} - {"enabled", "auto_cast"}):
            if scale.get(key) != wanted_scale.get(key):
                yield Overridden(
                    setting=f"fp16.{key}",
                    saved=scale.get(key),
                    configured=wanted_scale.get(key),
                    used="the saved loss scaler",
                    why="the loss scaler is loaded",
                )


def _fp16(config: Mapping[str, object]) -> dict[str, object]:
    return dict(leaves(section(config, "fp16")))


def without_effect(over: Iterable[Overridden]) -> Iterator[Difference]:
    """The same values as safe differences."""
    for o in over:
        yield Difference(
            about=About.SETTING,
            setting=o.setting,
            old=o.saved,
            new=o.configured,
            cls=SAFE,
            why=o.effect or f"no effect: {o.why}",
            hint=o.hint,
        )


def _scales(case: Case) -> bool:
    """Whether the scheduler multiplies the learning rate of the optimizer as it was built."""
    peak = section(case.config, "scheduler", "params").get("warmup_max_lr")
    return case.scheduler == "WarmupCosineLR" or (case.scheduler == "WarmupLR" and peak is None)
