"""Storages of a torch file: what a persistent id declares, and where the bytes lie."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from ckpttools.containers.pickles import Global, Node, Reject
from ckpttools.errors import escape
from ckpttools.location import Location
from ckpttools.plan import Segment
from ckpttools.tensors import BY_STORAGE, DTYPES, UINT8, ByteRange, DType

T = TypeVar("T")
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

    def moved(self, path: Location) -> Storage:
        """The same bytes of another file."""
        chunks = tuple(chunk._replace(path=path) for chunk in self.chunks if isinstance(chunk, ByteRange))
        return Storage(self.kind, self.dtype, self.numel, chunks, self.location, self.record)


def storage_id(pid: Node) -> tuple[Global, DType, str, str, int]:
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


def same(storage: Storage, kind: Global, numel: int, key: str) -> Storage:
    if storage.kind != kind or storage.numel != numel:
        raise Reject(f"storage {key} is declared twice, differently")
    return storage


def located(path: Location, read: Callable[[], T]) -> T:
    """What `read` gives; a Reject of it names the file."""
    try:
        return read()
    except Reject as error:
        error.where = error.where or str(path)
        raise
