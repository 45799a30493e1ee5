"""Files of torch.save, both serializations: their values as nodes, their tensors as byte ranges.

Zip (torch >= 1.6): records `data.pkl` (the pickle), `data/<key>` (one storage each), `version`,
`byteorder` and others. Legacy: five parts one after another in a plain file: pickles of a magic number,
the protocol 1001, system information, the value, the storage keys; then per key an int64 element count
and the storage's data. Source: torch/serialization.py.

A storage is a persistent id `('storage', <class>, key, location, numel)`; a tensor is a call of
`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`, with offsets in elements.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpttools.containers.archive import Archive, archive_segments, damaged, is_zip, read_archive, read_record
from ckpttools.containers.pickles import (
    MAX_BYTES,
    Dict,
    Global,
    Node,
    Object,
    Pickle,
    Reject,
    dumps,
    loads,
    walk,
)
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.plan import Literal, OutputFile, Segment, SourceCheck
from ckpttools.stores.files import File, opened, truncated
from ckpttools.tensors import (
    BY_STORAGE,
    DTYPES,
    UINT8,
    ByteRange,
    Chunk,
    DType,
    Strided,
    TensorRef,
    contiguous_strides,
    is_contiguous,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_HEAD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
LEGACY_PROTOCOL = 1001
MAX_DIMS = 64
MAX_DEFLATED = 16 << 20  # of all records but the pickle, after decompression
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
# storages of quantized tensors, which are carried as data, by the type of their bytes
_QUANTIZED = {
    "QInt8Storage": DTYPES["int8"],
    "QUInt8Storage": UINT8,
    "QInt32Storage": DTYPES["int32"],
    "QUInt4x2Storage": UINT8,
    "QUInt2x4Storage": UINT8,
}


class Storage:
    """One storage of a torch file. Tensors that share it are views of the same bytes.

    `kind` is the class named in the file, `numel` counts its elements (bytes if untyped). `chunks` hold the
    bytes: a range of the source file, or what a writer puts there.
    """

    __slots__ = ("chunks", "dtype", "kind", "location", "numel", "record")

    def __init__(
        self,
        kind: Global,
        dtype: DType,
        numel: int,
        chunks: tuple[Segment, ...],
        location: str = "cpu",
        record: str = "",
    ) -> None:
        self.kind, self.dtype, self.numel = kind, dtype, numel
        self.chunks, self.location, self.record = chunks, location, record

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A tensor of a torch file: a view of a storage, all in elements."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def ref(self) -> TensorRef:
        """The value as byte ranges; strided where the view is not contiguous."""
        numel = math.prod(self.shape)
        item = self.dtype.itemsize
        if numel == 0:
            return TensorRef(self.dtype, self.shape, ())
        (source,) = self.storage.chunks
        assert isinstance(source, ByteRange)
        start = source.start + self.offset * item
        chunk: Chunk
        if is_contiguous(self.shape, self.strides):
            chunk = ByteRange(source.path, start, numel * item)
        else:
            chunk = Strided(
                path=source.path,
                start=start,
                itemsize=item,
                shape=self.shape,
                strides=self.strides,
                first=0,
                numel=numel,
            )
        return TensorRef(self.dtype, self.shape, (chunk,))


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """A torch file, header read: `value` is the tree of nodes, with `Storage` nodes at its leaves."""

    path: Path
    size: int
    value: Node
    storages: dict[str, Storage]
    pickle: Pickle
    archive: Archive | None  # None for the legacy serialization
    _views: dict[int, View] = field(default_factory=dict, repr=False)

    @property
    def root(self) -> str | None:
        """The archive's root name: the stem of the file's name when it was saved."""
        return self.archive.root if self.archive else None

    @property
    def has_checksums(self) -> bool:
        return self.archive is not None and not self.archive.unchecked

    def checks(self) -> Iterator[SourceCheck]:
        """The checksum of every record that has one, as the archive states it.

        A deflated record's is one of its inflated bytes: it was looked at when the header was read.
        """
        if self.archive and self.has_checksums:
            for name, record in self.archive.records.items():
                if record.nbytes and not record.method and not self.archive.is_reserved(record):
                    yield SourceCheck(self.archive.range(record), record.crc32, f"record {escape(name)}")

    def view(self, node: Node) -> View | None:
        """The tensor that a node describes, or None where it is something else.

        Raises CkptError for a tensor that reaches outside its storage.
        """
        if not isinstance(node, Object):
            return None
        known = self._views.get(id(node))
        if known is None:
            known = _view(self.path, node)
            if known is not None:
                self._views[id(node)] = known
        return known


def read_torch_file(path: Path) -> TorchFile:
    """Read the header of a torch file; tensor data is not read.

    Raises CkptError where the file is damaged or is not one of torch's.
    """
    with opened(path) as file:
        head = file.head(len(LEGACY_HEAD))
        if is_zip(head):
            return _read_zip(file)
        if head == LEGACY_HEAD:
            return _read_legacy(file)
        if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise CkptError(
                "bare-pickle",
                "a plain pickle, not a file of torch.save",
                where=path,
                why="its values may be anything; no tensor can be read from it",
                hint="save it again with torch.save",
            )
    raise CkptError(
        "not-torch",
        f"not a file of torch.save (it starts with {head[:8]!r})",
        where=path,
        why="neither a zip archive nor torch's older serialization",
        hint="check that this is the right file, and that its download finished",
    )


def is_torch_file(path: Path) -> bool:
    """Whether the first bytes are those of a torch file, in either serialization."""
    with opened(path) as file:
        head = file.head(len(LEGACY_HEAD))
    return is_zip(head) or head == LEGACY_HEAD


# --- zip ----------------------------------------------------------------------------------------------


def _read_zip(file: File) -> TorchFile:
    archive = read_archive(file)
    records = archive.records
    if "data.pkl" not in records:
        kind = "a TorchScript archive" if "constants.pkl" in records else "some other zip file"
        raise CkptError("not-torch", f"the archive has no data.pkl: it is {kind}", where=file.path)
    if "byteorder" in records and read_record(file, records["byteorder"], 16) != b"little":
        raise CkptError("big-endian", "the tensors are stored big-endian", where=file.path)
    _check_deflated(file, archive)
    data = read_record(file, records["data.pkl"], MAX_BYTES)
    storages: dict[str, Storage] = {}

    def storage(pid: Node) -> Node:
        kind, dtype, key, location, numel = _storage_id(pid)
        if key not in storages:
            record = records.get(f"data/{key}")
            if record is None:
                raise damaged(file.path, f"the data of storage {key} is missing")
            if record.method:
                raise _compressed(file.path, f"storage {key}")
            if record.nbytes != numel * dtype.itemsize:
                raise damaged(
                    file.path,
                    f"storage {key} has {record.nbytes} bytes where {numel * dtype.itemsize} are declared",
                )
            chunks = (archive.range(record),) if record.nbytes else ()
            storages[key] = Storage(kind, dtype, numel, chunks, location, f"data/{key}")
        return _same(storages[key], kind, numel, key)

    pickle = _located(file.path, lambda: loads(data, persistent=storage))
    stray = [name for name in records if name.startswith("data/") and name[5:] not in storages]
    if stray:
        raise damaged(file.path, f"{len(stray)} storages belong to no tensor, the first {escape(stray[0])}")
    return TorchFile(
        path=file.path,
        size=file.size,
        value=pickle.value,
        storages=storages,
        pickle=pickle,
        archive=archive,
    )


def _check_deflated(file: File, archive: Archive) -> None:
    """Inflate the small records that another tool has compressed, which checks them."""
    deflated = {
        name: record
        for name, record in archive.records.items()
        if record.method and name != "data.pkl" and not name.startswith("data/")
    }
    if sum(record.size for record in deflated.values()) > MAX_DEFLATED:
        raise _compressed(file.path, f"{len(deflated)} records")
    for record in deflated.values():
        read_record(file, record, MAX_DEFLATED)


def _compressed(path: Path, what: str) -> Unsupported:
    return Unsupported(
        "storage-compressed",
        f"the data of {what} is compressed, which torch.save never does",
        where=path,
        why="another tool packed the archive anew; torch loads it (not with mmap), ckpt does not read it",
        hint="load it with torch where you trust it, and save it again with torch.save",
    )


def _storage_id(pid: Node) -> tuple[Global, DType, str, str, int]:
    """The parts of a storage's persistent id; element type uint8 for an untyped storage."""
    if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
        raise Reject("a persistent id is not a storage")
    _, kind, key, location, numel = pid[:5]
    if not (isinstance(kind, Global) and isinstance(key, str) and isinstance(location, str)):
        raise Reject("a storage's persistent id is malformed")
    if not _KEY.fullmatch(key) or len(location) > 64 or not location.isprintable():
        raise Reject("a storage has an impossible key or location")
    if isinstance(numel, bool) or not isinstance(numel, int) or not 0 <= numel < 2**63:
        raise Reject("a storage has an impossible size")
    if len(pid) == 6 and pid[5] is not None:
        raise Reject("a storage is a view of another one, which only torch before 0.4 wrote")
    return kind, _storage_dtype(kind), key, location, numel


def _storage_dtype(kind: Global) -> DType:
    if kind.module == "torch" and kind.name in BY_STORAGE:
        return BY_STORAGE[kind.name]
    if kind.module == "torch" and kind.name in _QUANTIZED:
        return _QUANTIZED[kind.name]
    if kind in (Global("torch.storage", "UntypedStorage"), Global("torch", "UntypedStorage")):
        return UINT8
    raise Reject(f"storages of class {escape(kind)} are not supported")


def _same(storage: Storage, kind: Global, numel: int, key: str) -> Storage:
    if storage.kind != kind or storage.numel != numel:
        raise Reject(f"storage {key} is declared twice, differently")
    return storage


def _located(path: Path, read: Callable[[], Pickle]) -> Pickle:
    try:
        return read()
    except Reject as error:
        error.where = error.where or str(path)
        raise


# --- legacy -------------------------------------------------------------------------------------------


def _read_legacy(file: File) -> TorchFile:
    # the pickles lie before the data, and their length is written nowhere: read ahead until they fit
    ahead = min(file.size, 1 << 20)
    while True:
        try:
            return _legacy(file, file.read(0, ahead), whole=ahead == file.size)
        except _NeedMore as need:
            if ahead >= MAX_BYTES:
                raise need.error from None
            ahead = min(file.size, ahead * 8, MAX_BYTES)


class _NeedMore(Exception):
    def __init__(self, error: Reject) -> None:
        self.error = error


def _legacy(file: File, data: bytes, *, whole: bool) -> TorchFile:
    storages: dict[str, Storage] = {}

    def storage(pid: Node) -> Node:
        kind, dtype, key, location, numel = _storage_id(pid)
        if key not in storages:
            storages[key] = Storage(kind, dtype, numel, (), location, f"storage {key}")
        return _same(storages[key], kind, numel, key)

    at = 0
    parts: list[Pickle] = []
    for _ in range(5):
        try:
            part = loads(data, start=at, exact=False, persistent=storage)
        except Reject as error:
            error.where = str(file.path)
            if not whole:
                raise _NeedMore(error) from None
            raise
        parts.append(part)
        at = part.end
    magic, protocol, system, value, keys = (part.value for part in parts)
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
        raise CkptError("not-torch", "the magic number or protocol is not torch's", where=file.path)
    if not isinstance(system, Dict):
        raise CkptError("pickle-damaged", "the system information is not a dict", where=file.path)
    if system.get("little_endian") is not True:
        raise CkptError("big-endian", "the tensors are stored big-endian", where=file.path)
    names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else None
    if not isinstance(keys, list) or names != keys or sorted(names) != sorted(storages):
        raise CkptError(
            "pickle-damaged", "the list of storages does not match the tensors that use them", where=file.path
        )
    for key in names:
        made = storages[key]
        (count,) = struct.unpack("<q", _exactly(file, at, 8, f"storage {key}"))
        if count != made.numel:
            raise CkptError(
                "pickle-damaged",
                f"storage {key} has {count} elements where {made.numel} are declared",
                where=file.path,
            )
        if at + 8 + made.nbytes > file.size:
            raise truncated(file.path, f"storage {key} needs {made.nbytes} bytes from {at + 8}")
        made.chunks = (ByteRange(file.path, at + 8, made.nbytes),) if made.nbytes else ()
        at += 8 + made.nbytes
    if at != file.size:
        raise CkptError("file-appended", f"{file.size - at} bytes follow the last storage", where=file.path)
    return TorchFile(
        path=file.path,
        size=file.size,
        value=value,
        storages=storages,
        pickle=replace(parts[3], calls=[call for part in parts for call in part.calls]),
        archive=None,
    )


def _exactly(file: File, start: int, nbytes: int, what: str) -> bytes:
    if start + nbytes > file.size:
        raise truncated(file.path, f"{what} is missing")
    return file.read(start, nbytes)


# --- tensors ------------------------------------------------------------------------------------------


def _view(path: Path, node: Object) -> View | None:
    try:
        return _rebuilt(node)
    except Reject as error:
        error.where = error.where or str(path)
        raise


def _rebuilt(node: Object, depth: int = 0) -> View | None:
    cls = node.cls
    if depth > 4:
        raise Reject("a tensor is wrapped too often")
    if not isinstance(cls, Global) or node.how != "reduce":
        return None
    if cls == Global("torch._tensor", "_rebuild_from_type_v2") and len(node.args) == 4:
        func, _, args, _ = node.args  # ZeRO-3 tensors: (function, type, its arguments, attributes)
        return _rebuilt(Object("reduce", func, args), depth + 1) if isinstance(args, tuple) else None
    if cls.module != "torch._utils":
        return None
    match cls.name:
        case "_rebuild_parameter" | "_rebuild_parameter_with_state":
            inner = node.args[0] if node.args else None
            return _rebuilt(inner, depth + 1) if isinstance(inner, Object) else None
        case "_rebuild_tensor" | "_rebuild_tensor_v2" if len(node.args) >= 4:
            storage, offset, shape, strides = node.args[:4]
            dtype = None
        case "_rebuild_tensor_v3" if len(node.args) >= 7:
            storage, offset, shape, strides = node.args[:4]
            dtype = _dtype(node.args[6])
        case _:
            return None
    if not isinstance(storage, Storage):
        raise Reject("a tensor has no storage")
    dims, steps = _ints(shape), _ints(strides)
    (start,) = _ints((offset,))
    dtype = dtype or storage.dtype
    if len(dims) != len(steps) or len(dims) > MAX_DIMS or math.prod(dims) >= 2**63:
        raise Reject("a tensor has an impossible shape")
    if math.prod(dims):
        last = start + sum((n - 1) * step for n, step in zip(dims, steps, strict=True))
        if (last + 1) * dtype.itemsize > storage.nbytes:
            raise Reject(f"a tensor reaches to element {last} of a storage of {storage.numel}")
    return View(storage=storage, dtype=dtype, offset=start, shape=dims, strides=steps)


def _dtype(node: Node) -> DType:
    if isinstance(node, Global) and node.module == "torch" and node.name in DTYPES:
        return DTYPES[node.name]
    shown = escape(node) if isinstance(node, Global) else "that is no name"
    raise Reject(f"a tensor has the unknown element type {shown}")


def size(node: Node) -> tuple[int, ...]:
    """A torch.Size or a plain tuple of ints (MoE checkpoints hold tuples). Raises Reject otherwise."""
    if isinstance(node, Object) and node.is_a("torch", "Size") and len(node.args) == 1:
        return _ints(node.args[0])
    return _ints(node)


def _ints(node: Node) -> tuple[int, ...]:
    if isinstance(node, Object) and node.is_a("torch", "Size") and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, tuple | list):
        raise Reject("a shape is not a tuple")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in node):
        raise Reject("a shape holds something other than sizes")
    return tuple(n for n in node if isinstance(n, int))


def labelled(file: TorchFile) -> Iterator[tuple[str, View]]:
    """Every tensor of a file with its path into the data, such as `module.emb.weight` or `state[0].step`."""
    seen: set[int] = set()
    todo: list[tuple[str, Node]] = [("", file.value)]
    while todo:
        label, node = todo.pop()
        if not isinstance(node, list | tuple | Dict | Object) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Object) and (view := file.view(node)) is not None:
            yield label, view
            continue
        if len(label) > 1000:  # of a hostile file: a label per level would need memory by the square
            label = "…"
        inside: list[tuple[str, Node]] = []
        if isinstance(node, list | tuple):
            inside = [(f"{label}[{i}]", value) for i, value in enumerate(node)]
        else:
            for key, value in node.pairs:
                step = key if isinstance(key, str) else f"[{key}]" if isinstance(key, int) else "[...]"
                inside.append((f"{label}.{step}" if label and isinstance(key, str) else label + step, value))
            if isinstance(node, Object):
                inside += [(label, node.args), (label, node.items)]
                inside += [(label, node.state)] if node.has_state else []
        todo.extend(reversed(inside))


_SCALARS = {"float64": "<d", "float32": "<f", "int64": "<q", "int32": "<i", "float16": "<e"}


def scalar(view: View) -> float | None:
    """The value of a tensor of one element, read from the file; None for other dtypes."""
    form = _SCALARS.get(view.dtype.name)
    if form is None or view.ref.numel != 1:
        return None
    (value,) = struct.unpack(form, scalar_bytes(view))
    return float(value)


def scalar_bytes(view: View) -> bytes:
    """The bytes of a tensor of one element, read from the file."""
    (chunk,) = view.ref.chunks
    assert isinstance(chunk, ByteRange)  # one element is contiguous
    with opened(chunk.path) as file:
        return file.read(chunk.start, chunk.nbytes)


# --- writing ------------------------------------------------------------------------------------------

_EMPTY_HOOKS = ("collections", "OrderedDict")


def tensor_node(ref: TensorRef, storage: Storage | None = None, offset: int = 0) -> Object:
    """A node for a contiguous tensor: a view of `storage` from `offset`, or of a storage of its own."""
    if storage is None:
        storage = new_storage(ref.dtype, ref.numel, ref.chunks)
    strides = contiguous_strides(ref.shape)
    hooks = Object("reduce", Global(*_EMPTY_HOOKS), ())
    if ref.dtype.storage is None:
        args = (storage, offset, ref.shape, strides, False, hooks, Global("torch", ref.dtype.name))
        return Object("reduce", Global("torch._utils", "_rebuild_tensor_v3"), args)
    args6 = (storage, offset, ref.shape, strides, False, hooks)
    return Object("reduce", Global("torch._utils", "_rebuild_tensor_v2"), args6)


def new_storage(dtype: DType, numel: int, segments: Iterable[Segment]) -> Storage:
    """A storage to be written: `numel` elements of `dtype`, their bytes in `segments`."""
    if dtype.storage is None:
        kind = Global("torch.storage", "UntypedStorage")
        return Storage(kind, UINT8, numel * dtype.itemsize, tuple(segments))
    return Storage(Global("torch", dtype.storage), dtype, numel, tuple(segments))


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
        return OutputFile(path=path, segments=tuple(_legacy_segments(pickle, named)))
    records: list[tuple[str, Sequence[Segment]]] = [
        ("data.pkl", [Literal(pickle)]),
        ("byteorder", [Literal(b"little")]),
        *((f"data/{key}", storage.chunks) for key, storage in zip(keys.values(), storages, strict=True)),
        ("version", [Literal(b"3\n")]),
    ]
    root = Path(path).name.rpartition(".")[0] or Path(path).name or "archive"
    return OutputFile(path=path, segments=archive_segments(root, records))


def _legacy_segments(pickle: bytes, storages: dict[str, Storage]) -> Iterator[Segment]:
    """Magic number, protocol, system information, value, keys; then each storage after its length."""
    system = Dict.of(
        [
            ("protocol_version", LEGACY_PROTOCOL),
            ("little_endian", True),
            ("type_sizes", Dict.of([("short", 2), ("int", 4), ("long", 4)])),
        ]
    )
    keys = sorted(storages)  # as torch.save orders them
    yield Literal(LEGACY_HEAD + b"." + dumps(LEGACY_PROTOCOL) + dumps(system) + pickle + dumps(list(keys)))
    for key in keys:
        yield Literal(struct.pack("<q", storages[key].numel))
        yield from storages[key].chunks


def stored(value: Node) -> Iterator[Storage]:
    """Every storage that a tree refers to, once."""
    return (node for node in walk(value) if isinstance(node, Storage))
