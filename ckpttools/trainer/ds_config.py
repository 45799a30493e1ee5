"""Our settings as DeepSpeed's configuration; pure data."""

from __future__ import annotations

from typing import Any

from ckpttools.errors import UsageError
from ckpttools.trainer.config import Config
from ckpttools.trainer.split import Split

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def ds_config(config: Config, split: Split, total_steps: int) -> dict[str, Any]:
    """The mapping for `deepspeed.initialize`, with the config's `deepspeed:` section merged in."""
    for key in BATCH_KEYS:
        if key in config.deepspeed:
            raise UsageError(
                "train-config",
                f"deepspeed.{key}: batch sizes are set in the batch section",
                why="two sources for one number could disagree",
                hint="set batch.global_batch_size and batch.micro_batch_size instead",
            )
    saves = config.deepspeed.get("checkpoint")
    if isinstance(saves, dict) and saves.get("writer") is not None:
        raise UsageError(
            "train-config",
            "deepspeed.checkpoint.writer: saves by a writer of DeepSpeed's are not supported",
            why="in DeepSpeed 0.19.8 the first one fails, and a writing process that died is passed over",
            hint="leave it out: each save is then flushed and verified before it gets its name",
        )
    optimizer = config.optimizer
    ours: dict[str, Any] = {
        "train_batch_size": config.batch.global_batch_size,
        "train_micro_batch_size_per_gpu": split.micro,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "zero_optimization": {
            "stage": config.zero.stage,
            "round_robin_gradients": config.zero.round_robin_gradients,
            # DeepSpeed's default of 5e8 elements allocates 2 GB per rank on the CPU
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,  # needs no compiler, and is the same on CPU and GPU
                "lr": optimizer.lr,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
            },
        },
        "scheduler": _scheduler(config, total_steps),
        "steps_per_print": 1_000_000_000,  # the trainer prints its own lines
    }
    if config.precision != "fp32":
        ours[config.precision] = {"enabled": True}
    return merge(ours, config.deepspeed)


def merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; a section of another `type` replaces ours; null removes a key."""
    merged = dict(ours)
    for key, value in theirs.items():
        mine = ours.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(mine, dict) and isinstance(value, dict):
            replaces = "type" in value and value["type"] != mine.get("type")
            merged[key] = value if replaces else merge(mine, value)
        else:
            merged[key] = value
    return merged


def _scheduler(config: Config, total_steps: int) -> dict[str, Any]:
    schedule = config.schedule
    common = {
        "total_num_steps": total_steps,
        "warmup_num_steps": schedule.warmup_steps,
        "warmup_type": "linear",
    }
    if schedule.kind == "cosine":
        return {"type": "WarmupCosineLR", "params": {**common, "cos_min_ratio": schedule.min_ratio}}
    params = {**common, "warmup_min_lr": 0.0, "warmup_max_lr": config.optimizer.lr}
    return {"type": "WarmupDecayLR", "params": params}
