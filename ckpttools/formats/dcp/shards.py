"""The model alone as torch's HuggingFaceStorageWriter shards it: safetensors files, and no .metadata.

    shard-RRRRR-model-IIIII-of-NNNNN.safetensors    of rank R, from 1; in sharded/ where it consolidates too
    "DCP_SHARDING_INFO" in its metadata             JSON: {name: {"saved_offsets": [...]}}, the part's place

The shape of the whole tensor is in no file: it is what the parts reach to. A missing file of a rank shows by
the numbers and by the holes that it leaves; the last one does not.
Source: torch/distributed/checkpoint/hf_storage.py of torch 2.13.
"""

from __future__ import annotations

from collections import Counter

from ckpttools.checkpoint import Checkpoint, FileRole, Layout, common_dtype
from ckpttools.containers import jsons
from ckpttools.containers.safetensors import SafetensorsFile, read_safetensors
from ckpttools.errors import CkptError, escape
from ckpttools.formats.cutting import equal
from ckpttools.formats.dcp.items import Data
from ckpttools.formats.dcp.metadata import Item, Piece, Tensor
from ckpttools.formats.dcp.names import SHARD
from ckpttools.formats.dcp.pieces import assembled, check_pieces
from ckpttools.location import Location
from ckpttools.stores.files import entries
from ckpttools.tensors import ByteRange, TensorRef

OFFSETS = "DCP_SHARDING_INFO"
VARIANT = "safetensors"


def read_shards(folder: Location) -> Checkpoint:
    """Read the headers of all shards. Raises CkptError where one is missing or parts do not fill a tensor."""
    names = [entry.name for entry in entries(folder) if SHARD.fullmatch(entry.name)]
    _complete(folder, names)
    files = [read_safetensors(folder / name) for name in names]
    held_by = Counter(name for file in files for name in file.tensors)
    pieces: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Piece, TensorRef]]] = {}
    for file in files:
        places = _offsets(file)
        for name, ref in file.tensors.items():
            if name not in places and held_by[name] > 1:
                raise _bad(
                    file.path, f"{OFFSETS} has no place for '{escape(name)}', which other files hold too"
                )
            at = places.get(name, (0,) * len(ref.shape))
            if len(at) != len(ref.shape):
                raise _bad(file.path, f"the place of '{escape(name)}' does not fit its shape")
            start = ref.chunks[0].start if ref.chunks and isinstance(ref.chunks[0], ByteRange) else 0
            item = Item(file.path.name, start, ref.nbytes)
            _, first = pieces.setdefault(name, {}).setdefault(
                (at, ref.shape), (Piece(at, ref.shape, item), ref)
            )
            if not equal(first, ref):
                raise _bad(
                    file.path, f"another file holds the same part of '{escape(name)}' with other values"
                )
    tensors: dict[str, TensorRef] = {}
    shards = 1
    for name, held in pieces.items():
        parts = tuple(piece for piece, _ in held.values())
        refs = [ref for _, ref in held.values()]
        if len({(ref.dtype.name, len(ref.shape)) for ref in refs}) > 1:
            raise _bad(folder, f"the parts of '{escape(name)}' differ in type or dimensions")
        shape = tuple(max(p.offsets[d] + p.shape[d] for p in parts) for d in range(len(refs[0].shape)))
        tensor = Tensor(refs[0].dtype, shape, parts)
        try:
            check_pieces(name, tensor)
        except CkptError as error:
            error.where = error.where or str(folder)
            raise
        data = {piece.item: Data(ref.chunks[0], None) for piece, ref in held.values() if ref.chunks}  # type: ignore[arg-type]
        tensors[name] = assembled(name, tensor, {item: d for item, d in data.items() if item is not None})
        shards = max(shards, sum(piece.numel > 0 for piece in parts))
    return Checkpoint(
        path=folder,
        layout=Layout(
            format="dcp",
            dp_degree=shards,
            dtype=common_dtype(tensors),
            writer="torch.distributed.checkpoint.HuggingFaceStorageWriter",
            variant=VARIANT,
        ),
        tensors=tensors,
        files=tuple(
            FileRole(path=file.path, nbytes=file.size, role=f"{len(file.tensors)} parts of tensors")
            for file in files
        ),
        notes=("the shapes are what the parts reach to: a missing last shard would not show",),
    )


def _complete(folder: Location, names: list[str]) -> None:
    """The ranks are numbered from 1, and each has all of the files that its names count."""
    seen: dict[int, tuple[set[int], int]] = {}
    for name in names:
        rank, i, n = map(int, SHARD.fullmatch(name).groups())  # type: ignore[union-attr]
        seen.setdefault(rank, (set(), n))[0].add(i)
    missing = [f"of rank {rank}" for rank in range(1, max(seen, default=0)) if rank not in seen]
    missing += [
        f"{min(set(range(1, n + 1)) - have)} of rank {r}" for r, (have, n) in seen.items() if len(have) < n
    ]
    if missing:
        raise CkptError(
            "shard-missing",
            f"a shard is missing: {missing[0]}",
            where=folder,
            why="without it parts of tensors cannot be restored",
            hint="copy the file from the node that wrote it",
        )


def _offsets(file: SafetensorsFile) -> dict[str, tuple[int, ...]]:
    text = file.metadata.get(OFFSETS)
    if text is None:
        raise _bad(file.path, f"its metadata has no {OFFSETS}")
    out: dict[str, tuple[int, ...]] = {}
    for name, entry in jsons.parse(file.path, text.encode("utf-8", "replace"), OFFSETS).items():
        at = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not isinstance(at, list) or not all(type(n) is int and 0 <= n < 2**62 for n in at):
            raise _bad(file.path, f"{OFFSETS} has no place for '{escape(name)}'")
        out[name] = tuple(at)
    return out


def _bad(path: Location, problem: str) -> CkptError:
    return CkptError(
        "safetensors-header",
        problem,
        where=path,
        why="it says where each part belongs: no tensor can be put together without it",
        hint="copy the file again from where it was saved",
    )
