"""Hugging Face model folders: safetensors or pytorch_model.bin, single or sharded, and PEFT adapters.

    model.safetensors | model-00001-of-0000N.safetensors + model.safetensors.index.json
    pytorch_model.bin | pytorch_model-00001-of-0000N.bin + pytorch_model.bin.index.json
    adapter_model.safetensors | adapter_model.bin              (PEFT)
    config.json, tokenizer files, trainer_state.json           (carried as files)

The index is {"metadata": {"total_size": bytes}, "weight_map": {tensor name: shard name}}.
Tied weights are stored once; transformers ties them again from the model's configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ckpttools.checkpoint import Checkpoint, FileRole, Layout, TrainState, Weights
from ckpttools.containers import fields, jsons
from ckpttools.containers.pickles import Global, Node, Object
from ckpttools.containers.safetensors import cast, read_safetensors, safetensors_file
from ckpttools.containers.torch_file import (
    Storage,
    TorchFile,
    new_storage,
    read_torch_file,
    tensor_node,
    write_torch_file,
)
from ckpttools.errors import CkptError, escape
from ckpttools.formats.monolithic import tied
from ckpttools.plan import Literal, OutputFile, Plan, SourceCheck, copy_file
from ckpttools.stores.files import entries, is_file, plain_name, size_of
from ckpttools.stores.links import within
from ckpttools.tensors import TensorRef

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


def weight_files(folder: Path) -> tuple[str | None, str | None]:
    """The index and the single weights file that the folder holds, transformers' order of preference."""
    names = {entry.name for entry in entries(folder)}
    index = next((name for name in INDEX if name in names), None)
    single = next((name for name in SINGLE if name in names), None)
    return index, single


def looks_like_hf(folder: Path) -> bool:
    return any(weight_files(folder))


def read(path: Path) -> Checkpoint:
    """Read a folder, or one .safetensors file. Headers only."""
    if path.is_dir():
        index, single = weight_files(path)
        if single is not None and (index is None or single.endswith(".safetensors")):
            index, shards = None, {single: None}
        elif index is not None:
            shards = dict.fromkeys(_shards(path, index))
        else:
            raise CkptError("no-weights", "no model weights in this folder", where=path)
        folder = path
    else:
        index, shards, folder = None, {path.name: None}, path.parent
    tensors: dict[str, TensorRef] = {}
    checks: list[SourceCheck] = []
    metadata: dict[str, str] = {}
    files: list[FileRole] = []
    torch_files: list[TorchFile] = []
    weight_map = _weight_map(folder / index) if index is not None else None
    for name in shards:
        if not (folder / name).exists():
            raise _missing(folder / name)
    for name in shards:
        found = _read_shard(folder / name, checks, metadata, torch_files)
        if weight_map is not None:
            _check_shard(folder / name, found, weight_map)
        tensors |= found
        dangers = () if name.endswith(".safetensors") else torch_files[-1].dangers
        files.append(
            FileRole(path=folder / name, nbytes=size_of(folder / name), role="weights", dangers=dangers)
        )
    if index is not None:
        _check_index(folder / index, tensors)
        files.append(
            FileRole(path=folder / index, nbytes=size_of(folder / index), role="which shard holds what")
        )
    if path.is_dir():
        files += _other_files(path, {file.path.name for file in files})
    dtypes = {ref.dtype.short for ref in tensors.values() if ref.dtype.is_float}
    return Checkpoint(
        path=path,
        layout=Layout(
            format="hf" if path.is_dir() else "safetensors",
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            stem=ADAPTER if all(name.startswith(ADAPTER) for name in shards) else None,
        ),
        tensors=tensors,
        shared=tied(tensors),
        train_state=_train_state(path, metadata),
        files=tuple(files),
        checks=tuple(checks),
        notes=("safetensors files carry no checksums",) if not checks else (),
        template=tuple(torch_files),
    )


def _shards(folder: Path, index: str) -> list[str]:
    weight_map = _weight_map(folder / index)
    return sorted({plain_name(shard, folder / index) for shard in weight_map.values()})


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = jsons.read(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise jsons.damaged(path, "weight_map is missing or empty")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise jsons.damaged(path, "weight_map names something that is not a file")
    return weight_map


def _check_shard(path: Path, tensors: Mapping[str, TensorRef], weight_map: Mapping[str, str]) -> None:
    """Each tensor of a shard is one that the index says is there."""
    for name in tensors:
        if name not in weight_map:
            problem = f"holds '{escape(name)}', which the index does not name"
        elif weight_map[name] != path.name:
            problem = f"holds '{escape(name)}', which the index says is in {escape(weight_map[name])}"
        else:
            continue
        raise _mismatch(path, problem)


def _check_index(path: Path, tensors: Mapping[str, TensorRef]) -> None:
    missing = [name for name in _weight_map(path) if name not in tensors]
    if missing:
        raise _mismatch(
            path, f"names {len(missing)} tensors that no shard holds, first '{escape(missing[0])}'"
        )


def _mismatch(path: Path, problem: str) -> CkptError:
    return CkptError(
        "index-mismatch",
        f"{escape(path.name)} {problem}",
        where=path,
        why="the shards and the index come from different saves",
        hint="copy the whole folder again from where it was saved",
    )


def _missing(path: Path) -> CkptError:
    return CkptError(
        "shard-missing",
        f"the shard {escape(path.name)} is missing",
        where=path.parent,
        why="the index names it: the tensors in it cannot be restored",
        hint="copy it from where the folder was saved",
    )


def _read_shard(
    path: Path, checks: list[SourceCheck], metadata: dict[str, str], torch_files: list[TorchFile]
) -> dict[str, TensorRef]:
    if path.name.endswith(".safetensors"):
        file = read_safetensors(path)
        metadata |= file.metadata
        return dict(file.tensors)
    torch_file = read_torch_file(path)
    torch_files.append(torch_file)
    checks += torch_file.checks()
    root = fields.mapping(path, torch_file.value, "the file's value")
    views = ((name, torch_file.view(node)) for name, node in root.named())
    return {name: view.ref for name, view in views if view is not None}


def _other_files(folder: Path, known: set[str]) -> list[FileRole]:
    return [
        FileRole(
            path=folder / entry.name,
            nbytes=entry.stat().st_size,
            role=ROLES.get(entry.name, "not part of the weights"),
        )
        for entry in entries(folder)
        if is_file(entry) and entry.name not in known
    ]


def _train_state(path: Path, metadata: Mapping[str, str]) -> TrainState:
    """What trainer_state.json says, or the weights' own `__metadata__`, where `ckpt extract` notes it."""
    state = path / "trainer_state.json"
    if not path.is_dir() or not state.is_file():
        done, said, train, val = (
            _float(metadata.get(key)) for key in ("step", "epoch", "train_loss", "val_loss")
        )
        return TrainState(
            step=None if done is None else int(done), epoch=said, train_loss=train, val_loss=val
        )
    values = jsons.read(state, allow_nan=True)  # a loss may be NaN, and Python writes it so
    step, epoch = values.get("global_step"), values.get("epoch")
    return TrainState(
        step=step if type(step) is int else None,
        epoch=epoch if type(epoch) in (int, float) else None,  # type: ignore[arg-type]
    )


def _float(text: str | None) -> float | None:
    try:
        found = None if text is None else float(text)
    except ValueError:
        return None
    return found if found is not None and abs(found) < 1e15 else None


# --- writing ------------------------------------------------------------------------------------------

NO_LIMIT = 1 << 62
# what transformers needs beside the weights to load a model and its tokenizer
CONFIG_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|"
    r"preprocessor_config|processor_config|adapter_config)\.json|merges\.txt|vocab\.txt|.*\.model|"
    r"chat_template\.(jinja|json)"
)


def plan(weights: Weights, *, max_shard_size: int = NO_LIMIT, single: bool = False) -> Plan:
    """A folder of safetensors shards, none larger than `max_shard_size` bytes unless one tensor is.

    With `single`, one file at the destination itself. Tied names are stored once, as transformers does;
    the header maps the others to the stored one, as safetensors' own save_model does.
    """
    tensors = {name: ref for name, ref in weights.tensors.items() if name not in weights.shared}
    about = {"format": "pt", **weights.about, **weights.shared}
    notes = [
        f"{escape(alias)} is tied to {escape(owner)} and stored once"
        for alias, owner in weights.shared.items()
    ]

    def file(path: str, names: Sequence[str]) -> OutputFile:
        return safetensors_file(path, {name: tensors[name] for name in names}, about, weights.dtypes)

    files = _folder(weights, tensors, file, "model", ".safetensors", max_shard_size, single)
    return Plan(files=files, notes=(*weights.notes, *notes), checks=weights.checks)


def plan_bin(weights: Weights, *, max_shard_size: int = NO_LIMIT, single: bool = False) -> Plan:
    """The same as torch files: pytorch_model.bin, or one bare state dict. Tied names share a storage."""

    def file(path: str, names: Sequence[str]) -> OutputFile:
        return write_torch_file(path, _state_dict(weights, names))

    files = _folder(weights, weights.tensors, file, "pytorch_model", ".bin", max_shard_size, single)
    return Plan(files=files, notes=weights.notes, checks=weights.checks)


def _folder(
    weights: Weights,
    names: Iterable[str],
    file: Callable[[str, Sequence[str]], OutputFile],
    stem: str,
    suffix: str,
    limit: int,
    single: bool,
) -> tuple[OutputFile, ...]:
    """The shards, and their index where there are several; with `single` the one file itself."""
    if single:
        return (file("", list(names)),)
    stem = weights.stem or stem
    found = shard(weights, names, limit)
    shards = dict(zip(shard_names(stem, suffix, len(found)), found, strict=True))
    files = [file(name, tensors) for name, tensors in shards.items()]
    return (*files, *index_file(f"{stem}{suffix}.index.json", weights, shards))


def _state_dict(weights: Weights, names: Sequence[str]) -> Node:
    node = Object("reduce", Global("collections", "OrderedDict"), ())
    storages: dict[str, Storage] = {}
    for name in names:
        ref, dtype = weights.tensors[name], weights.dtypes[name]
        owner = weights.shared.get(name, name)
        if owner not in storages:
            storages[owner] = new_storage(dtype, ref.numel, cast(ref, dtype))
        node.pairs.append((name, tensor_node(TensorRef(dtype, ref.shape, ()), storages[owner])))
    return node


def shard(weights: Weights, names: Iterable[str], limit: int) -> list[list[str]]:
    """Names filled into shards in order; tied names go where their owner is and take no room."""
    shards: list[list[str]] = [[]]
    room = limit
    where: dict[str, list[str]] = {}
    for name in names:
        owner = where.get(weights.shared.get(name, name))
        if owner is not None:
            owner.append(name)
            continue
        nbytes = weights.nbytes(name)
        if shards[-1] and nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        where[name] = shards[-1]
        room -= nbytes
    return shards


def shard_names(stem: str, suffix: str, count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-00003.safetensors` and so on."""
    if count == 1:
        return [stem + suffix]
    return [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]


def index_file(name: str, weights: Weights, shards: Mapping[str, Sequence[str]]) -> list[OutputFile]:
    """The index of several shards; none for a single one."""
    if len(shards) == 1:
        return []
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(weights.nbytes(tensor) for tensor in weight_map if tensor not in weights.shared)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return [OutputFile(path=name, segments=(Literal(json.dumps(index, indent=2).encode() + b"\n"),))]


def config_files(folder: Path) -> list[OutputFile]:
    """Copies of the configuration and tokenizer files of a folder."""
    with within(folder):
        return [
            copy_file(folder / entry.name, entry.name, size_of(folder / entry.name))
            for entry in entries(folder)
            if is_file(entry) and CONFIG_FILES.fullmatch(entry.name)
        ]
