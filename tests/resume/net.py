"""The model of launch.py, and what of it a user may have changed between two runs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

VOCAB, HIDDEN, SEQ = 11, 6, 3


class Net(nn.Module):
    """Some 250 elements. The options are the changes of a model that a user may have made."""

    def __init__(
        self,
        *,
        inner: int = 7,
        extra: bool = False,
        rename: bool = False,
        tied: bool = False,
        buffer: bool = False,
        bias: bool = True,
        frozen: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, HIDDEN)
        self.up = nn.Linear(HIDDEN, inner)
        self.down = nn.Linear(inner, HIDDEN, bias=bias)
        self.norm = nn.LayerNorm(HIDDEN)
        head = nn.Linear(HIDDEN, VOCAB)
        self.name = "classifier" if rename else "head"
        setattr(self, self.name, head)
        if tied:
            head.weight = self.emb.weight
        if extra:
            self.extra = nn.Linear(HIDDEN, HIDDEN)
        if buffer:
            self.register_buffer("scale", torch.linspace(0.9, 1.1, HIDDEN))
        for name, param in self.named_parameters():
            param.requires_grad_(not any(name.startswith(prefix) for prefix in frozen))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.emb(x)
        if hasattr(self, "scale"):
            h = h * self.scale.to(h.dtype)
        h = h + self.down(F.gelu(self.up(h)))
        if hasattr(self, "extra"):
            h = h + self.extra(h)
        return F.cross_entropy(getattr(self, self.name)(self.norm(h).mean(1)).float(), y)
