"""What is learned: text, byte by byte, or images of digits. Samples in, loss and accuracy out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from msgspec import Struct
from torch.nn.functional import cross_entropy

from ckpttools.trainer import digits, text
from ckpttools.trainer.config import Config
from ckpttools.trainer.digits import Digits
from ckpttools.trainer.text import Samples

Data = Samples | Digits


def read(config: Config) -> Data:
    """The samples of a run. Raises UsageError."""
    source = digits.read if config.data.source == "digits" else text.read
    return source(config.data, config.batch.global_batch_size)


class Task(Struct, frozen=True, kw_only=True):
    """`data` on a device. The model is what is called: an engine, or a module."""

    data: Data
    device: Any
    smoothing: float = 0.0

    def loss(self, model: Callable[..., Any], ids: Sequence[int]) -> torch.Tensor:
        """Mean loss of some samples: over the next bytes, or the labels."""
        inputs, labels = self._batch(ids)
        if not self.smoothing:
            mean: torch.Tensor = model(**inputs, labels=labels).loss
            return mean
        logits, labels = self._flat(model(**inputs).logits, labels)
        return cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)

    def judge(self, model: Callable[..., Any], ids: Sequence[int]) -> tuple[float, float]:
        """The loss without smoothing, and the share of right guesses."""
        inputs, labels = self._batch(ids)
        out = model(**inputs, labels=labels)
        logits, labels = self._flat(out.logits, labels)
        return out.loss.item(), (logits.argmax(-1) == labels).double().mean().item()

    def _batch(self, ids: Sequence[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if isinstance(self.data, Digits):
            pixels = torch.from_numpy(self.data.images[list(ids)]).unsqueeze(1).to(self.device)
            labels = torch.from_numpy(self.data.labels[list(ids)]).to(self.device)
            return {"pixel_values": pixels}, labels
        tokens = torch.tensor([self.data.sample(i).tolist() for i in ids], dtype=torch.long)
        tokens = tokens.to(self.device)
        return {"input_ids": tokens}, tokens

    def _flat(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One guess a row; of text each byte's is for the one after it."""
        if isinstance(self.data, Digits):
            return logits, labels
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
