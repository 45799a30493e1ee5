"""The files of a Hugging Face model folder, by name."""

from __future__ import annotations

import re
from collections.abc import Collection

from ckpttools.errors import CkptError, Unsupported, some
from ckpttools.formats.configs import ADAPTER, DIFFUSERS, HEADS
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
    f"{DIFFUSERS}.safetensors",
    f"{DIFFUSERS}.safetensors.index.json",
    f"{DIFFUSERS}.bin",
    f"{DIFFUSERS}.bin.index.json",
)
SINGLE = tuple(name for name in WEIGHTS if not name.endswith(".json"))
BESIDE = ("optimizer.pt", "optimizer.bin", "random_states_0.pkl")  # what trainers save with a model
BIN = "bin"  # the layout's variant for torch files instead of safetensors
SHARD = re.compile(rf"(model|pytorch_model|{ADAPTER}|{DIFFUSERS})-\d{{5}}-of-\d{{5}}\.(safetensors|bin)")
INDEX = tuple(name for name in WEIGHTS if name.endswith(".json"))
# diffusers names a variant (fp16, non_ema) in each file; where the variant stands changed with its versions
VARIANT = re.compile(
    rf"{DIFFUSERS}\.\w+\.(safetensors|bin)"
    rf"|{DIFFUSERS}\.(safetensors|bin)\.(\w+\.index|index\.\w+)\.json"
)
VARIANT_SHARD = re.compile(
    rf"{DIFFUSERS}(\.\w+-\d{{5}}-of-\d{{5}}|-\d{{5}}-of-\d{{5}}\.\w+)\.(safetensors|bin)"
)
OTHER_FRAMEWORKS = re.compile(
    r"(diffusion_)?flax_model(-\d{5}-of-\d{5})?\.msgpack|tf_model(-\d{5}-of-\d{5})?\.h5"
    r"|.+\.onnx|openvino_\w+\.bin"
)
RUN = re.compile(r"checkpoint-\d+")  # what the Trainer saves of a run beside its last model
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
    first = next(iter(_weights(names)), None)
    return (first, None) if first is not None and is_index(first) else (None, first)


def not_read(names: Collection[str]) -> list[str]:
    """Other weights of a folder than its model."""
    return [name for name in _weights(names) if name not in weight_files(names)]


def _weights(names: Collection[str]) -> list[str]:
    """What may be the folder's model, the first choice first."""
    return [name for name in WEIGHTS if name in names] + sorted(filter(VARIANT.fullmatch, names))


def is_index(name: str) -> bool:
    return name in INDEX or (name.endswith(".json") and VARIANT.fullmatch(name) is not None)


def models_below(folder: Folder) -> tuple[str, ...]:
    """Folders directly in a model's that hold weights, too: further layers (sentence-transformers), adapters.

    Not the checkpoints of the Trainer, which are models of their own, nor what may not be looked into.
    """
    return tuple(name for name in sorted(folder.folders) if not RUN.fullmatch(name) and _holds(folder, name))


def _holds(folder: Folder, name: str) -> bool:
    try:
        return holds(folder.inside(name))
    except CkptError:
        return False


def names_it(name: str) -> bool:
    """Whether a file of that name holds a model's weights, or says in which files they are."""
    return is_index(name) or is_weights(name)


def is_shard(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (SHARD, VARIANT_SHARD))


def is_weights(name: str) -> bool:
    single = name in SINGLE or VARIANT.fullmatch(name) is not None
    return is_shard(name) or (single and not is_index(name))


def holds(folder: Folder) -> bool:
    return any(weight_files(folder.names))


def recognise(folder: Folder) -> Found | None:
    """Raises CkptError for shards without their index."""
    shards = [name for name in folder.names if is_shard(name)]
    if shards and not any(name.endswith(".index.json") or is_index(name) for name in folder.names):
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
    named = path.name.endswith(".index.json") or is_index(path.name)
    return Found(path.parent, "the folder of this index") if named else None


def lacking(folder: Folder) -> CkptError | None:
    """A configuration alone or with another framework's weights, or what trainers save beside weights."""
    head = next((name for name in (*HEADS, *BESIDE) if name in folder.names), None)
    if head is None:
        return None
    if others := [name for name in folder.names if OTHER_FRAMEWORKS.fullmatch(name)]:
        return Unsupported(
            "framework-not-read",
            f"the weights are those of another framework: {some(others)}",
            where=folder.path,
            why="of a Hugging Face model the weights of torch are read, and none of them lies beside",
            hint="load the model with the library that wrote it, and save it as safetensors",
        )
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
