"""`.metadata`: which tensors and objects there are, and where their items lie; decoded and written.

A pickle of `torch.distributed.checkpoint.metadata.Metadata`, an object with the fields

    state_dict_metadata   key -> TensorStorageMetadata(properties, size, chunks) or BytesStorageMetadata()
    planner_data          key -> the path that the key was joined from: ('optimizer', 'param_groups', 0, 'lr')
    storage_data          MetadataIndex(fqn, offset, index) -> _StorageInfo(relative_path, offset, length,
                          transform_descriptors); the offset is None for objects, a chunk's place for tensors
    storage_meta, version

It has no checksums, and its order means nothing: a chunk lies where its offsets say. `index` is a hint only.
Fields that older versions of torch lack are None. Source: torch/distributed/checkpoint/metadata.py and
filesystem.py of torch 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from msgspec import Struct

from ckpttools.containers import fields
from ckpttools.containers.pickles import Dict, Global, Node, Object, Reject, dumps, loads
from ckpttools.containers.pickles.judge import Judgement, judge
from ckpttools.containers.torch_file import size, size_node
from ckpttools.errors import CkptError, escape
from ckpttools.formats.dcp.names import NAME
from ckpttools.location import Location
from ckpttools.stores.files import opened
from ckpttools.stores.links import plain_name
from ckpttools.tensors import DTYPES, DType
from ckpttools.tree import MAX_DEPTH
from ckpttools.tree import Path as Keys

MAX_NBYTES = 256 << 20
LIMITS = 4  # torch memoizes 26 objects for each tensor: a state of 50,000 parameters has 5 million
VERSION = "1.0.0"
MODULE = "torch.distributed.checkpoint.metadata"
# Megatron-Core 0.15 derives a class from Metadata, with one field more
DERIVED = ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")


class Item(Struct, frozen=True):
    """A torch file within the data file `file`, and how it was compressed, if it was."""

    file: str
    start: int
    nbytes: int
    transforms: tuple[str, ...] = ()


class Piece(Struct, frozen=True):
    """A box of a tensor, and the item that holds it; None where no entry says where."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    item: Item | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Tensor(Struct, frozen=True):
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Metadata(Struct, frozen=True, kw_only=True):
    """Decoded: nothing of the pickle is kept but `judgements`, what loading it would do.

    `objects` are the values that are no tensors; the item is None where no entry says where it lies.
    `paths` is None where the file has none: then a key cannot be taken apart for certain.
    """

    tensors: Mapping[str, Tensor]
    objects: Mapping[str, Item | None]
    paths: Mapping[str, Keys] | None
    stray: tuple[Item, ...] = ()  # items that belong to nothing
    nbytes: int = 0
    judgements: tuple[Judgement, ...] = ()

    @property
    def keys(self) -> Iterator[str]:
        """All keys, in the order of the saved state where it is known."""
        ordered = self.paths or {}
        yield from (key for key in ordered if key in self.tensors or key in self.objects)
        yield from (key for some in (self.tensors, self.objects) for key in some if key not in ordered)

    @property
    def items(self) -> Iterator[tuple[str, Item]]:
        """Every item with the key that it belongs to, also empty pieces and stray ones (key "")."""
        for key, tensor in self.tensors.items():
            yield from ((key, piece.item) for piece in tensor.pieces if piece.item is not None)
        yield from ((key, item) for key, item in self.objects.items() if item is not None)
        yield from (("", item) for item in self.stray)


def read_metadata(folder: Location) -> Metadata:
    """Raises CkptError for a file that is missing, damaged or not of torch's making."""
    path = folder / NAME
    with opened(path) as file:
        if file.size > MAX_NBYTES:
            raise fields.bad_field(path, NAME, f"has {file.size} bytes, over the limit of {MAX_NBYTES}")
        raw = file.head(file.size)
    try:
        pickle = loads(raw, limits=LIMITS)
        return _Decoder(path, len(raw), judge(pickle)).metadata(pickle.value)
    except Reject as error:
        error.where = error.where or str(path)
        raise


class _Decoder:
    def __init__(self, path: Location, nbytes: int, judgements: tuple[Judgement, ...]) -> None:
        self.path, self.nbytes, self.judgements = path, nbytes, judgements
        self.left = 0  # pieces that a file of so many entries may still have: lists may share their chunks

    def metadata(self, node: Node) -> Metadata:
        state = self.state(node, "Metadata", "the metadata")
        entries = self.entries(state.get("storage_data"))
        self.left = 2 * sum(map(len, entries.values())) + 1_000_000
        tensors: dict[str, Tensor] = {}
        objects: dict[str, Item | None] = {}
        for key, value in self.named(state.get("state_dict_metadata"), "state_dict_metadata"):
            mine = entries.pop(key, {})
            if isinstance(value, Object) and value.is_a(MODULE, "BytesStorageMetadata"):
                objects[key] = mine.pop(None, None)
            else:
                tensors[key] = self.tensor(key, self.state(value, "TensorStorageMetadata", key), mine)
            if mine:
                entries[key] = mine
        return Metadata(
            tensors=tensors,
            objects=objects,
            paths=self.paths(state.get("planner_data")),
            stray=tuple(item for rest in entries.values() for item in rest.values()),
            nbytes=self.nbytes,
            judgements=self.judgements,
        )

    def state(self, node: Node, name: str, what: str) -> fields.Mapping:
        """The fields of one of torch's dataclasses."""
        classes = [(MODULE, name), *([DERIVED] if name == "Metadata" else [])]
        if isinstance(node, Object) and node.has_state and any(node.is_a(*each) for each in classes):
            return fields.mapping(self.path, node.state, what)
        raise fields.bad_field(self.path, what, f"is no {name}")

    def named(self, node: Node, what: str) -> Iterator[tuple[str, Node]]:
        for key, value in fields.mapping(self.path, node, what).pairs:
            if not isinstance(key, str):
                raise fields.bad_field(self.path, what, "has a key that is no text")
            yield key, value

    def entries(self, node: Node) -> dict[str, dict[tuple[int, ...] | None, Item]]:
        """Where things lie: by key, then by the place in the tensor (None for an object)."""
        out: dict[str, dict[tuple[int, ...] | None, Item]] = {}
        for index, value in fields.mapping(self.path, node, "storage_data").pairs:
            where = self.state(index, "MetadataIndex", "an index of storage_data")
            key = fields.text(self.path, where.get("fqn"), "MetadataIndex.fqn")
            offset = where.get("offset")
            at = None if offset is None else size(offset)
            out.setdefault(key, {})[at] = self.item(key, value)
        return out

    def item(self, key: str, node: Node) -> Item:
        known = isinstance(node, Object) and node.has_state
        if not known or not node.is_a("torch.distributed.checkpoint.filesystem", "_StorageInfo"):  # type: ignore[attr-defined]
            raise fields.bad_field(self.path, f"storage_data[{key}]", "is no _StorageInfo")
        state = fields.mapping(self.path, node.state, key)  # type: ignore[attr-defined]
        name = plain_name(fields.text(self.path, state.get("relative_path"), "relative_path"), self.path)
        start, nbytes = fields.integer(state.get("offset")), fields.integer(state.get("length"))
        if start is None or nbytes is None or not 0 <= start < 2**63 or not 0 < nbytes < 2**63:
            raise fields.bad_field(self.path, f"storage_data[{key}]", "has no plausible offset and length")
        transforms = state.get("transform_descriptors") or []
        named = fields.sequence(self.path, transforms, "transform_descriptors")
        return Item(name, start, nbytes, tuple(escape(each, 60) for each in named))

    def tensor(self, key: str, state: fields.Mapping, items: dict[tuple[int, ...] | None, Item]) -> Tensor:
        shape = size(state.get("size"))
        if len(shape) > 64 or math.prod(shape) >= 2**63:
            raise fields.bad_field(self.path, key, "has an impossible shape")
        chunks = fields.sequence(self.path, state.get("chunks"), f"{key}: chunks")
        self.left -= len(chunks)
        if self.left < 0:
            raise fields.bad_field(self.path, key, "has more chunks than there are entries in storage_data")
        pieces: dict[tuple[tuple[int, ...], tuple[int, ...]], Piece] = {}
        for chunk in chunks:
            places = self.state(chunk, "ChunkStorageMetadata", f"{key}: a chunk")
            offsets, sizes = size(places.get("offsets")), size(places.get("sizes"))
            outside = any(a + n > m for a, n, m in zip(offsets, sizes, shape, strict=False))
            if len(offsets) != len(shape) or len(sizes) != len(shape) or outside:
                raise fields.bad_field(self.path, key, f"has a chunk outside of its shape {list(shape)}")
            # empty chunks of several ranks are one and the same
            pieces.setdefault((offsets, sizes), Piece(offsets, sizes, items.get(offsets)))
        for piece in pieces.values():
            items.pop(piece.offsets, None)
        return Tensor(self.dtype(key, state.get("properties")), shape, tuple(pieces.values()))

    def dtype(self, key: str, node: Node) -> DType:
        # dtype, layout, requires_grad, memory format, pin_memory
        state = node.state if isinstance(node, Object) and node.has_state else None
        first = state[0] if isinstance(state, tuple) and state else None
        if isinstance(first, Global) and first.module == "torch" and first.name in DTYPES:
            return DTYPES[first.name]
        shown = escape(first) if isinstance(first, Global) else "?"
        raise fields.bad_field(self.path, key, f"has the unknown element type {shown}")

    def paths(self, node: Node) -> dict[str, Keys] | None:
        if fields.as_mapping(node) is None:
            return None
        out: dict[str, Keys] = {}
        for key, value in self.named(node, "planner_data"):
            path = value if isinstance(value, tuple) else ()
            plain = all(isinstance(step, str) or fields.integer(step) is not None for step in path)
            if not plain or not 0 < len(path) <= MAX_DEPTH or ".".join(map(str, path)) != key:
                raise fields.bad_field(self.path, f"planner_data[{key}]", "is not the path of its key")
            out[key] = tuple(step for step in path if isinstance(step, str | int))
        return out


# --- writing ------------------------------------------------------------------------------------------


def write_metadata(metadata: Metadata) -> bytes:
    """The pickle. Parts that occur often are written once: a state of 50,000 small tensors has few shapes."""
    writer = _Encoder()
    described: list[tuple[Node, Node]] = []
    stored: list[tuple[Node, Node]] = []
    for key in metadata.keys:
        if key in metadata.objects:
            described.append((key, writer.nothing))
            stored.append((writer.index(key, None, None), writer.info(metadata.objects[key])))
            continue
        tensor = metadata.tensors[key]
        described.append((key, writer.tensor(tensor)))
        for i, piece in enumerate(tensor.pieces):
            stored.append((writer.index(key, piece.offsets, i), writer.info(piece.item)))
    made = {
        "state_dict_metadata": Dict.of(described),
        "planner_data": Dict.of((metadata.paths or {}).items()),
        "storage_data": Dict.of(stored),
        "storage_meta": None,  # it would hold a path of the machine that saves; torch makes its own
        "version": VERSION,
    }
    return dumps(_made("Metadata", made))


def _made(name: str, state: Mapping[str, Node] | tuple[Node, ...] | None, module: str = MODULE) -> Object:
    node = Object("newobj", Global(module, name), ())
    if state is not None:
        node.state = Dict.of(state.items()) if isinstance(state, Mapping) else state
    return node


class _Encoder:
    def __init__(self) -> None:
        self.nothing = _made("BytesStorageMetadata", None)
        layout = Object("reduce", Global("torch.serialization", "_get_layout"), ("torch.strided",))
        memory = Object("reduce", Global(MODULE, "_MEM_FORMAT_ENCODING"), (0,))  # contiguous
        self.rest = (layout, False, memory, False)
        self.known: dict[object, Node] = {}

    def tensor(self, tensor: Tensor) -> Node:
        places = tuple((piece.offsets, piece.shape) for piece in tensor.pieces)
        key = ("tensor", tensor.dtype.name, tensor.shape, places)
        if key not in self.known:
            chunks: list[Node] = [
                _made("ChunkStorageMetadata", {"offsets": self.size(at), "sizes": self.size(shape)})
                for at, shape in places
            ]
            state = {
                "properties": self.properties(tensor.dtype),
                "size": self.size(tensor.shape),
                "chunks": chunks,
            }
            self.known[key] = _made("TensorStorageMetadata", state)
        return self.known[key]

    def properties(self, dtype: DType) -> Node:
        if dtype.name not in self.known:
            state = (Global("torch", dtype.name), *self.rest)
            self.known[dtype.name] = _made("TensorProperties", state)
        return self.known[dtype.name]

    def size(self, shape: tuple[int, ...]) -> Node:
        return self.known.setdefault(shape, size_node(shape))

    def index(self, key: str, offsets: tuple[int, ...] | None, index: int | None) -> Node:
        state = {"fqn": key, "index": index}
        if offsets is not None:
            state["offset"] = self.size(offsets)  # type: ignore[assignment]
        return _made("MetadataIndex", state)

    def info(self, item: Item | None) -> Node:
        if item is None:
            raise CkptError("internal", "an item without a place is not written")
        if item not in self.known:
            state = {"relative_path": item.file, "offset": item.start, "length": item.nbytes}
            self.known[item] = _made("_StorageInfo", state, "torch.distributed.checkpoint.filesystem")
        return self.known[item]
