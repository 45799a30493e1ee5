"""Faults of distributed checkpoints: which part lies where, and the archives that lie one after another."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from .core import DCP, Copy, Expectation, bases, fault, names_file, only_by_manifest, pick

LEVEL = "dcp"


def parts(copy: Copy) -> list[Path]:
    """The folders with a `.metadata`."""
    return [path.parent for path in copy.files if path.name == ".metadata"]


@contextmanager
def metadata_of(folder: Path) -> Iterator[Any]:
    """torch's own Metadata of a folder, written back afterwards."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301  of this test's own making
    yield metadata
    path.write_bytes(pickle.dumps(metadata, protocol=4))


def _pieces(metadata: Any) -> list[tuple[str, Any, Any]]:
    """Every part that holds elements: its key, its chunk, where it lies."""
    return [
        (key, chunk, metadata.storage_data[MetadataIndex(key, chunk.offsets)])
        for key, tensor in metadata.state_dict_metadata.items()
        for chunk in getattr(tensor, "chunks", ())
        if all(chunk.sizes)
    ]


def _rows(metadata: Any) -> list[tuple[str, Any, Any]]:
    """Those of more than one element, and of at least one dimension."""
    return [p for p in _pieces(metadata) if len(p[1].sizes) and torch.Size(p[1].sizes).numel() > 1]


def _objects(metadata: Any) -> list[str]:
    return [key for key, held in metadata.state_dict_metadata.items() if not hasattr(held, "chunks")]


Change = Callable[[Any, Random, Path], "str | None"]


def _in_metadata(name: str, change: Change, *, key: bool = True) -> None:
    """A fault of `.metadata`; `change` returns the key that must be named, None where it does not apply.
    Without `key` the pickle itself is what no torch writes.
    """

    def damage(copy: Copy, rng: Random) -> Expectation | None:
        folder = rng.choice(parts(copy))
        with metadata_of(folder) as metadata:
            said = change(metadata, rng, folder)
        if said is None:
            return None
        beside = [p for p in folder.iterdir() if p.is_file()]
        return names_file(*beside, parts=(said,) if said and key else ())

    damage.__name__ = f"dcp_{name}"
    fault(LEVEL, DCP)(damage)


def _entry_lost(metadata: Any, rng: Random, folder: Path) -> str | None:
    key, chunk, _ = rng.choice(_pieces(metadata))
    del metadata.storage_data[MetadataIndex(key, chunk.offsets)]
    return key


def _value_lost(metadata: Any, rng: Random, folder: Path) -> str | None:
    key = pick(rng, _objects(metadata))
    if key is not None:
        del metadata.storage_data[MetadataIndex(key)]
    return key


def _hole(metadata: Any, rng: Random, folder: Path) -> str | None:
    key, chunk, _ = rng.choice(_pieces(metadata))
    metadata.state_dict_metadata[key].chunks.remove(chunk)
    del metadata.storage_data[MetadataIndex(key, chunk.offsets)]
    return key


def _moved(shift: Callable[[Any, Any], int]) -> Change:
    def change(metadata: Any, rng: Random, folder: Path) -> str | None:
        found = pick(rng, _rows(metadata))
        if found is None:
            return None
        key, chunk, info = found
        del metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        first = chunk.offsets[0] + shift(chunk, metadata.state_dict_metadata[key])
        chunk.offsets = torch.Size([first, *chunk.offsets[1:]])
        metadata.storage_data[MetadataIndex(key, chunk.offsets)] = info
        return key

    return change


def _offset(shift: int) -> Change:
    def change(metadata: Any, rng: Random, folder: Path) -> str | None:
        _, _, info = rng.choice(_pieces(metadata))
        info.offset += shift
        return ""

    return change


def _length(shift: int) -> Change:
    def change(metadata: Any, rng: Random, folder: Path) -> str | None:
        _, _, info = rng.choice(_pieces(metadata))
        info.length += shift
        return ""

    return change


def _dtype(metadata: Any, rng: Random, folder: Path) -> str | None:
    key, _, _ = rng.choice(_pieces(metadata))
    properties = metadata.state_dict_metadata[key].properties
    others = {torch.float32, torch.bfloat16, torch.int64} - {properties.dtype}
    properties.dtype = rng.choice(sorted(others, key=str))
    return key


def _shape(metadata: Any, rng: Random, folder: Path) -> str | None:
    found = pick(rng, _rows(metadata))
    if found is None:
        return None
    tensor = metadata.state_dict_metadata[found[0]]
    tensor.size = torch.Size([tensor.size[0] + 1, *tensor.size[1:]])
    return found[0]


def _items_exchanged(metadata: Any, rng: Random, folder: Path) -> str | None:
    """Two parts of other shapes in each other's place."""
    found = _pieces(metadata)
    pairs = [(a, b) for a in found for b in found if a[0] < b[0] and a[1].sizes != b[1].sizes]
    pair = pick(rng, pairs)
    if pair is None:
        return None
    one, two = pair[0][2], pair[1][2]
    one.__dict__, two.__dict__ = dict(two.__dict__), dict(one.__dict__)
    return ""


def _path(text: str) -> Change:
    def change(metadata: Any, rng: Random, folder: Path) -> str | None:
        _, _, info = rng.choice(_pieces(metadata))
        info.relative_path = text.format(info.relative_path, folder.name)
        return ""

    return change


def _planner(metadata: Any, rng: Random, folder: Path) -> str | None:
    key = rng.choice(sorted(metadata.planner_data))
    path = metadata.planner_data[key]
    metadata.planner_data[key] = (*path[:-1], "else")
    return key


def _key_renamed(metadata: Any, rng: Random, folder: Path) -> str | None:
    """A tensor under another name than its parts."""
    key, _, _ = rng.choice(_pieces(metadata))
    metadata.state_dict_metadata[f"{key}.old"] = metadata.state_dict_metadata.pop(key)
    return key


_in_metadata("entry_lost", _entry_lost)
_in_metadata("value_lost", _value_lost)
_in_metadata("hole", _hole)
_in_metadata("overlap", _moved(lambda chunk, tensor: -1 if chunk.offsets[0] else 1))
_in_metadata("outside", _moved(lambda chunk, tensor: tensor.size[0] + 5))
_in_metadata("negative", _moved(lambda chunk, tensor: -tensor.size[0] - 5), key=False)
_in_metadata("entry_shifted", _offset(64))
_in_metadata("entry_behind_the_end", _offset(1 << 40))
_in_metadata("entry_before_the_start", _offset(-(1 << 40)))
_in_metadata("entry_longer", _length(64))
_in_metadata("entry_shorter", _length(-64))
_in_metadata("entry_of_enormous_length", _length(1 << 60))
_in_metadata("other_dtype", _dtype)
_in_metadata("other_shape", _shape)
_in_metadata("items_exchanged", _items_exchanged)
_in_metadata("path_missing", _path("__77_0.distcp"))
_in_metadata("path_climbs", _path("../{1}/{0}"))
_in_metadata("path_absolute", _path("/etc/passwd"))
_in_metadata("planner_path_changed", _planner)
_in_metadata("key_renamed", _key_renamed)


@fault(LEVEL, DCP)
def dcp_no_metadata(copy: Copy, rng: Random) -> Expectation:
    folder = rng.choice(parts(copy))
    (folder / ".metadata").unlink()
    return Expectation(parts=(".metadata",))


@fault(LEVEL, DCP)
def dcp_metadata_of_another_save(copy: Copy, rng: Random) -> Expectation | None:
    folder = rng.choice(parts(copy))
    found = [p for base in bases() if base.kind == DCP for p in base.path.rglob(".metadata")]
    theirs = pick(rng, (p for p in found if p.read_bytes() != (folder / ".metadata").read_bytes()))
    if theirs is None or _same_places(theirs, folder / ".metadata"):
        return None
    shutil.copyfile(theirs, folder / ".metadata")
    return names_file(*folder.iterdir())


def _same_places(one: Path, two: Path) -> bool:
    a, b = (pickle.loads(p.read_bytes()).storage_data for p in (one, two))  # noqa: S301
    return bool(a == b)


@fault(LEVEL, DCP)
def dcp_left_over(copy: Copy, rng: Random) -> Expectation:
    """A data file of a save with more ranks."""
    folder = rng.choice(parts(copy))
    stale = folder / f"__{rng.randrange(10, 99)}_0.distcp"
    shutil.copyfile(rng.choice(sorted(folder.glob("*.distcp"))), stale)
    return names_file(stale)


@fault(LEVEL, DCP)
def dcp_files_swapped(copy: Copy, rng: Random) -> Expectation | None:
    files = sorted(rng.choice(parts(copy)).glob("*.distcp"))
    if len(files) < 2:
        return None
    one, two = rng.sample(files, 2)
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    return names_file(one, two)


@fault(LEVEL, DCP)
def dcp_bit_flipped_in_an_item(copy: Copy, rng: Random) -> Expectation:
    """Anywhere: in a header, a pickle, a tensor, between them."""
    path = rng.choice(copy.items)
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return names_file(path)


def _items(folder: Path, rng: Random) -> tuple[Any, str] | None:
    with metadata_of(folder) as metadata:
        found = pick(rng, [p for p in _rows(metadata) if "scheduler" not in p[0]])
    return (found[2], found[0]) if found else None


def _saved_again(name: str, change: Callable[[Any], Any], *, shown: bool) -> None:
    """One item is another tensor of the same shape, saved by torch."""

    def damage(copy: Copy, rng: Random) -> Expectation | None:
        folder = rng.choice(parts(copy))
        found = _items(folder, rng)
        if found is None:
            return None
        info, key = found
        path = folder / info.relative_path
        raw = bytearray(path.read_bytes())
        place = slice(info.offset, info.offset + info.length)
        tensor = torch.load(io.BytesIO(raw[place]), weights_only=True)
        if not tensor.is_floating_point():
            return None
        buffer = io.BytesIO()
        torch.save(change(tensor), buffer)
        if len(buffer.getvalue()) != info.length:
            return None
        raw[place] = buffer.getvalue()
        path.write_bytes(raw)
        tensor_name = key.split(".state.")[-1].rpartition("model.")[2]
        of, _, kind = tensor_name.rpartition(".")
        named = (tensor_name, f"{of} ({kind})", key)
        return names_file(path, parts=named) if shown else only_by_manifest(path)

    damage.__name__ = f"dcp_{name}"
    fault(LEVEL, DCP)(damage)


_saved_again("item_nan", lambda t: torch.full_like(t, float("nan")), shown=True)
_saved_again("item_edited", lambda t: t * 1.25 + 1e-3, shown=False)
