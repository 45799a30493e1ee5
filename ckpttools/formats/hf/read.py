"""A model folder, or one .safetensors file, as a Checkpoint: headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpttools.checkpoint import EXCLUDES_FROZEN, Checkpoint, FileRole, Layout, common_dtype
from ckpttools.containers import fields, jsons
from ckpttools.containers.nodes import decode
from ckpttools.containers.pickles import Object
from ckpttools.containers.safetensors import read_safetensors
from ckpttools.containers.torch_file import TorchFile, read_torch_file
from ckpttools.containers.torch_file.views import is_rebuilt
from ckpttools.errors import CkptError, escape
from ckpttools.formats.configs import ADAPTER, DIFFUSERS
from ckpttools.formats.format import Folder
from ckpttools.formats.hf.counters import FORMAT, KEYS, FreeText, aliases, from_metadata, integer
from ckpttools.formats.hf.names import ROLES, models_below, not_read, weight_files
from ckpttools.formats.notes import holds_for, of_other_kinds
from ckpttools.formats.ties import tied
from ckpttools.location import Location
from ckpttools.plan import SourceCheck
from ckpttools.stores.files import (
    entries,
    exists,
    is_file,
    is_folder,
    size_of,
    stat,
)
from ckpttools.stores.links import plain_name
from ckpttools.tensors import TensorRef
from ckpttools.training import Training
from ckpttools.tree import Value


def read(path: Location) -> Checkpoint:
    """Read a folder, or one .safetensors file. Headers only."""
    if is_folder(path):
        names = {entry.name for entry in entries(path)}
        index, single = weight_files(names)
        others = not_read(names)
        if single is not None:
            shards: dict[str, None] = {single: None}
        elif index is not None:
            shards = dict.fromkeys(_shards(path, index))
        else:
            raise CkptError(
                "no-weights",
                "no model weights in this folder",
                where=path,
                why="neither safetensors nor pytorch_model.bin, whole or with an index, is there",
            )
        folder = path
    else:
        index, shards, folder, others = None, {path.name: None}, path.parent, []
    tensors: dict[str, TensorRef] = {}
    checks: list[SourceCheck] = []
    metadata: dict[str, str] = {}
    files: list[FileRole] = []
    torch_files: list[TorchFile] = []
    weight_map = _weight_map(folder / index) if index is not None else None
    for name in shards:
        if not exists(folder / name):
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
    if is_folder(path):
        files += _other_files(path, {file.path.name for file in files})
    notes = ["safetensors files carry no checksums"] if not checks else []
    if others:
        model = index or next(iter(shards))
        notes.append(f"{model} is the model; other weights beside it are not read: {', '.join(others)}")
    extra = {name: value for file in torch_files for name, value in _other_kinds(file)}
    notes += of_other_kinds(list(extra))
    ties = aliases(metadata, tensors)
    own = (each for each in (ADAPTER, DIFFUSERS) if all(name.startswith(each) for name in shards))
    stem = next(own, None)
    tensors |= {alias: tensors[owner] for alias, owner in ties.items()}
    return Checkpoint(
        path=path,
        layout=Layout(
            format="hf" if is_folder(path) else "safetensors",
            dtype=common_dtype(tensors),
            stem=stem,
        ),
        tensors=tensors,
        shared=tied(tensors) | ties,
        excludes_frozen=stem == ADAPTER or holds_for(integer(metadata.get(EXCLUDES_FROZEN)), tensors),
        extra_state=extra,
        training=_training(path, metadata),
        files=tuple(files),
        checks=tuple(checks),
        notes=tuple(notes),
        below=models_below(Folder.of(path)) if is_folder(path) else (),
        template=(
            *torch_files,
            FreeText(tuple(key for key in metadata if key not in (*KEYS, FORMAT, EXCLUDES_FROZEN, *ties))),
        ),
    )


def _shards(folder: Location, index: str) -> list[str]:
    weight_map = _weight_map(folder / index)
    return sorted({plain_name(shard, folder / index) for shard in weight_map.values()})


def _weight_map(path: Location) -> dict[str, str]:
    weight_map = jsons.read(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise jsons.damaged(path, "weight_map is missing or empty")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise jsons.damaged(path, "weight_map names something that is not a file")
    return weight_map


def _check_shard(path: Location, tensors: Mapping[str, TensorRef], weight_map: Mapping[str, str]) -> None:
    """Each tensor of a shard is one that the index says is there."""
    for name in tensors:
        if name not in weight_map:
            problem = f"holds '{escape(name)}', which the index does not name"
        elif weight_map[name] != path.name:
            problem = f"holds '{escape(name)}', which the index says is in {escape(weight_map[name])}"
        else:
            continue
        raise _mismatch(path, problem)


def _check_index(path: Location, tensors: Mapping[str, TensorRef]) -> None:
    missing = [name for name in _weight_map(path) if name not in tensors]
    if missing:
        raise _mismatch(
            path, f"names {len(missing)} tensors that no shard holds, first '{escape(missing[0])}'"
        )


def _mismatch(path: Location, problem: str) -> CkptError:
    return CkptError(
        "index-mismatch",
        f"{escape(path.name)} {problem}",
        where=path,
        why="the shards and the index come from different saves",
        hint="copy the whole folder again from where it was saved",
    )


def _missing(path: Location) -> CkptError:
    return CkptError(
        "shard-missing",
        f"the shard {escape(path.name)} is missing",
        where=path.parent,
        why="the index names it: the tensors in it cannot be restored",
        hint="copy it from where the folder was saved",
    )


def _read_shard(
    path: Location, checks: list[SourceCheck], metadata: dict[str, str], torch_files: list[TorchFile]
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


def _other_kinds(file: TorchFile) -> Iterator[tuple[str, Value]]:
    """Tensors of a torch file that are not read."""
    root = fields.mapping(file.path, file.value, "the file's value")
    for name, node in root.named():
        if is_rebuilt(node) and isinstance(node, Object) and file.view(node) is None:
            yield name, decode(file, node)


def _other_files(folder: Location, known: set[str]) -> list[FileRole]:
    return [
        FileRole(
            path=folder / entry.name,
            nbytes=stat(folder / entry.name).size,
            role=ROLES.get(entry.name, "not part of the weights"),
        )
        for entry in entries(folder)
        if is_file(entry) and entry.name not in known
    ]


def _training(path: Location, metadata: Mapping[str, str]) -> Training:
    """What trainer_state.json says, or the weights' own `__metadata__`, where `ckpt extract` notes it."""
    state = path / "trainer_state.json"
    if not is_folder(path) or not is_file(state):
        return from_metadata(metadata)
    values = jsons.read(state, allow_nan=True)  # a loss may be NaN, and Python writes it so
    step, epoch = values.get("global_step"), values.get("epoch")
    return Training(
        step=step if type(step) is int else None,
        epoch=epoch if type(epoch) in (int, float) else None,  # type: ignore[arg-type]
    )
