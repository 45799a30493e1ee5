"""A small causal LM from a config, with random weights, its frozen part and its parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import transformers

from ckpttools.errors import UsageError
from ckpttools.trainer.config import Config, Model
from ckpttools.trainer.text import VOCAB_SIZE


def build(config: Config) -> torch.nn.Module:
    """The model on the CPU in fp32; the same weights for the same seed on every rank."""
    torch.manual_seed(config.seed)
    settings = architecture(config)
    settings._attn_implementation = "eager"  # plain matrix products: the same bits every time
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(settings)
    _freeze(model, config.freeze)
    return model


def architecture(config: Config) -> Any:
    """The transformers configuration of the model: what `from_pretrained` needs beside extracted weights."""
    return _SETTINGS[config.model.family](config.model, config.data.sequence_length)


def param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings decay, norms and biases do not; frozen parameters are in neither group."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def _llama(model: Model, length: int) -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=length,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _gpt2(model: Model, length: int) -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=model.hidden_size,
        n_inner=model.intermediate_size,
        n_layer=model.layers,
        n_head=model.heads,
        n_positions=length,
        # no dropout: a checkpoint holds no random state, and resuming is exact without it
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


_SETTINGS = {"llama": _llama, "gpt2": _gpt2}


def _freeze(model: torch.nn.Module, globs: Sequence[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(
                "train-config",
                f"freeze: {glob!r} matches no parameter",
                why="the run would train parameters that were meant to stay as they are",
                hint=f"parameter names look like {names[0]} and {names[-1]}",
            )
    for name, param in model.named_parameters():
        if any(fnmatchcase(name, glob) for glob in globs):
            param.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            "train-config",
            "freeze: every parameter is frozen",
            why="there is nothing left to train",
            hint="leave at least one parameter out of the freeze list",
        )
