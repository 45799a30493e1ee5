"""Files of torch.save to be written: nodes, storages and their bytes as segments of an output file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ckpttools.containers.archive import archive_segments
from ckpttools.containers.pickles import Global, Node, Object, dumps, walk
from ckpttools.containers.torch_file.legacy import legacy_segments
from ckpttools.containers.torch_file.storages import Storage
from ckpttools.plan import Literal, OutputFile, Segment
from ckpttools.tensors import DTYPES, UINT8, DType, TensorRef, contiguous_strides

_HOOKS = Global("collections", "OrderedDict")
_REBUILD, _REBUILD_UNTYPED = (Global("torch._utils", f"_rebuild_tensor_v{i}") for i in (2, 3))
_KINDS = {each: Global("torch", each.storage) for each in DTYPES.values() if each.storage is not None}
_UNTYPED = Global("torch.storage", "UntypedStorage")


def tensor_node(ref: TensorRef, storage: Storage | None = None) -> Object:
    """A node for a contiguous tensor: a view of `storage` from its start, or of one of its own."""
    if storage is None:
        storage = new_storage(ref.dtype, ref.numel, ref.chunks)
    strides = contiguous_strides(ref.shape)
    args = (storage, 0, ref.shape, strides, False, Object("reduce", _HOOKS, ()))
    if ref.dtype.storage is None:
        return Object("reduce", _REBUILD_UNTYPED, (*args, Global("torch", ref.dtype.name)))
    return Object("reduce", _REBUILD, args)


def new_storage(dtype: DType, numel: int, segments: Iterable[Segment]) -> Storage:
    """A storage to be written: `numel` elements of `dtype`, their bytes in `segments`."""
    if dtype.storage is None:
        return Storage(_UNTYPED, UINT8, numel * dtype.itemsize, tuple(segments))
    return Storage(_KINDS[dtype], dtype, numel, tuple(segments))


def size_node(shape: Sequence[int]) -> Object:
    return Object("reduce", Global("torch", "Size"), (tuple(shape),))


def write_torch_file(path: str, value: Node, *, legacy: bool = False) -> OutputFile:
    """The torch zip at `path` (relative) that holds `value`; its storages are copied as they are read.

    The archive's root is the file's stem, as torch.save names it. `legacy` writes torch's older
    serialization instead.
    """
    keys: dict[int, str] = {}
    storages: list[Storage] = []

    def persistent_id(node: Node) -> Node:
        if not isinstance(node, Storage):
            return None
        if id(node) not in keys:
            keys[id(node)] = str(len(storages))
            storages.append(node)
        pid = ("storage", node.kind, keys[id(node)], node.location, node.numel)
        return (*pid, None) if legacy else pid  # None: not a view of another storage

    pickle = dumps(value, persistent_id)
    if legacy:
        named = dict(zip(keys.values(), storages, strict=True))
        return OutputFile(path=path, segments=tuple(legacy_segments(pickle, named)))
    records: list[tuple[str, Sequence[Segment]]] = [
        ("data.pkl", [Literal(pickle)]),
        ("byteorder", [Literal(b"little")]),
        *((f"data/{key}", storage.chunks) for key, storage in zip(keys.values(), storages, strict=True)),
        ("version", [Literal(b"3\n")]),
    ]
    root = Path(path).name.rpartition(".")[0] or Path(path).name or "archive"
    return OutputFile(path=path, segments=archive_segments(root, records))


def stored(value: Node) -> Iterator[Storage]:
    """Every storage that a tree refers to, once."""
    return (node for node in walk(value) if isinstance(node, Storage))
