"""Tiny models trained by torch and saved as training code does: what every pair of formats must carry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """Several kinds of layers, an uneven number of rows, a parameter of one element and one without any."""

    def __init__(self, *, tied: bool = False, frozen: bool = False, buffers: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.down = nn.Linear(5, 6, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.emb.weight
        if frozen:
            self.tower = nn.Linear(3, 6)
            self.tower.requires_grad_(False)
        if buffers:
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("mask", torch.tensor([True, False, True]))
            self.register_buffer("ids", torch.arange(4, dtype=torch.int32))
            self.bn = nn.BatchNorm1d(6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.emb(tokens)
        if hasattr(self, "tower"):
            hidden = hidden + self.tower(torch.ones(3, dtype=hidden.dtype))
        if hasattr(self, "bn"):
            hidden = self.bn(hidden)
        out: torch.Tensor = self.head(hidden + self.down(self.norm(self.up(hidden).relu()))) * self.gain
        return out


class Lora(nn.Module):
    """A frozen layer with adapters, named as peft names them."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.q = nn.Module()
        self.base_model.q.base_layer = nn.Linear(6, 6).requires_grad_(False)
        self.base_model.q.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.base_model.q.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q: Any = self.base_model.q
        x = nn.functional.one_hot(tokens, 6).to(q.base_layer.weight.dtype)
        out: torch.Tensor = q.base_layer(x) + q.lora_B["default"](q.lora_A["default"](x))
        return out


class Vision(nn.Module):
    """A frozen tower, a projector and a language model with tied ends."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 4))
        self.vision_tower.requires_grad_(False)
        self.projector = nn.Linear(4, 6)
        self.language_model = Net(tied=True, buffers=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        pixels = torch.ones(1, 1, 3, 3, dtype=self.projector.weight.dtype)
        seen: torch.Tensor = self.projector(self.vision_tower(pixels)).sum()
        out: torch.Tensor = self.language_model(tokens) + seen
        return out


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Two groups of named parameters, so that the file says which is which."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    found = [
        {"params": [(name, p) for name, p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(name, p) for name, p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": 0.003},
    ]
    return [group for group in found if group["params"]]


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(net), lr=0.01)


def adamw16(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(net), lr=0.01, eps=1e-4)  # what 16 bits can hold


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def adagrad(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad([p for p in net.parameters() if p.requires_grad], lr=0.1)


def amsgrad(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True)


Make = Callable[[], nn.Module]
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]
# a name: the model, its optimizer, the type of its weights
MODELS: dict[str, tuple[Make, Optimizer, torch.dtype]] = {
    "groups": (Net, adamw, torch.float32),
    "all": (lambda: Net(tied=True, frozen=True, buffers=True), adamw, torch.float32),
    "tied": (lambda: Net(tied=True), adamw, torch.float32),
    "frozen": (lambda: Net(frozen=True), adamw, torch.float32),
    "buffers": (lambda: Net(buffers=True), adamw, torch.float32),
    "lora": (Lora, adamw, torch.float32),
    "vision": (Vision, adamw, torch.float32),
    "sgd": (Net, sgd, torch.float32),
    "adagrad": (Net, adagrad, torch.float32),
    "amsgrad": (Net, amsgrad, torch.float32),
    "bf16": (lambda: Net(tied=True), adamw16, torch.bfloat16),
    "fp16": (lambda: Net(buffers=True), adamw16, torch.float16),
}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """The loss of each step; a batch follows from the number of its step."""
    losses = []
    for step in range(first, last):
        tokens = torch.randint(0, 6, (12,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(tokens).float(), (tokens + 1) % 6)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(name: str, path: Path, steps: int = 3) -> Path:
    """A model of MODELS after some steps, with the keys of the usual guides."""
    torch.manual_seed(0)
    make, optimize, dtype = MODELS[name]
    net = make().to(dtype)
    optimizer = optimize(net)
    losses = train(net, optimizer, 0, steps)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    write(path, net.state_dict(), optimizer.state_dict(), scheduler.state_dict(), losses[-1], steps)
    return path


def write(
    path: Path, model: dict[str, Any], optimizer: dict[str, Any], scheduler: Any, loss: float, step: int
) -> None:
    saved = {
        "epoch": 1,
        "global_step": step,
        "model_state_dict": model,
        "optimizer_state_dict": optimizer,
        "scheduler_state_dict": scheduler,
        "train_loss": loss,
        "val_loss": 0.5,
    }
    torch.save(saved, path)


def pathological(path: Path, *, names: bool = True) -> Path:
    """Weights of every shape and type that a state dict may hold, trained ones with moments and steps; with
    `names` also one that no file system takes.
    """
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    trained = {
        "a.b.c/d e": torch.randn(3, 5),
        "näme.权重.🙂": torch.randn(4),
        "x" * (300 if names else 200) + ".weight": torch.randn(1, 1, 3),
        "scalar": torch.tensor(1.5),
        "one": torch.randn(1),
        "none": torch.empty(0),
        "no.rows": torch.empty(0, 4),
        "no.columns": torch.empty(3, 0),
        "ones": torch.randn(1, 7, 1),
        "uneven": torch.randn(7, 3),
        "deep": torch.randn(2, 3, 1, 2, 2),
    }
    beside = {
        "columns": base[:, 2:5],  # a view that is not contiguous
        "turned": base.t(),
        "rows": base[2:4],  # a view into the same storage
        "bool": torch.tensor([True, False, True]),
        "bool.0d": torch.tensor(True),
        "int64.0d": torch.tensor(2**62 + 1),
        "int8": torch.arange(-3, 4, dtype=torch.int8),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "complex64": torch.randn(2, 2, dtype=torch.complex64),
        "complex128": torch.randn(3, dtype=torch.complex128),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "float8.e5": torch.randn(2, 2).to(torch.float8_e5m2),
        "float64": torch.tensor([1e-300, 2.0], dtype=torch.float64),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "empty.bool": torch.empty(0, dtype=torch.bool),
    }
    tied = torch.randn(2, 2)
    model = {**trained, "tied.owner": tied, "tied.alias": tied, **beside}
    trained["tied.owner"] = tied
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.randn_like(t), "exp_avg_sq": torch.rand_like(t)}
        for i, t in enumerate(trained.values())
    }
    reference = torch.optim.AdamW([torch.zeros(1)], lr=0.01).state_dict()["param_groups"][0]
    group = {**reference, "params": list(range(len(trained))), "param_names": list(trained)}
    write(path, model, {"state": state, "param_groups": [group]}, {"last_epoch": 3}, 0.25, 3)
    return path
