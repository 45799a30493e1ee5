"""The files of a Hugging Face model folder, by name."""

from __future__ import annotations

import re
from pathlib import Path

from ckpttools.stores.files import entries

SINGLE = (
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "consolidated.safetensors",
)
ADAPTER = "adapter_model"
SHARD = re.compile(r"(model|pytorch_model|adapter_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
INDEX = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors.index.json",
)
ROLES = {
    "config.json": "the model's architecture",
    "generation_config.json": "defaults for text generation",
    "adapter_config.json": "the adapter's settings and base model",
    "trainer_state.json": "the Trainer's counters and log",
    "training_args.bin": "the Trainer's arguments (a pickle, not read)",
    "optimizer.pt": "optimizer state",
    "scheduler.pt": "scheduler state",
    "tokenizer.json": "the tokenizer",
}
# what transformers needs beside the weights to load a model and its tokenizer
CONFIG_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|"
    r"preprocessor_config|processor_config|adapter_config)\.json|merges\.txt|vocab\.txt|.*\.model|"
    r"chat_template\.(jinja|json)"
)
# a folder with one of them has a configuration
HEADS = ("config.json", "adapter_config.json")


def weight_files(folder: Path) -> tuple[str | None, str | None]:
    """The index and the single weights file that the folder holds, transformers' order of preference."""
    names = {entry.name for entry in entries(folder)}
    index = next((name for name in INDEX if name in names), None)
    single = next((name for name in SINGLE if name in names), None)
    return index, single


def looks_like_hf(folder: Path) -> bool:
    return any(weight_files(folder))


def shard_names(stem: str, suffix: str, count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-00003.safetensors` and so on."""
    if count == 1:
        return [stem + suffix]
    return [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]
