"""The files of a Hugging Face model folder, by name."""

from __future__ import annotations

import re
from collections.abc import Collection

from ckpttools.errors import CkptError
from ckpttools.formats.configs import HEADS
from ckpttools.formats.format import Folder, Found
from ckpttools.location import Location

# transformers' order (modeling_utils.py, _get_resolved_checkpoint_files): a single file before its own index
# alone; adapters are PEFT's, consolidated.safetensors is a second copy in Mistral's repositories
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "consolidated.safetensors",
)
SINGLE = tuple(name for name in WEIGHTS if not name.endswith(".json"))
BESIDE = ("optimizer.pt", "optimizer.bin", "random_states_0.pkl")  # what trainers save with a model
ADAPTER = "adapter_model"
BIN = "bin"  # the layout's variant for torch files instead of safetensors
SHARD = re.compile(r"(model|pytorch_model|adapter_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
INDEX = tuple(name for name in WEIGHTS if name.endswith(".json"))
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


def weight_files(names: Collection[str]) -> tuple[str | None, str | None]:
    """The index or the single weights file that is a folder's model: one of them, or none."""
    first = next((name for name in WEIGHTS if name in names), None)
    return (first, None) if first in INDEX else (None, first)


def not_read(names: Collection[str]) -> list[str]:
    """Other weights of a folder than its model."""
    return [name for name in WEIGHTS if name in names and name not in weight_files(names)]


def names_it(name: str) -> bool:
    """Whether a file of that name holds a model's weights, or says in which files they are."""
    return name in INDEX or is_weights(name)


def is_shard(name: str) -> bool:
    return SHARD.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    return name in SINGLE or is_shard(name)


def holds(folder: Folder) -> bool:
    return any(weight_files(folder.names))


def recognise(folder: Folder) -> Found | None:
    """Raises CkptError for shards without their index."""
    shards = [name for name in folder.names if SHARD.fullmatch(name)]
    if shards and not any(name.endswith(".index.json") for name in folder.names):
        raise CkptError(
            "index-missing",
            f"{len(shards)} shards of a model, and no index",
            where=folder.path,
            why="the index says which tensors there are: without it nobody knows whether shards are missing",
            hint="copy the *.index.json from where the folder was saved",
        )
    return Found(folder.path, "a Hugging Face folder") if holds(folder) else None


def recognise_file(path: Location) -> Found | None:
    if path.name.endswith(".safetensors"):
        return Found(path, "a safetensors file")
    return Found(path.parent, "the folder of this index") if path.name.endswith(".index.json") else None


def lacking(folder: Folder) -> CkptError | None:
    """A configuration alone, or what trainers save beside the weights."""
    head = next((name for name in (*HEADS, *BESIDE) if name in folder.names), None)
    if head is None:
        return None
    return CkptError(
        "no-weights",
        f"{head} is here, but no model weights",
        where=folder.path,
        why="the folder is a Hugging Face model without its weights, or they were not copied",
        hint="copy model.safetensors (or its shards and index) from where the folder was saved",
    )


def shard_names(stem: str, suffix: str, count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-00003.safetensors` and so on."""
    if count == 1:
        return [stem + suffix]
    return [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]
