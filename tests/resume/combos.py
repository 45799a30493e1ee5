"""The combinations that are launched: checkpoints of several kinds, each resumed with one thing changed.

A combination is (checkpoint, ranks, run). `run` is what launch.py takes. `kind` names what was changed,
for the table of outcomes.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BATCH = 24  # 1, 2, 3 and 4 ranks divide it, and two accumulated micro-batches of theirs
LR = 0.02

ADAMW = {
    "type": "AdamW",
    "params": {"lr": LR, "betas": [0.9, 0.99], "weight_decay": 0.05, "torch_adam": True},
}
ADAM = {"type": "Adam", "params": {**ADAMW["params"], "adam_w_mode": False}}  # type: ignore[dict-item]
SGD = {"type": "SGD", "params": {"lr": LR, "momentum": 0.9}}
SGD0 = {"type": "SGD", "params": {"lr": LR}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": ADAMW,
    "Adam": ADAM,
    "SGD": SGD,
    "SGD0": SGD0,
    "Adagrad": {"type": "Adagrad", "params": {"lr": LR}},
    "NAdam": {"type": "NAdam", "params": {"lr": LR}},
    "RAdam": {"type": "RAdam", "params": {"lr": LR}},
    "RMSprop": {"type": "RMSprop", "params": {"lr": LR}},
    "Adamax": {"type": "Adamax", "params": {"lr": LR}},
    "ASGD": {"type": "ASGD", "params": {"lr": LR}},
    "amsgrad": {"type": "AdamW", "params": {**ADAMW["params"], "amsgrad": True}},  # type: ignore[dict-item]
}
DECAY = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": 12, "warmup_num_steps": 6, "warmup_max_lr": LR, "warmup_type": "linear"},
}
SCHEDULERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "WarmupDecayLR": DECAY,
    "WarmupLR": {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_max_lr": LR}},
    "WarmupLR-auto": {"type": "WarmupLR", "params": {"warmup_num_steps": 6}},
    "WarmupCosineLR": {"type": "WarmupCosineLR", "params": {"total_num_steps": 12, "warmup_num_steps": 2}},
    "OneCycle": {
        "type": "OneCycle",
        "params": {"cycle_min_lr": LR / 10, "cycle_max_lr": LR, "cycle_first_step_size": 6},
    },
    "LRRangeTest": {
        "type": "LRRangeTest",
        "params": {"lr_range_test_min_lr": LR / 10, "lr_range_test_step_size": 4},
    },
}

MODELS: dict[str, dict[str, Any]] = {
    "extra": {"extra": True},
    "rename": {"rename": True},
    "wider": {"inner": 9},
    "narrower": {"inner": 5},
    "tied": {"tied": True},
    "frozen": {"frozen": ["emb"]},
    "frozen-bias": {"frozen": ["down.bias"]},
    "no-bias": {"bias": False},
    "buffer": {"buffer": True},
}


@dataclass(frozen=True, kw_only=True)
class Base:
    """A checkpoint that is made: `ranks` and the run that saved it."""

    name: str
    ranks: int
    run: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Combo:
    id: str
    kind: str
    base: Base
    ranks: int
    run: dict[str, Any] = field(repr=False)


def config(
    ranks: int,
    *,
    stage: int = 2,
    dtype: str = "fp32",
    optimizer: str = "AdamW",
    scheduler: str = "WarmupDecayLR",
    accumulation: int = 1,
    batch: int = BATCH,
    zero: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // ranks // accumulation,
        "gradient_accumulation_steps": accumulation,
        "optimizer": copy.deepcopy(OPTIMIZERS[optimizer]),
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **more,
    }
    if SCHEDULERS[scheduler]:
        settings["scheduler"] = copy.deepcopy(SCHEDULERS[scheduler])
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    if dtype == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return settings


def base(
    name: str, ranks: int, *, model: dict[str, Any] | None = None, groups: int = 1, **settings: Any
) -> Base:
    client = settings.pop("client", None)
    return Base(
        name=f"{name}_w{ranks}",
        ranks=ranks,
        run={
            "model": model or {},
            "groups": groups,
            "client_scheduler": client,
            "strict": True,
            "config": config(ranks, **settings),
        },
    )


RR = {"round_robin_gradients": True}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BASES: dict[str, Base] = {
    b.name: b
    for b in (
        *(base("z2fp32", w) for w in (1, 2, 3, 4)),
        *(base("z2bf16", w, dtype="bf16") for w in (1, 2, 3)),
        *(base("z1bf16", w, dtype="bf16", stage=1) for w in (1, 2)),
        base("z1fp32", 2, stage=1),
        base("z2fp16", 2, dtype="fp16"),
        base("z0fp32", 2, stage=0),
        base("z0bf16", 2, stage=0, dtype="bf16"),
        base("z0fp16", 2, stage=0, dtype="fp16"),
        base("z3fp32", 2, stage=3),
        base("z3bf16", 2, stage=3, dtype="bf16"),
        base("bf16opt", 2, stage=1, dtype="bf16", data_types={"grad_accum_dtype": "fp32"}),
        base("accum", 2, accumulation=2),
        base("nosched", 2, scheduler="none"),
        base("warmup", 2, scheduler="WarmupLR"),
        base("cosine", 2, scheduler="WarmupCosineLR"),
        base("onecycle", 2, scheduler="OneCycle"),
        base("range", 2, scheduler="LRRangeTest"),
        base("lambda", 2, scheduler="none", client="LambdaLR"),
        base("exponential", 2, scheduler="none", client="ExponentialLR"),
        base("groups2", 2, groups=2),
        base("groups3", 2, groups=3, scheduler="none"),
        base("rr", 2, zero=RR),
        base("rr", 3, zero=RR),
        base("rrbf16", 2, zero=RR, dtype="bf16"),
        base("align", 2, zero={"parameter_alignment": True}),
        base("offload", 2, zero=OFFLOAD, zero_force_ds_cpu_optimizer=False),
        base("clip", 2, gradient_clipping=0.5),
        *(base(f"opt-{name}", 2, optimizer=name, scheduler="none") for name in OPTIMIZERS if name != "AdamW"),
        base("elastic", 2, zero={"elastic_checkpoint": True}),
        base("groups3cosine", 2, groups=3, scheduler="WarmupCosineLR"),
        base("auto", 2, scheduler="WarmupLR-auto"),
        base("tied", 2, model={"tied": True}),
        base("frozen", 2, model={"frozen": ["emb"]}),
        base("buffer", 2, model={"buffer": True}),
    )
}


def changed(run: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The run with one setting replaced; `path` leads into it; None removes."""
    out = copy.deepcopy(run)
    *folders, last = path.split("/")
    at = out
    for folder in folders:
        at = at.setdefault(folder, {})
    if value is None:
        at.pop(last, None)
    else:
        at[last] = value
    return out


def set_dtype(run: dict[str, Any], dtype: str) -> dict[str, Any]:
    out = changed(changed(run, "config/bf16", None), "config/fp16", None)
    if dtype == "bf16":
        out["config"]["bf16"] = {"enabled": True}
    if dtype == "fp16":
        out["config"]["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return out


def set_batch(run: dict[str, Any], ranks: int, batch: int, accumulation: int = 1) -> dict[str, Any]:
    out = copy.deepcopy(run)
    out["config"].update(
        train_batch_size=batch,
        train_micro_batch_size_per_gpu=batch // ranks // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    return out


def _changes(b: Base) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Every change of one checkpoint: kind, name, ranks, run."""
    run, w = b.run, b.ranks
    name = b.name.rpartition("_w")[0]
    yield "nothing", "same", w, run
    core = name in ("z2fp32", "z2bf16", "z1bf16")
    if core:
        for other in (1, 2, 3):
            if other != w:
                yield "ranks", f"ranks{other}", other, set_batch(run, other, BATCH)
    if name in ("z2fp32", "z2bf16") and w == 2:
        yield "ranks", "ranks-triple", 3, run  # the batch triple of two ranks on three
    if name in ("z0fp32", "z0bf16", "z3fp32"):
        yield "ranks", "ranks1", 1, set_batch(run, 1, BATCH)
    if w != 2:
        return
    if core or name in ("z0fp32", "z0bf16", "z3fp32", "z3bf16", "z2fp16", "bf16opt"):
        for stage in (0, 1, 2, 3):
            if stage != run["config"]["zero_optimization"]["stage"]:
                yield "stage", f"stage{stage}", w, changed(run, "config/zero_optimization/stage", stage)
    if core or name in ("z2fp16", "z0fp32", "z0bf16", "z0fp16", "z3fp32", "bf16opt"):
        for dtype in ("bf16", "fp16", "fp32"):
            if (dtype in run["config"]) != (dtype != "fp32") or (
                dtype == "fp32" and ({"bf16", "fp16"} & run["config"].keys())
            ):
                yield "dtype", dtype, w, set_dtype(run, dtype)
    if core or name in ("lambda", "accum", "cosine"):
        yield "batch", "half", w, set_batch(run, w, BATCH // 2)
        yield "batch", "double", w, set_batch(run, w, BATCH * 2)
        yield "accumulation", "accum2", w, set_batch(run, w, BATCH, 3 if name == "accum" else 2)
        yield (
            "batch",
            "accum-only",
            w,
            changed(changed(run, "config/gradient_accumulation_steps", 3), "config/train_batch_size", None),
        )
    if core or name in ("z0fp32", "z0bf16", "z3fp32", "rr", "groups2", "z2fp16", "bf16opt"):
        for change, options in MODELS.items():
            yield "model", change, w, changed(run, "model", options)
    if name in ("z2fp32", "z2bf16"):
        for change in ("extra", "no-bias", "buffer", "wider", "rename"):
            options = MODELS[change]
            yield "not strict", f"loose-{change}", w, changed(changed(run, "model", options), "strict", False)
    if name == "tied":
        yield "model", "untied", w, changed(run, "model", {})
    if name == "frozen":
        yield "model", "thawed", w, changed(run, "model", {})
        yield "model", "other-frozen", w, changed(run, "model", {"frozen": ["head"]})
    if name == "buffer":
        yield "model", "no-buffer", w, changed(run, "model", {})
        yield "not strict", "loose-no-buffer", w, changed(changed(run, "model", {}), "strict", False)
    if name.startswith("opt-") or name in ("nosched", "z2bf16", "z0fp32"):
        for kind in OPTIMIZERS:
            if OPTIMIZERS[kind] != run["config"]["optimizer"]:
                if name in ("z2bf16", "z0fp32") and kind not in ("Adam", "SGD", "SGD0", "NAdam"):
                    continue
                if name in ("opt-RAdam", "opt-RMSprop", "opt-Adamax", "opt-ASGD") and kind not in (
                    "AdamW",
                    "SGD",
                ):
                    continue
                yield "optimizer", kind, w, changed(run, "config/optimizer", OPTIMIZERS[kind])
    if core or name in (
        "nosched",
        "cosine",
        "warmup",
        "z0fp32",
        "z3fp32",
        "groups3cosine",
        "auto",
        "elastic",
    ):
        params = "config/optimizer/params/"
        yield "lr", "lr", w, changed(run, params + "lr", LR / 2)
        if name != "z1bf16":
            yield "hyper", "betas", w, changed(run, params + "betas", [0.5, 0.6])
            yield "hyper", "decay", w, changed(run, params + "weight_decay", 0.5)
    if name in ("z2fp32", "z0fp32", "z0bf16", "z3fp32", "bf16opt", "clip"):
        yield "hyper", "clip", w, changed(run, "config/gradient_clipping", 0.1)
        yield "hyper", "no-clip", w, changed(run, "config/gradient_clipping", 0.0)
    if core or name in ("groups2", "groups3", "z0fp32", "z0bf16", "z3fp32", "bf16opt"):
        for groups in (1, 2, 3):
            if groups != run["groups"]:
                yield "groups", f"groups{groups}", w, changed(run, "groups", groups)
    if name in ("z2fp32", "z2bf16", "nosched", "cosine", "warmup", "onecycle", "range", "lambda", "z0fp32"):
        for kind, section in SCHEDULERS.items():
            if section != run["config"].get("scheduler") or run["client_scheduler"]:
                out = changed(changed(run, "config/scheduler", section), "client_scheduler", None)
                yield "scheduler", f"to-{kind}", w, out
    if name in ("z2fp32", "nosched", "lambda", "exponential"):
        for kind in ("LambdaLR", "ExponentialLR", "StepLR"):
            if kind != run["client_scheduler"]:
                out = changed(changed(run, "config/scheduler", None), "client_scheduler", kind)
                yield "scheduler", f"client-{kind}", w, out
    if name in ("z2fp32", "cosine", "warmup"):
        params = "config/scheduler/params/"
        yield "schedule", "warmup12", w, changed(run, params + "warmup_num_steps", 12)
        yield (
            "schedule",
            "log-linear",
            w,
            changed(run, params + "warmup_type", "log" if name == "z2fp32" else "linear"),
        )
        if name != "warmup":
            yield "schedule", "total24", w, changed(run, params + "total_num_steps", 24)
            yield "schedule", "no-total", w, changed(run, params + "total_num_steps", None)
        if name != "cosine":
            yield "schedule", "max", w, changed(run, params + "warmup_max_lr", LR * 3)
        yield "schedule", "zero-warmup", w, changed(run, params + "warmup_num_steps", 0)
        yield "schedule", "unknown", w, changed(run, params + "no_such_setting", 1)
    if name in ("z2fp32", "z2bf16", "rr", "rrbf16", "z1bf16", "groups2"):
        on = not run["config"]["zero_optimization"].get("round_robin_gradients", False)
        yield "round robin", f"rr-{on}", w, changed(run, "config/zero_optimization/round_robin_gradients", on)
    if name in ("z2fp32", "z2bf16", "align"):
        on = not run["config"]["zero_optimization"].get("parameter_alignment", False)
        yield "alignment", f"align-{on}", w, changed(run, "config/zero_optimization/parameter_alignment", on)
    if name in ("z2fp32", "z2bf16", "z1bf16", "z3fp32"):
        out = changed(run, "config/zero_force_ds_cpu_optimizer", False)
        yield (
            "offload",
            "offload",
            w,
            changed(out, "config/zero_optimization/offload_optimizer", {"device": "cpu"}),
        )
    if name == "offload":
        yield "offload", "no-offload", w, changed(run, "config/zero_optimization/offload_optimizer", None)
    if core:
        yield "neutral", "buckets", w, changed(run, "config/zero_optimization/reduce_bucket_size", 100)
        yield "neutral", "print", w, changed(run, "config/steps_per_print", 7)
        yield "neutral", "overlap", w, changed(run, "config/zero_optimization/overlap_comm", True)
        yield "config", "bad-triple", w, changed(run, "config/train_batch_size", BATCH + 2)
        yield "config", "no-such-optimizer", w, changed(run, "config/optimizer/type", "Nothing")
        yield "config", "no-such-setting", w, changed(run, "config/optimizer/params/nothing", 1)
    if name == "elastic":
        yield "elastic", "off", w, changed(run, "config/zero_optimization/elastic_checkpoint", None)
    if name == "z2fp16":
        yield "loss scale", "static", w, changed(run, "config/fp16/loss_scale", 64)
        yield "loss scale", "power", w, changed(run, "config/fp16/initial_scale_power", 4)
    if name in ("z1bf16", "z2bf16", "bf16opt"):
        wanted = None if name == "bf16opt" else "fp32"
        yield "accumulation dtype", "grads", w, changed(run, "config/data_types/grad_accum_dtype", wanted)
    if name == "z2fp32":
        torchs = {"type": "StepLR", "params": {"step_size": 3}}
        yield "config", "torch-scheduler", w, changed(run, "config/scheduler", torchs)
        yield (
            "config",
            "no-such-scheduler",
            w,
            changed(run, "config/scheduler", {"type": "Nothing", "params": {}}),
        )
        yield "config", "universal", w, changed(run, "config/checkpoint", {"load_universal": True})
        yield (
            "config",
            "untested",
            w,
            changed(
                changed(run, "config/zero_allow_untested_optimizer", None),
                "config/optimizer",
                OPTIMIZERS["NAdam"],
            ),
        )
        out = changed(run, "config/zero_optimization/round_robin_gradients", True)
        yield "two changes", "rr-and-batch", w, set_batch(out, w, BATCH * 2)
        yield "two changes", "ranks-and-wider", 1, set_batch(changed(run, "model", {"inner": 9}), 1, BATCH)
        yield (
            "two changes",
            "lr-and-sched",
            w,
            changed(
                changed(run, "config/optimizer/params/lr", LR / 2),
                "config/scheduler",
                SCHEDULERS["WarmupCosineLR"],
            ),
        )


def combos() -> list[Combo]:
    found = [
        Combo(id=f"{b.name}--{name}", kind=kind, base=b, ranks=ranks, run=run)
        for b in BASES.values()
        for kind, name, ranks, run in _changes(b)
    ]
    assert len({combo.id for combo in found}) == len(found)
    return found


# --- DeepSpeed's own Adam, which has to be compiled ----------------------------------------------------

_SHARED = {"lr": LR, "weight_decay": 0.05}
NATIVE: dict[str, tuple[dict[str, Any], bool]] = {  # its section, and whether the state is offloaded
    "fused": ({"type": "AdamW", "params": _SHARED}, False),
    "cpu": ({"type": "AdamW", "params": _SHARED}, True),
    "fusedL2": ({"type": "Adam", "params": {**_SHARED, "adam_w_mode": False}}, False),
    "torch": (ADAMW, False),
    "torchL2": (ADAM, False),
}


def native() -> list[Combo]:
    """Each of these resumed as each other, on one rank."""
    made = {}
    for name, (section, offload) in NATIVE.items():
        found = base(f"native-{name}", 1, scheduler="none", zero=OFFLOAD if offload else None)
        found.run["config"]["optimizer"] = section
        made[name] = found
    return [
        Combo(id=f"{old.name}--{new}", kind="own Adam", base=old, ranks=1, run=made[new].run)
        for old in made.values()
        for new in NATIVE
    ]


# --- two changes at once ------------------------------------------------------------------------------


def _leaves(value: Any, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(value, dict) and value:
        return {
            path: leaf for key, inner in value.items() for path, leaf in _leaves(inner, (*at, key)).items()
        }
    return {at: value}


def both(first: Combo, second: Combo) -> dict[str, Any] | None:
    """The run with what both changed; None where they change the same setting."""
    was, one, two = _leaves(first.base.run), _leaves(first.run), _leaves(second.run)
    changes = [
        {path for path in was.keys() | run.keys() if was.get(path) != run.get(path)} for run in (one, two)
    ]
    if changes[0] & changes[1] or any(a[: len(b)] == b for a in changes[0] for b in changes[1]):
        return None
    if any(b[: len(a)] == a for a in changes[0] for b in changes[1]):
        return None
    out = copy.deepcopy(first.run)
    for path in sorted(changes[1]):
        *folders, last = path
        at = out
        for folder in folders:
            at = at.setdefault(folder, {})
        if path in two:
            at[last] = copy.deepcopy(two[path])
        else:
            at.pop(last, None)
    for name in ("scheduler", "bf16", "fp16", "data_types", "checkpoint"):  # sections that were emptied
        if out["config"].get(name) == {}:
            del out["config"][name]
    return out


def pairs(number: int, seed: int) -> list[Combo]:
    """Combinations of two changes of one checkpoint, drawn at random."""
    generator = random.Random(seed)
    single = [combo for combo in combos() if combo.kind not in ("nothing", "two changes", "config")]
    found: dict[str, Combo] = {}
    while len(found) < number:
        first, second = generator.sample(single, 2)
        if first.base is not second.base or first.kind == second.kind or first.ranks != second.ranks:
            continue
        run = both(first, second)
        if run is not None:
            id = f"{first.id}--and--{second.id.partition('--')[2]}"
            found[id] = Combo(id=id, kind="two changes", base=first.base, ranks=first.ranks, run=run)
    return list(found.values())
