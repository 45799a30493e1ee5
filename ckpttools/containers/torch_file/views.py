"""A torch file's header: the tree of nodes, and its tensors as views of storages."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from typing import Protocol

from msgspec import Struct, field

from ckpttools.containers.archive import Archive, Record
from ckpttools.containers.pickles import Dict, Global, Node, Object, Pickle, Reject
from ckpttools.containers.pickles.judge import dangers, judge
from ckpttools.containers.torch_file.storages import Storage
from ckpttools.errors import escape
from ckpttools.location import Location, Stored
from ckpttools.plan import SourceCheck
from ckpttools.stores.files import bytes_of
from ckpttools.tensors import DTYPES, ByteRange, Chunk, DType, Literal, Strided, TensorRef, is_contiguous

MAX_DIMS = 64
_LISTS, _MAPPINGS = (tuple, list), (Object, Dict)
# types of half a byte, of bits, of half a complex64 and of quantised numbers: c10/core/ScalarType.h
NOT_READ = re.compile(r"complex32|float4_e2m1fn_x2|bit|bits\w+|u?int[1-7]|quint4x2|quint2x4|qu?int\d+")


class View:
    """A tensor of a torch file: a view of a storage, all in elements. A file has hundreds of thousands."""

    __slots__ = ("_ref", "dtype", "offset", "shape", "storage", "strides")

    def __init__(
        self,
        storage: Storage,
        dtype: DType,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> None:
        self.storage, self.dtype, self.offset = storage, dtype, offset
        self.shape, self.strides = shape, strides
        self._ref: TensorRef | None = None

    def of(self, storage: Storage) -> View:
        """The same of another storage."""
        return View(storage, self.dtype, self.offset, self.shape, self.strides)

    @property
    def ref(self) -> TensorRef:
        """The value as byte ranges; strided where the view is not contiguous. Whoever asks gets the same."""
        if self._ref is None:
            self._ref = TensorRef(self.dtype, self.shape, self._chunks())
        return self._ref

    def _chunks(self) -> tuple[Chunk, ...]:
        numel = math.prod(self.shape)
        item = self.dtype.itemsize
        if numel == 0:
            return ()
        (source,) = self.storage.chunks
        assert isinstance(source, ByteRange)
        start = source.start + self.offset * item
        if is_contiguous(self.shape, self.strides):
            return (ByteRange(source.path, start, numel * item),)
        view = Strided(
            path=source.path,
            start=start,
            itemsize=item,
            shape=self.shape,
            strides=self.strides,
            first=0,
            numel=numel,
        )
        return (view,)


class Deflations(Protocol):
    """Where the inflated bytes of a record are."""

    def range(self, record: Record) -> ByteRange: ...


class TorchFile(Struct, frozen=True, kw_only=True):
    """A torch file, header read: `value` is the tree of nodes, with `Storage` nodes at its leaves."""

    path: Location
    size: int
    value: Node
    storages: dict[str, Storage]
    pickle: Pickle
    archive: Archive | None  # None for the legacy serialization
    deflated: Deflations | None = None  # where records that another program compressed are read
    stray: tuple[str, ...] = ()  # storages that no tensor is in
    borrowed: bool = False  # the nodes are those of a file that is alike: their storages lie in this one
    _views: dict[int, View] = field(default_factory=dict)

    @property
    def root(self) -> str | None:
        """The archive's root name: the stem of the file's name when it was saved."""
        return self.archive.root if self.archive else None

    @property
    def dangers(self) -> tuple[str, ...]:
        """What loading the file would run, one line each."""
        return dangers(judge(self.pickle))

    @property
    def has_checksums(self) -> bool:
        return self.archive is not None and not self.archive.unchecked

    def checks(self) -> Iterator[SourceCheck]:
        """The checksum of every record that has one, as the archive states it.

        A deflated record's is one of its inflated bytes: of a small one it was looked at when the header was
        read, a storage is inflated where it is read.
        """
        if self.archive and self.has_checksums:
            for name, record in self.archive.records.items():
                if not record.nbytes or self.archive.is_reserved(record):
                    continue
                if not record.method:
                    yield SourceCheck(self.archive.range(record), record.crc32, f"record {escape(name)}")
                elif self.deflated and name.startswith("data/") and record.size:
                    yield SourceCheck(self.deflated.range(record), record.crc32, f"record {escape(name)}")

    def stated(self, view: View) -> TensorRef:
        """A tensor, with its bytes where it is a storage of four bytes in a store: its checksum tells them.
        An optimizer keeps a step for every parameter, and they lie apart.
        """
        record = self.archive.records.get(view.storage.record) if self.archive else None
        if not isinstance(self.path, Stored) or record is None or record.method or not record.crc32:
            return view.ref
        if record.nbytes != 4 or view.ref.nbytes != 4:
            return view.ref
        from ckpttools.checksums import of_crc32  # of no use to files that are near

        return TensorRef(view.dtype, view.shape, (Literal(of_crc32(record.crc32)),))

    def view(self, node: Node) -> View | None:
        """The tensor that a node describes, or None where it is something else.

        Raises CkptError for a tensor that reaches outside its storage.
        """
        if not isinstance(node, Object) or node.how != "reduce":
            return None
        known = self._views.get(id(node))
        if known is None:
            try:
                known = _rebuilt(node)
            except Reject as error:
                error.where = error.where or str(self.path)
                raise
            if known is not None:
                if self.borrowed:
                    known = known.of(known.storage.moved(self.path))
                self._views[id(node)] = known
        return known


def _rebuilt(node: Object, depth: int = 0) -> View | None:
    cls = node.cls
    if depth > 4:
        raise Reject("a tensor is wrapped too often")
    if not isinstance(cls, Global) or node.how != "reduce":
        return None
    if cls.module == "torch._tensor" and cls.name == "_rebuild_from_type_v2" and len(node.args) == 4:
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
            dtype, marks = None, node.args[6:7]
        case "_rebuild_tensor_v3" if len(node.args) >= 7 and _is_not_read(node.args[6]):
            return None
        case "_rebuild_tensor_v3" if len(node.args) >= 7:
            storage, offset, shape, strides = node.args[:4]
            dtype, marks = _dtype(node.args[6]), node.args[7:8]
        case _:
            return None
    if any(isinstance(mark, Dict) and (mark.get("conj") or mark.get("neg")) for mark in marks):
        return None  # conjugated or negated when it is used: the storage holds other values
    if not isinstance(storage, Storage):
        raise Reject("a tensor has no storage")
    dims, steps = _ints(shape), _ints(strides)
    (start,) = _ints((offset,))
    dtype = dtype or storage.dtype
    if len(dims) != len(steps) or len(dims) > MAX_DIMS or (numel := math.prod(dims)) >= 2**63:
        raise Reject("a tensor has an impossible shape")
    if numel:
        last = start
        for n, step in zip(dims, steps, strict=True):
            last += (n - 1) * step
        if (last + 1) * dtype.itemsize > storage.nbytes:
            raise Reject(f"a tensor reaches to element {last} of a storage of {storage.numel}")
    return View(storage, dtype, start, dims, steps)


def is_rebuilt(node: Node) -> bool:
    """Whether torch makes a tensor of it; where it is not read, one that is none of plain bytes."""
    cls = node.cls if isinstance(node, Object) else None
    if not isinstance(cls, Global) or cls.module not in ("torch._utils", "torch._tensor"):
        return False
    return cls.name.startswith("_rebuild_")


def slots(node: Node) -> Dict | None:
    """What a tensor of a class of its own holds in slots: of a DTensor `_local_tensor` and `_spec`."""
    if not isinstance(node, Object) or not node.is_a("torch._tensor", "_rebuild_from_type_v2"):
        return None
    held = node.args[3] if len(node.args) == 4 else None
    return held[1] if isinstance(held, tuple) and len(held) == 2 and isinstance(held[1], Dict) else None


def _is_not_read(node: Node) -> bool:
    """A type of torch's with no numbers that anybody here could look at."""
    return isinstance(node, Global) and node.module == "torch" and bool(NOT_READ.fullmatch(node.name))


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
    if not isinstance(node, _LISTS):
        raise Reject("a shape is not a tuple")
    for n in node:
        if type(n) is not int or not 0 <= n < 2**63:  # True is none
            raise Reject("a shape holds something other than sizes")
    return (*node,)  # a tuple of its own: what a pickle shares is shared where it is written, too


def labelled(file: TorchFile) -> Iterator[tuple[str, View]]:
    """Every tensor of a file with its path into the data, such as `module.emb.weight` or `state[0].step`."""
    seen: set[int] = set()
    todo: list[tuple[str, Node]] = [("", file.value)]
    while todo:
        label, node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Object) and (view := file.view(node)) is not None:
            yield label, view
            continue
        if len(label) > 1000:  # of a hostile file: a label per level would need memory by the square
            label = "…"
        inside: list[tuple[str, Node]] = []
        if isinstance(node, _LISTS):
            inside = [(f"{label}[{i}]", value) for i, value in enumerate(node) if _holds(value)]
        elif isinstance(node, _MAPPINGS):
            for key, value in node.pairs:
                if not _holds(value):
                    continue
                step = key if isinstance(key, str) else f"[{key}]" if isinstance(key, int) else "[...]"
                inside.append((f"{label}.{step}" if label and isinstance(key, str) else label + step, value))
            if isinstance(node, Object):
                local = [own.get("_local_tensor")] if (own := slots(node)) is not None else []
                inside += [
                    (label, part) for part in (*local, node.args, node.items, node.state) if _holds(part)
                ]
        todo.extend(reversed(inside))


def _holds(node: Node) -> bool:
    """Whether there may be tensors in it: most of what a file holds are numbers and names."""
    return isinstance(node, _MAPPINGS) or (isinstance(node, _LISTS) and len(node) > 0)


# how the numbers lie that are read and changed by themselves: counters, steps, learning rates
FORMS = {"float64": "<d", "float32": "<f", "float16": "<e", "int64": "<q", "int32": "<i"}


def scalar(ref: TensorRef) -> int | float | None:
    """The value of a tensor of one element, read from the file; None for other dtypes."""
    form, chunk = FORMS.get(ref.dtype.name), ref.chunks[0] if len(ref.chunks) == 1 else None
    if form is None or ref.numel != 1 or not isinstance(chunk, ByteRange | Literal):
        return None
    found: int | float = struct.unpack(form, chunk.data if isinstance(chunk, Literal) else bytes_of(chunk))[0]
    return found
