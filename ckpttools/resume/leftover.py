"""The settings of a ds_config that no rule looks at more closely, and those that the checkpoint overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ckpttools.resume import schedule
from ckpttools.resume.engine import Saved
from ckpttools.resume.report import CAREFUL, SAFE, Difference, Overridden
from ckpttools.resume.run import NewRun, leaves, section

# looked at by rules of their own
JUDGED = re.compile(
    r"train_batch_size|train_micro_batch_size_per_gpu|gradient_accumulation_steps|optimizer\.type|"
    r"optimizer\.params\.(torch_adam|adam_w_mode)|scheduler\..*|(bf16|bfloat16|fp16)\.enabled|"
    r"zero_optimization\.(stage|round_robin_gradients|parameter_alignment|elastic_checkpoint)|"
    r"checkpoint\.load_universal|zero_allow_untested_optimizer|optimizer\.params\..*|gradient_clipping|fp16\..*"
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
_WHERE = "param_groups of the checkpoint are taken whole, from every rank's own file"


def leftover(saved: Saved, config: Mapping[str, object]) -> Iterator[Difference]:
    """Every other setting that differs."""
    old, new = dict(leaves(saved.config)), dict(leaves(config))
    for key in sorted({*old, *new}):
        if old.get(key) == new.get(key) or JUDGED.fullmatch(key):
            continue
        if section(config, *key.split(".")[:-1]).get(key.rpartition(".")[2]) == "auto":
            continue
        known = SPEED.fullmatch(key) is not None and "nvme" not in (old.get(key), new.get(key))
        harmless = known or not (old.get(key) or new.get(key))
        yield Difference(
            setting=key,
            old=old.get(key),
            new=new.get(key),
            cls=SAFE if harmless else CAREFUL,
            why="it has no part in what is saved"
            if harmless
            else "what it does to a resumed run is not judged here",
        )


def overridden(
    saved: Saved, run: NewRun, config: Mapping[str, object]
) -> tuple[list[Difference], list[Overridden]]:
    """Values of the new configuration that the checkpoint's replace."""
    differences: list[Difference] = []
    found: list[Overridden] = []

    def note(setting: str, was: object, wanted: object, used: object, why: str) -> None:
        found.append(Overridden(setting=setting, configured=wanted, used=used, why=why))
        differences.append(
            Difference(
                setting=setting,
                old=was,
                new=wanted,
                cls=SAFE,
                why=f"no effect: {why}",
                hint=f"to use it, set it in the param_groups after loading: {used} is used"
                if setting.startswith("optimizer.params")
                else "",
            )
        )

    old, new = section(saved.config, "optimizer", "params"), section(config, "optimizer", "params")
    for key in HYPER:
        wanted = new.get(key)
        if wanted is None or wanted == "auto" or wanted == old.get(key) or not saved.hyper:
            continue
        used = [group.get(key) for group in saved.hyper]
        shown = used[0] if all(value == used[0] for value in used) else used
        why = _WHERE
        if key == "lr" and _scales(saved, run, config):
            why += "; the schedule is built on the new one and takes it up after the first update"
            differences.append(
                Difference(
                    setting="optimizer.params.lr",
                    old=old.get(key),
                    new=wanted,
                    cls=SAFE,
                    why="the first resumed update uses the saved learning rate; the schedule "
                    "multiplies the new "
                    "one from the second update on",
                )
            )
            found.append(Overridden(setting="optimizer.params.lr", configured=wanted, used=shown, why=why))
            continue
        note(f"optimizer.params.{key}", old.get(key), wanted, shown, why)
    _clipping(saved, config, note, differences)
    if saved.scaled or saved.whole == "scaled":
        was, now = dict(leaves(section(saved.config, "fp16"))), dict(leaves(section(config, "fp16")))
        for key in sorted({*was, *now} - {"enabled", "auto_cast"}):
            if was.get(key) != now.get(key):
                note(
                    f"fp16.{key}",
                    was.get(key),
                    now.get(key),
                    "the saved loss scaler",
                    "the loss scaler is loaded",
                )
    return differences, found


def _scales(saved: Saved, run: NewRun, config: Mapping[str, object]) -> bool:
    """Whether the scheduler multiplies the learning rate of the optimizer as it was built."""
    name = schedule.in_effect(saved, run, config)
    return name == "WarmupCosineLR" or (
        name == "WarmupLR" and section(config, "scheduler", "params").get("warmup_max_lr") is None
    )


def _clipping(
    saved: Saved, config: Mapping[str, object], note: object, differences: list[Difference]
) -> None:
    assert callable(note)
    was, now = saved.config.get("gradient_clipping"), config.get("gradient_clipping")
    if was == now or now is None or now == "auto":
        return
    if saved.clip is not None and saved.stage in (1, 2):
        if saved.clip != now:
            note("gradient_clipping", was, now, saved.clip, "clip_grad is loaded with the optimizer's state")
        return
    differences.append(
        Difference(
            setting="gradient_clipping",
            old=was,
            new=now,
            cls=CAREFUL,
            why="gradients are clipped at another norm from the first update on",
        )
    )
