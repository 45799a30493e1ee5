"""A small model from a config, with random weights or loaded ones, its frozen part and parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers

from ckpttools import formats
from ckpttools.errors import CkptError, UsageError, some
from ckpttools.passes.read import load
from ckpttools.stores.links import within
from ckpttools.tensors import TensorRef
from ckpttools.trainer.config import Config, Model
from ckpttools.trainer.digits import CLASSES, SIDE
from ckpttools.trainer.text import VOCAB_SIZE


def build(config: Config) -> torch.nn.Module:
    """The model on the CPU in fp32; the same weights for the same seed on every rank."""
    torch.manual_seed(config.seed)
    settings = architecture(config)
    settings._attn_implementation = "eager"  # plain matrix products: the same bits every time
    kind = "ForImageClassification" if config.model.family == "vit" else "ForCausalLM"
    model: torch.nn.Module = getattr(transformers, f"AutoModel{kind}").from_config(settings)
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


def _vit(model: Model, length: int) -> Any:
    return transformers.ViTConfig(
        image_size=SIDE,
        patch_size=2,
        num_channels=1,
        num_labels=CLASSES,
        problem_type="single_label_classification",
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


_SETTINGS = {"llama": _llama, "gpt2": _gpt2, "vit": _vit}


def fill(model: torch.nn.Module, checkpoint: Path) -> None:
    """Weights from any checkpoint that ckpttools reads: the fp32 masters where it has them.

    Raises CkptError where its tensors are not this model's.
    """
    source = formats.locate(checkpoint)
    found = formats.read(source)
    best = found.best_copies()
    own = model.state_dict()
    wrong = [name for name, param in own.items() if name not in best and name not in found.shared]
    wrong += [name for name, ref in best.items() if name in own and ref.shape != tuple(own[name].shape)]
    wrong += [name for name in best if name not in own]
    if wrong:
        raise CkptError(
            "resume-failed",
            f"{len(wrong)} tensors are not those of the model: {some(wrong, 3)}",
            where=checkpoint,
            why="weights of another model would be missing, or of another shape",
            hint="set the model section as the run had it that saved them",
        )
    with torch.no_grad(), within(source.root):
        for name, ref in best.items():
            own[name].copy_(_tensor(ref).reshape(ref.shape))


def _tensor(ref: TensorRef) -> torch.Tensor:
    raw = bytearray(load(ref).tobytes())
    if not raw:
        return torch.empty(ref.shape)
    dtype: torch.dtype = getattr(torch, ref.dtype.name)
    return torch.frombuffer(raw, dtype=dtype)


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
