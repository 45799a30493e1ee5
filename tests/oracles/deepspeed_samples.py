"""Tiny real DeepSpeed checkpoints, with the truth about each beside it.

    torchrun --standalone --nproc_per_node=N --max-restarts=99 deepspeed_samples.py OUT --variants a,b|all

runs unchanged under DeepSpeed 0.10 to 0.19 and writes for every variant, with W = OUT/<variant>_ws<N>:

    W/                      a DeepSpeed save_dir: `latest` and global_step<S>/
    W.truth.pt              what the engine held when it saved, and the losses of the steps after it
    W.zero_to_fp32.pt       what DeepSpeed's own get_fp32_state_dict_from_zero_checkpoint reads from W/
    W.zero_to_fp32.error    or how that failed
    W.error.txt             instead of all these, if the variant itself could not be trained and saved

The truth is gathered from the live fp32 partitions in the order of the optimizer's flat groups, because
safe_get_full_fp32_param reads wrong offsets under round_robin_gradients; `safe_get_agrees` compares them.

Every global batch is a function of the step number only and is split evenly over the ranks, so that losses
of any number of ranks can be compared.

A variant that fails alike on all ranks does not disturb the next. One that fails on some ranks only may leave
others inside a collective: the ranks then exit, and torchrun starts them again (--max-restarts) on the
variants that are left. deepspeed_resume.py imports VARIANTS, build, train and truth.
"""

import argparse
import collections
import datetime
import functools
import gc
import inspect
import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.nn import functional as F

BATCH = 120  # divisible by 1, 2, 3, 4, 5, 6, 8, 10, 12
STEPS_AFTER = 3
VOCAB, HIDDEN, INNER, SEQ = 11, 6, 7, 3
LR = 0.02

DEEPSPEED_VERSION = tuple(int(n) for n in re.findall(r"\d+", deepspeed.__version__)[:3])


@dataclass(frozen=True)
class Variant:
    zero: dict[str, Any]
    dtype: str = "bf16"  # bf16, fp16, fp32
    model: dict[str, Any] = field(default_factory=dict)
    kind: str = "plain"  # plain, pipeline, moe
    optimizer: str = "adamw"
    groups: bool = False
    scheduler: str | None = "WarmupDecayLR"  # or None, "client"
    config: dict[str, Any] = field(default_factory=dict)
    client_state: bool = False
    exclude_frozen: bool = False
    steps: int = 3
    since: tuple[int, ...] = (0, 10)


Z1, Z2, Z3 = {"stage": 1}, {"stage": 2}, {"stage": 3}
RR = {"stage": 2, "round_robin_gradients": True}
FP32_GRADS = {"data_types": {"grad_accum_dtype": "fp32"}}
Z3_CUT = {"stage": 3, "sub_group_size": 10}
CPU = {"zero_force_ds_cpu_optimizer": False}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
MUON = {
    "optimizer": {
        "type": "Muon",
        "params": {"lr": LR, "adam_lr": LR / 2, "momentum": 0.9, "weight_decay": 0.05},
    }
}


def bit16(dtype: str, **options: Any) -> dict[str, Any]:
    """DeepSpeed's settings for a model of 16 bits whose masters have 16 bits too."""
    return {dtype: {"enabled": True, **options}}


VARIANTS: dict[str, Variant] = {
    "z2_bf16": Variant(Z2),
    "z2_fp16": Variant(Z2, "fp16", config={"gradient_clipping": 1.0}),
    "z2_fp32": Variant(Z2, "fp32", scheduler=None),
    "z1_bf16": Variant(Z1),
    "z1_fp32": Variant(Z1, "fp32"),
    "z1_fp16": Variant(Z1, "fp16"),
    "z1_bf16opt": Variant(Z1, config=FP32_GRADS),
    "z1_bf16opt_groups": Variant(Z1, groups=True, scheduler="client", config=FP32_GRADS),
    "z2_round_robin": Variant(RR),
    "z2_align": Variant({"stage": 2, "parameter_alignment": True}, since=(0, 19, 7)),
    "z2_align_rr_groups": Variant({**RR, "parameter_alignment": True}, groups=True, since=(0, 19, 7)),
    "z2_groups": Variant(Z2, groups=True, scheduler=None, config={"gradient_clipping": 1.0}),
    "z2_frozen": Variant(Z2, model={"frozen": True}),
    "z1_frozen": Variant(Z1, model={"frozen": True}),
    "z2_exclude_frozen": Variant(Z2, model={"frozen": True}, exclude_frozen=True, since=(0, 10, 1)),
    "z2_lora": Variant(Z2, model={"lora": True}),
    "z2_lora_exclude": Variant(Z2, model={"lora": True}, exclude_frozen=True, since=(0, 10, 1)),
    "z2_tied": Variant(Z2, model={"tied": True}),
    "z2_buffers": Variant(Z2, model={"buffers": True}),
    "z2_zerosize": Variant(Z2, model={"zerosize": True}),
    "z2_offload": Variant(OFFLOAD, config={"zero_force_ds_cpu_optimizer": False}),
    "z2_cpuadam": Variant(OFFLOAD, optimizer="cpuadam", since=(0, 16)),
    "z2_nostep": Variant(Z2, steps=0),
    "z2_fp16_skipped": Variant(
        Z2, "fp16", config={"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}}, steps=4
    ),
    "z2_sgd": Variant(Z2, optimizer="sgd"),
    "z2_sgd0": Variant(Z2, optimizer="sgd0"),
    "z2_adagrad": Variant(Z2, optimizer="adagrad"),
    "z2_lion": Variant(Z2, optimizer="lion"),
    "z2_amsgrad": Variant(Z2, optimizer="amsgrad"),
    "z2_nadam": Variant(Z2, optimizer="nadam"),
    "z2_legacy": Variant(Z2, config={"checkpoint": {"checkpoint_serialization": False}}, since=(0, 17, 1)),
    "z2_elastic": Variant({"stage": 2, "elastic_checkpoint": True}),
    "z2_elastic_sgd": Variant({"stage": 2, "elastic_checkpoint": True}, optimizer="sgd"),
    "z2_clientsched": Variant(Z2, scheduler="client"),
    "z2_clientstate": Variant(Z2, client_state=True),
    "z2_onegroup_tiny": Variant(Z2, model={"tiny": 1}),
    "z2_tiny_groups": Variant(Z2, model={"tiny": 2}, groups=True, scheduler=None),
    "z2_rr_frozen_tied_groups": Variant(
        RR, model={"frozen": True, "tied": True, "buffers": True}, groups=True, scheduler="client"
    ),
    # tied and frozen: the file may lack the owner, and then its alias carries the weight
    "z2_tied_frozen": Variant(Z2, model={"tied": True, "frozen": ("emb.weight", "ln.weight")}),
    "z1_tied_frozen": Variant(Z1, model={"tied": True, "frozen": ("emb.weight", "ln.weight")}),
    "z2_tied_frozen_exclude": Variant(
        Z2, model={"tied": True, "frozen": ("emb.weight", "ln.weight")}, exclude_frozen=True, since=(0, 10, 1)
    ),
    "z1_tied_frozen_exclude": Variant(
        Z1, model={"tied": True, "frozen": ("emb.weight", "ln.weight")}, exclude_frozen=True, since=(0, 10, 1)
    ),
    "z2_tied_lora_exclude": Variant(
        Z2, model={"tied": True, "lora": True, "buffers": True}, exclude_frozen=True, since=(0, 10, 1)
    ),
    # two parameters in one storage, of which DeepSpeed trains one and keeps the other as it is
    "z2_storage_owner_frozen": Variant(Z2, model={"tied": "storage", "frozen": ("emb.weight",)}),
    "z2_storage_owner_exclude": Variant(
        Z2, model={"tied": "storage", "frozen": ("emb.weight",)}, exclude_frozen=True, since=(0, 10, 1)
    ),
    "z2_storage_alias_frozen": Variant(Z2, model={"tied": "storage", "frozen": ("head.weight",)}),
    "z2_storage_alias_exclude": Variant(
        Z2, model={"tied": "storage", "frozen": ("head.weight",)}, exclude_frozen=True, since=(0, 10, 1)
    ),
    "z2_storage_frozen_exclude": Variant(
        Z2,
        model={"tied": "storage", "frozen": ("emb.weight", "head.weight")},
        exclude_frozen=True,
        since=(0, 10, 1),
    ),
    # optimizer state that is nested, of single ranks, of other lengths than the partition
    "z2_nested": Variant(Z2, optimizer="nested", groups=True),
    "z2_nested_rr": Variant(RR, optimizer="nested", groups=True),
    "z1_nested_bf16opt": Variant(Z1, optimizer="nested", groups=True, config=FP32_GRADS),
    "z2_ranklocal": Variant(Z2, optimizer="ranklocal"),
    "z2_ranknumber": Variant(Z2, optimizer="ranknumber"),
    "z2_adamax": Variant(Z2, optimizer="adamax"),
    "z2_bnb_adamw": Variant(Z2, optimizer="bnb_adamw"),
    "z2_bnb_adamw_rr_groups": Variant(RR, optimizer="bnb_adamw", groups=True),
    "z2_bnb_lion": Variant(Z2, optimizer="bnb_lion"),
    "z2_bnb_paged": Variant(Z2, optimizer="bnb_paged"),
    "z2_bnb_adamw8": Variant(Z2, optimizer="bnb_adamw8"),
    "z2_bnb_lion8": Variant(Z2, optimizer="bnb_lion8"),
    "z2_muon": Variant(Z2, optimizer="muon", config=MUON, since=(0, 19, 7)),
    "z1_muon_fp32": Variant(Z1, "fp32", optimizer="muon", config=MUON, since=(0, 19, 7)),
    "z2_muon_offload": Variant(OFFLOAD, optimizer="muon", config=MUON, since=(0, 19, 7)),
    # master weights, and moments, of 16 bits
    "z2_bf16_masters": Variant(
        OFFLOAD, optimizer="cpuadam", config=bit16("bf16", bf16_master_weights_and_grads=True), since=(0, 19)
    ),
    "z2_bf16_states": Variant(
        Z2,
        config=bit16("bf16", bf16_master_weights_and_grads=True, bf16_optimizer_states=True),
        since=(0, 19),
    ),
    "z1_bf16_states_groups": Variant(
        Z1,
        groups=True,
        config=bit16("bf16", bf16_master_weights_and_grads=True, bf16_optimizer_states=True),
        since=(0, 19),
    ),
    "z2_fp16_masters": Variant(
        OFFLOAD,
        "fp16",
        optimizer="cpuadam",
        config=bit16("fp16", fp16_master_weights_and_grads=True, initial_scale_power=8),
        since=(0, 19),
    ),
    "z1_round_robin": Variant({"stage": 1, "round_robin_gradients": True}),
    "z3_bf16": Variant(Z3),
    "z3_fp32": Variant(Z3, "fp32"),
    "z3_fp16": Variant(Z3, "fp16"),
    # several groups and, within them, several sub-groups; tied, frozen and buffers
    "z3_groups": Variant(
        Z3_CUT, model={"frozen": True, "tied": True, "buffers": True}, groups=True, client_state=True
    ),
    "z3_lora": Variant({**Z3, "stage3_param_persistence_threshold": 0}, model={"lora": True}),
    "z3_exclude_frozen": Variant(Z3, model={"frozen": True}, exclude_frozen=True),
    "z3_offload": Variant({**Z3, "offload_optimizer": {"device": "cpu", "pin_memory": False}}, config=CPU),
    "z3_sgd": Variant(Z3, optimizer="sgd"),
    "z3_nostep": Variant(Z3_CUT, steps=0),
    "z3_tiny_groups": Variant(Z3, "fp32", model={"tiny": 2}, groups=True, scheduler=None),
    "z0_bf16": Variant({"stage": 0}),
    "z0_fp32": Variant({"stage": 0}, "fp32"),
    "z0_fp16": Variant({"stage": 0}, "fp16"),
    "z0_frozen": Variant({"stage": 0}, model={"frozen": True, "tied": True, "buffers": True}),
    "moe": Variant(Z2, kind="moe"),
    "pp": Variant(Z1, kind="pipeline"),
}


# ---- models -----------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int = 3) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, inputs) * 0.3)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


class Net(nn.Module):
    """269 elements (66 + 12 + 49 + 48 + 12 + 66 + 11 + 5), so that no number of ranks divides them."""

    def __init__(
        self, *, frozen=False, lora=False, tied=False, buffers=False, zerosize=False, moe=None
    ) -> None:
        super().__init__()
        linear = LoraLinear if lora else nn.Linear
        self.emb = nn.Embedding(VOCAB, HIDDEN)
        self.ln = nn.LayerNorm(HIDDEN)
        self.up = linear(HIDDEN, INNER)
        self.down = linear(INNER, HIDDEN)
        self.ln_f = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.mix = nn.Parameter(torch.tensor([0.5, 0.2, -0.1, 0.3, 0.1]))
        self.moe = moe
        if zerosize:
            self.nothing = nn.Parameter(torch.empty(0, 4))
        if buffers:
            self.register_buffer("scale", torch.linspace(0.9, 1.1, HIDDEN))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("mask", torch.tensor([True, False, True, True, True, True]))
            self.register_buffer("cache", torch.full((4,), 0.1), persistent=False)
        if tied == "storage":
            self.head.weight = nn.Parameter(self.emb.weight.detach())
        elif tied:
            self.head.weight = self.emb.weight
        if frozen:
            for name in ("ln.weight", "up.weight", "down.bias") if frozen is True else frozen:
                self.get_parameter(name).requires_grad_(False)
        if lora:
            for name, p in self.named_parameters():
                p.requires_grad_("lora" in name)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.emb(x)
        if hasattr(self, "scale"):
            self.calls += 1
            h = h * self.scale.to(h.dtype) * self.mask
        h = h + self.down(F.gelu(self.up(self.ln(h))))
        extra = 0.0
        if self.moe is not None:
            routed, extra, _ = self.moe(h)
            h = h + routed
        h = self.ln_f(h).mean(1) * self.mix[0] + self.mix[1:].sum()
        if hasattr(self, "nothing"):
            h = h + self.nothing.sum()
        return F.cross_entropy(self.head(h).float(), y) + 0.01 * extra


class TinyNet(nn.Module):
    """2 elements, or (groups=2) 3 elements and 1 (DeepSpeed cannot broadcast a 0-dim parameter)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.3, -0.2]] if groups == 1 else [[0.3, -0.2, 0.1]]))
        self.s = nn.Parameter(torch.tensor([0.7])) if groups == 2 else None

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = x[:, : self.w.shape[1]].to(self.w.dtype)
        out = F.linear(h, self.w).squeeze(1)
        return F.mse_loss((out if self.s is None else out * self.s).float() / 5, y.float() / 5)


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (m * b1 + p.grad * (1 - b1)).sign())
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


class Nested(torch.optim.Optimizer):
    """Adam whose state lies in a dict, a list and a tuple, with numbers and short tensors between."""

    def __init__(self, params, lr=1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def extra(self, p: torch.Tensor, state: dict[str, Any]) -> float:
        """A factor of the rate that comes from the state; 1 by default."""
        return 1.0

    @torch.no_grad()
    def step(self, closure=None):
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    zeros = functools.partial(torch.zeros_like, p)
                    state["inner"] = {
                        "state1": zeros(),
                        "state2": zeros(),
                        "step": 0,
                        "deep": {"rate": 0.5 + g},
                    }
                    state["history"] = [zeros(), zeros()]
                    state["pair"] = (zeros(), torch.full((1,), 0.5 + g, device=p.device))
                    state["scale"] = torch.full((1,), 1.0 + g, device=p.device)
                inner, history, (slow, mix) = state["inner"], state["history"], state["pair"]
                inner["step"] += 1
                state["scale"].mul_(0.99)
                inner["state1"].mul_(0.9).add_(p.grad, alpha=0.1)
                inner["state2"].mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                history[1].copy_(history[0])
                history[0].copy_(inner["state1"])
                slow.lerp_(p, 0.1)
                update = (history[0] + 0.5 * history[1]) / (inner["state2"].sqrt() + 1e-3)
                rate = group["lr"] * inner["deep"]["rate"] * self.extra(p, state) / inner["step"]
                p.sub_(rate * update * state["scale"]).lerp_(slow, 0.01 * mix.item())


class RankLocal(Nested):
    """Keeps a tensor of the partition's own: the largest gradients, as many on each rank."""

    def extra(self, p, state):
        best = p.grad.float().abs().flatten()[:4].contiguous()
        state["largest"] = torch.maximum(state.get("largest", torch.zeros_like(best)), best)
        return 1.0 + state["largest"].sum().item()


class RankNumber(Nested):
    """Keeps a number of the partition's own, as optimizers do that estimate their rate."""

    def extra(self, p, state):
        inner = state["inner"]
        inner["d"] = max(inner.get("d", 0.0), p.grad.float().norm().item())
        return 1.0 + inner["d"]


def bitsandbytes(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """With bitsandbytes' own defaults, but for 8 bits in however small a partition."""
    import bitsandbytes as bnb

    small = {"lr": LR, "weight_decay": 0.05, "min_8bit_size": 1}
    match name:
        case "bnb_adamw":
            return bnb.optim.AdamW32bit(groups, **small)
        case "bnb_adamw8":
            return bnb.optim.AdamW8bit(groups, **small)
        case "bnb_paged":
            return bnb.optim.PagedAdamW32bit(groups, **small)
        case "bnb_lion":
            return bnb.optim.Lion32bit(groups, **{**small, "lr": LR / 4})
        case "bnb_lion8":
            return bnb.optim.Lion8bit(groups, **{**small, "lr": LR / 4})
    raise ValueError(name)


def client_state() -> dict[str, Any]:
    base = torch.arange(10.0)
    return {
        "args": argparse.Namespace(lr=0.1, name="run", nested=argparse.Namespace(flag=True), path=None),
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "array_f64": np.linspace(0, 1, 5),
        "scalar_np": np.float64(0.25),
        "when": datetime.datetime(2024, 5, 6, 7, 8, 9, 10, tzinfo=datetime.timezone.utc),  # noqa: UP017
        "names": {"a", "b"},
        "frozen_names": frozenset({1, 2}),
        "ordered": collections.OrderedDict([("z", 1), ("a", [1, (2, 3), {"k": None}])]),
        "raw": b"\x00\xff\x80bytes",
        "big": 2**200 + 1,
        "negative": -(2**40),
        "nested": [[1, [2, [3.5, "four", None, True]]], ()],
        "complex": 1 + 2j,
        "non_contiguous": torch.arange(12.0).reshape(3, 4).t(),
        "strided": torch.arange(12, dtype=torch.int64)[::3],
        "zero_dim": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "view_a": base[:4],
        "view_b": base[2:],
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "bools": torch.tensor([True, False]),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "parameter": nn.Parameter(torch.ones(2)),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "rng": torch.get_rng_state(),
        "epoch": 1,
        1: "an int key",
        "über": "naïve",
    }


# ---- engines ----------------------------------------------------------------------------------------


def start() -> None:
    """Gloo on one thread, without DeepSpeed's shared memory kernels.

    They need a compiler, and old releases hang in what a killed process left in /dev/shm.
    """
    torch.set_num_threads(1)
    get_accelerator()._communication_backend_name = "gloo"  # 0.10 asks for Intel's ccl
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torchrun keeps its store when it starts the ranks again, with the addresses of the old ones in it
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=600),
    )
    deepspeed.init_distributed(dist_backend="gloo")


def allow_fp16_on_cpu() -> None:
    """DeepSpeed asks oneDNN whether fp16 is fast here; torch computes it on any CPU."""
    get_accelerator().is_fp16_supported = lambda: True


def is_supported(variant: str, world_size: int) -> bool:
    v = VARIANTS[variant]
    if v.kind == "pipeline" and world_size % 2:
        return False
    return v.since <= DEEPSPEED_VERSION


def pipelines_last(variant: str) -> int:
    """A sort key: after a pipeline, DeepSpeed builds nothing else in the same process."""
    return ["plain", "moe", "pipeline"].index(VARIANTS[variant].kind)


def param_groups(model: nn.Module, groups: bool) -> list[dict[str, Any]]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not groups:
        return [{"params": [p for _, p in named]}]
    head = [p for n, p in named if n.startswith(("head", "mix"))]
    rest = [p for n, p in named if not n.startswith(("head", "mix"))]
    split = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1, "name": "decay"},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "name": "nodecay"},
        {"params": head, "lr": LR / 4, "weight_decay": 0.05, "name": "other"},
    ]
    return [g for g in split if g["params"]]


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
    """None: DeepSpeed makes it from ds_config."""
    if name.startswith("bnb_"):
        return bitsandbytes(name, groups)
    match name:
        case "nested":
            return Nested(groups, lr=LR)
        case "ranklocal":
            return RankLocal(groups, lr=LR / 2)
        case "ranknumber":
            return RankNumber(groups, lr=LR / 2)
        case "adamax":
            return torch.optim.Adamax(groups, lr=LR)
        case "muon":
            return None
        case "adamw" | "amsgrad":
            return torch.optim.AdamW(groups, lr=LR, weight_decay=0.05, amsgrad=name == "amsgrad")
        case "sgd" | "sgd0":
            return torch.optim.SGD(groups, lr=LR, momentum=0.9 if name == "sgd" else 0.0)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=LR)
        case "nadam":
            return torch.optim.NAdam(groups, lr=LR)
        case "lion":
            return Lion(groups, lr=LR / 4, weight_decay=0.05)
        case "cpuadam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, lr=LR, weight_decay=0.05)
    raise ValueError(name)


def ds_config(v: Variant, world_size: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": dict(v.zero),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if v.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if v.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
    if v.scheduler == "WarmupDecayLR":
        config["scheduler"] = {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": 20,
                "warmup_num_steps": 2,
                "warmup_min_lr": LR / 10,
                "warmup_max_lr": LR,
            },
        }
    return {**config, **v.config}


def build_pipeline(config: dict[str, Any]) -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule

    class Mean(nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return h.mean(1)

    model = PipelineModule(
        layers=[
            LayerSpec(nn.Embedding, VOCAB, HIDDEN),
            LayerSpec(nn.Linear, HIDDEN, INNER),
            LayerSpec(nn.Linear, INNER, HIDDEN),
            LayerSpec(nn.LayerNorm, HIDDEN),
            LayerSpec(Mean),
            LayerSpec(nn.Linear, HIDDEN, VOCAB),
        ],
        loss_fn=lambda out, y: F.cross_entropy(out.float(), y),
        num_stages=2,
        partition_method="uniform",
    )
    stages = dist.get_world_size() // 2  # data parallel degree
    config = {**config, "train_micro_batch_size_per_gpu": BATCH // stages}
    optimizer = make_optimizer("adamw", param_groups(model, False))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def build(variant: str, prepare: Callable[[nn.Module, dict[str, Any]], None] | None = None) -> Any:
    """The engine of a variant, with freshly initialised deterministic weights.

    `prepare` may change the model and the configuration before the engine is made of them.
    """
    allow_fp16_on_cpu()
    v = VARIANTS[variant]
    world_size = dist.get_world_size()
    config = ds_config(v, world_size)
    torch.manual_seed(1)
    if v.kind == "pipeline":
        return build_pipeline(config)
    options = dict(v.model)
    if v.kind == "moe":
        from deepspeed.moe.layer import MoE

        expert = nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))
        options["moe"] = MoE(HIDDEN, expert, num_experts=2, ep_size=2 - world_size % 2, k=1)
    model = TinyNet(options["tiny"]) if "tiny" in options else Net(**options)
    if prepare is not None:
        prepare(model, config)
    groups = param_groups(model, v.groups)
    if v.kind == "moe":
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        groups = split_params_into_different_moe_groups_for_optimizer({**groups[0], "name": "all"})
    optimizer = make_optimizer(v.optimizer, groups)
    scheduler = None
    if v.scheduler == "client":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    given = {"optimizer": optimizer} if optimizer is not None else {"model_parameters": model.parameters()}
    return deepspeed.initialize(model=model, **given, lr_scheduler=scheduler, config=config)[0]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    return x, (x.sum(1) * 3 + x[:, 0]) % VOCAB


def train(engine: Any, steps: int) -> list[float]:
    """The mean loss over the global batch, of each of the next steps."""
    losses = []
    for _ in range(steps):
        x, y = batch(engine.global_steps)
        if hasattr(engine, "train_batch") and hasattr(engine, "grid"):  # PipelineEngine
            ranks, rank = engine.grid.data_parallel_size, engine.grid.data_parallel_id
            loss = engine.train_batch(iter([(x.chunk(ranks)[rank], y.chunk(ranks)[rank])]))
        else:
            ranks, rank = dist.get_world_size(), dist.get_rank()
            loss = engine(x.chunk(ranks)[rank], y.chunk(ranks)[rank])
            engine.backward(loss)
            engine.step()
        total = loss.detach().double().reshape(1).clone()
        dist.all_reduce(total)
        losses.append((total / dist.get_world_size()).item())
    return losses


# ---- truth ------------------------------------------------------------------------------------------


def gather(partition: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(partition) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, partition.detach().contiguous())
    return torch.cat(parts)


def split(flat: torch.Tensor, params: list[Any], paddings: list[int]) -> list[torch.Tensor]:
    out, start = [], 0
    for p, padding in zip(params, paddings, strict=True):
        out.append(flat[start : start + p.numel()].reshape(p.shape).clone())
        start += p.numel() + padding
    return out


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What is not a dict, list or tuple, under the keys that lead to it: `inner.step`, `history[0]`."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from leaves(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and value:
        for i, each in enumerate(value):
            yield from leaves(each, f"{path}[{i}]")
    elif path:
        yield path, value


def optimizer_truth(engine: Any) -> dict[str, Any]:
    """fp32 masters and optimizer states by parameter name, in any ZeRO-1/2 or BF16 engine."""
    opt = engine.optimizer
    names = {id(p): n for n, p in engine.module.named_parameters()}
    truth: dict[str, Any] = {"fp32": {}, "state": {}, "scalars": [], "group_names": [], "padded_numel": []}
    if hasattr(opt, "fp32_groups_flat_partition"):  # BF16_Optimizer
        partitions, groups = opt.fp32_groups_flat_partition, opt.bf16_groups
    else:
        partitions, groups = opt.single_partition_of_fp32_groups, opt.round_robin_bit16_groups
    all_paddings = getattr(opt, "round_robin_bit16_padding", None)
    saved = opt.optimizer.state_dict()["state"]  # as it is saved: bitsandbytes nests it only then
    for g, (partition, params) in enumerate(zip(partitions, groups, strict=True)):
        paddings = all_paddings[g] if all_paddings else [0] * len(params)
        flat = gather(partition)
        group_names = [names[id(p)] for p in params]
        truth["group_names"].append(group_names)
        truth["padded_numel"].append(flat.numel())
        truth["fp32"].update(zip(group_names, split(flat, params, paddings), strict=True))
        scalars = {}
        # load_universal leaves each rank's keys in an order of its own: gather the same one on all
        for key, value in sorted(leaves(saved.get(g, {})), key=lambda pair: pair[0]):
            if torch.is_tensor(value) and value.ndim > 0 and value.shape == partition.shape:
                by_name = zip(group_names, split(gather(value), params, paddings), strict=True)
                truth["state"].setdefault(key, {}).update(by_name)
            elif torch.is_tensor(value):
                scalars[key] = value.item() if value.numel() == 1 else value.clone()
            else:
                scalars[key] = value
        truth["scalars"].append(scalars)
    return truth


def stage0_truth(engine: Any) -> dict[str, Any]:
    """What every rank holds whole: masters, which are the weights in fp32, and optimizer states by name."""
    opt = engine.optimizer
    inner = getattr(opt, "optimizer", opt)
    names = {id(p): n for n, p in engine.module.named_parameters()}
    masters = getattr(opt, "fp32_groups", [group["params"] for group in opt.param_groups])
    params = getattr(opt, "fp16_groups", masters)
    truth: dict[str, Any] = {"fp32": {}, "state": {}}
    for own, kept in zip(params, masters, strict=True):
        for param, master in zip(own, kept, strict=True):
            name = names[id(param)]
            truth["fp32"][name] = master.detach().clone()
            for key, value in inner.state.get(master, {}).items():
                if torch.is_tensor(value) and value.ndim > 0 and value.shape == master.shape:
                    truth["state"].setdefault(key, {})[name] = value.clone()
    return truth


def safe_get_agrees(engine: Any, fp32: dict[str, torch.Tensor]) -> bool:
    from deepspeed.utils import safe_get_full_fp32_param

    agrees = True
    for name, p in engine.module.named_parameters():
        if name in fp32 and p.numel():
            agrees &= torch.equal(safe_get_full_fp32_param(p).cpu(), fp32[name])
    return agrees


def zero3_truth(engine: Any) -> dict[str, Any]:
    """What the partitioned engine holds, gathered: its own weights, masters and state by name."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    opt = engine.optimizer
    named = list(engine.module.named_parameters(remove_duplicate=False))
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad and p.ds_numel]
    # empty ones aside, gathering leaves the parameters as they were
    with deepspeed.zero.GatheredParameters([p for _, p in named if p.ds_numel]):
        weights = {n: p.detach().clone() for n, p in named}
    scalars: list[dict[str, Any]] = []
    kinds: list[str] = []
    for flat in opt.fp32_partitioned_groups_flat:
        scalars.append({})
        for key, value in opt.optimizer.state.get(flat, {}).items():
            if torch.is_tensor(value) and value.ndim:
                kinds += [key] if key not in kinds else []
            else:
                scalars[-1][key] = value.item() if torch.is_tensor(value) else value
    ids = {id(p): n for n, p in trained}
    return {
        "module": weights,
        "fp32": {n: safe_get_full_fp32_param(p).clone() for n, p in trained},
        "state": {k: {n: safe_get_full_optimizer_state(p, k).clone() for n, p in trained} for k in kinds},
        "scalars": scalars,  # per sub-group
        "group_names": [[ids[id(p)] for p in group] for group in opt.fp16_groups],  # likewise
    }


def truth(engine: Any) -> dict[str, Any]:
    """What the engine holds now; a collective."""
    opt = engine.optimizer
    has_partitions = any(
        hasattr(opt, a) for a in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups")
    )
    buffers = {n: b.clone() for n, b in engine.module.named_buffers()}
    state_dict = engine.module.state_dict() if not hasattr(engine, "grid") else {}
    module = {n: t.detach().clone() for n, t in state_dict.items() if n not in buffers}
    owners: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, p in engine.module.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(p), name)
        if owner != name:
            shared[name] = owner
    out = {
        "module": module,
        "buffers": buffers,
        "persistent_buffers": [n for n in buffers if n in state_dict],
        "frozen": [n for n, p in engine.module.named_parameters() if not p.requires_grad],
        "shared": shared,
        "lr": [float(g["lr"]) for g in opt.param_groups],
        "param_groups": [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups],
        "lr_scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler else None,
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "optimizer_class": type(opt).__name__,
    }
    if engine.zero_optimization_stage() == 3:
        return {**out, **zero3_truth(engine)}
    if engine.zero_optimization_stage() == 0 and not hasattr(opt, "fp32_groups_flat_partition"):
        return {**out, **stage0_truth(engine)}
    if not has_partitions or hasattr(engine, "grid") or getattr(engine, "has_moe_layers", False):
        return out
    out.update(optimizer_truth(engine))
    out["safe_get_agrees"] = safe_get_agrees(engine, out["fp32"])
    out["cast_agrees"] = all(torch.equal(t.to(module[n].dtype), module[n]) for n, t in out["fp32"].items())
    return out


# ---- saving -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    error: str | None  # the first of any rank
    is_writer: bool  # this rank is to write it down
    in_step: bool  # no rank can still be inside a collective


def where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join(f"{frame.filename}:{frame.lineno}" for frame in frames)


def attempt(key: str, work: Callable[[], None]) -> Outcome:
    """Does `work` on every rank; they tell each other how it went.

    They do so by way of the store, as the process group may be out of step after a failure.
    """
    rank = dist.get_rank()
    mine: dict[str, Any] = {"error": None, "where": None}
    try:
        work()
    except Exception as e:
        mine = {"error": f"rank {rank}\n{traceback.format_exc()}", "where": where(e)}
    store = dist.PrefixStore("attempts", dist.distributed_c10d._get_default_store())
    store.set(f"{key}/{rank}", json.dumps(mine))
    keys = [f"{key}/{r}" for r in range(dist.get_world_size())]
    try:
        store.wait(keys, datetime.timedelta(seconds=10 if mine["error"] else 3600))
    except RuntimeError:
        return Outcome(mine["error"], is_writer=True, in_step=False)
    reports = [json.loads(store.get(k)) for k in keys]
    error = next((r["error"] for r in reports if r["error"]), None)
    return Outcome(error, is_writer=rank == 0, in_step=len({r["where"] for r in reports}) == 1)


def go_on(outcome: Outcome) -> None:
    """Leaves the process, for torchrun to start all ranks again, if they are out of step."""
    if not outcome.in_step:
        if not outcome.is_writer:
            time.sleep(3600)  # until torchrun has seen the writer exit
        os._exit(1)


def is_first_start() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def close(engine: Any) -> None:
    if engine is not None and hasattr(engine, "destroy"):
        engine.destroy()
    gc.collect()


def zero_to_fp32(save_dir: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(save_dir))
        torch.save({n: t.clone() for n, t in weights.items()}, f"{save_dir}.zero_to_fp32.pt")
    except Exception:
        Path(f"{save_dir}.zero_to_fp32.error").write_text(traceback.format_exc())


def sample(variant: str, save_dir: Path) -> None:
    v = VARIANTS[variant]
    engine = None
    try:
        engine = build(variant)
        losses_before = train(engine, v.steps)
        options: dict[str, Any] = {"client_state": client_state() if v.client_state else {"epoch": 1}}
        if "exclude_frozen_parameters" in inspect.signature(engine.save_checkpoint).parameters:
            options["exclude_frozen_parameters"] = v.exclude_frozen
        engine.save_checkpoint(str(save_dir), **options)
        held = truth(engine)
        held.update(
            variant=variant,
            world_size=dist.get_world_size(),
            deepspeed=deepspeed.__version__,
            torch=torch.__version__,
            dtype=v.dtype,
            zero_stage=v.zero["stage"],
            tag=f"global_step{held['global_steps']}",
            losses_before=losses_before,
            losses=train(engine, STEPS_AFTER),
        )
        held["fp32_after"] = truth(engine).get("fp32")
        if dist.get_rank() == 0:
            torch.save(held, f"{save_dir}.truth.pt")
            zero_to_fp32(save_dir)
    finally:
        close(engine)


def remove(save_dir: Path) -> None:
    shutil.rmtree(save_dir, ignore_errors=True)
    for beside in save_dir.parent.glob(f"{save_dir.name}.*"):
        beside.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", default="all", help="comma-separated, or all (default)")
    args = parser.parse_args()
    variants = list(VARIANTS) if args.variants == "all" else args.variants.split(",")
    start()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [v for v in sorted(variants, key=pipelines_last) if is_supported(v, world_size)]
    dirs = {variant: args.out / f"{variant}_ws{world_size}" for variant in todo}
    if is_first_start() and rank == 0:
        for save_dir in dirs.values():
            remove(save_dir)
    dist.barrier()
    todo = [
        v for v in todo if not any(Path(f"{dirs[v]}.{end}").exists() for end in ("truth.pt", "error.txt"))
    ]
    dist.barrier()
    for variant in todo:
        save_dir = dirs[variant]
        outcome = attempt(variant, functools.partial(sample, variant, save_dir))
        if outcome.is_writer:
            if outcome.error:
                remove(save_dir)
                Path(f"{save_dir}.error.txt").write_text(outcome.error)
            last = outcome.error.strip().splitlines()[-1] if outcome.error else "ok"
            print(f"SAMPLE {save_dir.name}: {last}", flush=True)
        go_on(outcome)
    dist.barrier()
    os._exit(0)  # engines of several kinds in one process do not always shut down cleanly


if __name__ == "__main__":
    main()
