"""The items of a data file: one torch file for each piece of a tensor and for each object, read and written.

    __0_0.distcp    item, item, item ...: no header, no gaps; only .metadata knows where each begins
    item            a zip of torch.save (older: torch's first serialization); its root is `archive`

Within its item, a tensor's data begins at a multiple of 64; where exactly follows from the item's header.
Items of the same type, shape and length that begin with the same bytes have the same layout: it is worked
out once, and for the others the header and the descriptor behind the data are compared. Two short reads for
each piece, so that 50,000 small tensors take seconds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from msgspec import Struct

from ckpttools.containers.archive import (
    CRC_AT,
    DESCRIPTOR_MAGIC,
    SERIALIZATION_ID,
    end_nbytes,
    entry_of,
    unexplained,
)
from ckpttools.containers.nodes import decode, encode
from ckpttools.containers.pickles import Node
from ckpttools.containers.torch_file import (
    TorchFile,
    new_storage,
    read_opened,
    tensor_node,
    write_torch_file,
)
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.formats.dcp.metadata import Item
from ckpttools.location import Location
from ckpttools.plan import Sealed, Segment, SourceCheck
from ckpttools.stores.files import File, exists, opened
from ckpttools.tensors import DType, Source, TensorRef, Zeros
from ckpttools.tree import Value, leaves

ROOT = "archive"
SMALL = 4096  # items up to this length are looked up among those that were read already
MAX_OBJECT = 256 << 20
BEGINNING = 2048  # of an item: the pickle of a tensor and what stands around it
KNOWN = 100_000
_DESCRIPTOR = struct.Struct("<IIII")


class Wanted(Struct, frozen=True):
    """An item to be read. With a dtype it is a piece of a tensor of this shape, else an object."""

    key: str
    item: Item
    dtype: DType | None = None
    shape: tuple[int, ...] = ()


class Data(Struct, frozen=True):
    """Where a piece's elements are, and the checksum that its item states for them, if it has one."""

    chunk: Source
    check: SourceCheck | None


class Items:
    """Reads the items of a folder."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._layouts: dict[tuple[str, tuple[int, ...], int], bytes] = {}
        self._objects: dict[bytes, Value] = {}

    def read(self, wanted: Iterable[Wanted]) -> dict[Item, Data | Value]:
        """Every item that is wanted; each file is opened once. Raises CkptError with the key of the item."""
        out: dict[Item, Data | Value] = {}
        by_file: dict[str, list[Wanted]] = {}
        for each in wanted:
            by_file.setdefault(each.item.file, []).append(each)
        for name, some in by_file.items():
            with _opened(self.folder / name, some[0].key) as file:
                foresee(file, some)
                for each in sorted(some, key=lambda w: w.item.start):
                    out[each.item] = self._one(file, each)
        return out

    def _one(self, file: File, wanted: Wanted) -> Data | Value:
        item = wanted.item
        refuse_compressed(file.path, wanted)
        try:
            window = file.window(item.start, item.nbytes)
            return self._object(window) if wanted.dtype is None else self._piece(window, wanted)
        except CkptError as error:
            error.message = f"'{escape(wanted.key)}', at byte {item.start}: {error.message}"
            error.args = (error.message,)
            raise

    def _object(self, window: File) -> Value:
        if window.size > MAX_OBJECT:
            raise CkptError(
                "field-damaged",
                f"an object of {window.size} bytes",
                where=window.path,
                why="such an object is a counter or a setting, and is read into memory",
            )
        raw = window.read(0, window.size) if window.size <= SMALL else b""
        if raw and raw in self._objects:
            return self._objects[raw]
        file = read_opened(window)
        value = decode(file, file.value)
        if raw and not file.storages and len(self._objects) < KNOWN:
            self._objects[raw] = value
        return value

    def _piece(self, window: File, wanted: Wanted) -> Data:
        assert wanted.dtype is not None
        nbytes = wanted.dtype.itemsize
        for n in wanted.shape:
            nbytes *= n
        key = (wanted.dtype.name, wanted.shape, window.size)
        head = self._layouts.get(key)
        if head is not None:
            after = len(head) + nbytes
            same = after + _DESCRIPTOR.size <= window.size and window.read(0, len(head)) == head
            if same:
                magic, crc, stored, size = _DESCRIPTOR.unpack(window.read(after, _DESCRIPTOR.size))
                if magic == DESCRIPTOR_MAGIC and stored == size == nbytes:
                    source = window.range(len(head), nbytes)
                    return Data(source, SourceCheck(source, crc, _what(wanted)) if crc else None)
        file, data = read_piece(window, wanted)
        record = file.archive.records.get("data/0") if file.archive else None
        if record and record.nbytes == nbytes < 1 << 32 and record.end - record.start == nbytes + 16:
            self._layouts[key] = window.read(0, record.start)
        return data


def read_piece(window: File, wanted: Wanted) -> tuple[TorchFile, Data]:
    """A piece's item in full. Raises CkptError where it is not the tensor that the metadata describes."""
    file = read_opened(window)
    view = file.view(file.value)
    if view is None or view.dtype is not wanted.dtype or view.shape != wanted.shape:
        found = f"{view.dtype.name} {list(view.shape)}" if view else "no tensor"
        raise CkptError(
            "item-mismatch",
            f"the item holds {found}, the metadata says {wanted.dtype} {list(wanted.shape)}",
            where=window.path,
            why="torch would load it all the same, in part or rounded",
            hint="copy the data files and .metadata again, from one save",
        )
    (chunk,) = view.ref.chunks
    check = next((c for c in file.checks() if c.source == chunk), None)
    return file, Data(chunk, check and SourceCheck(check.source, check.crc32, _what(wanted)))  # type: ignore[arg-type]


class Alike(Struct, frozen=True):
    """An item of a piece that was looked at in full: its bytes around the data, which those of other items of
    the same type, shape and length are, too. The data's checksum, twice in what comes after it, is left out.
    """

    head: bytes
    tail: bytes
    second: int  # where in the tail the directory has the checksum

    @classmethod
    def of(cls, window: File, file: TorchFile, data: Data) -> Alike | None:
        """None where more than that checksum depends on the data, or it is a part of what is stored."""
        archive = file.archive
        record = archive.records.get("data/0") if archive is not None else None
        if archive is None or record is None or SERIALIZATION_ID in archive.records or not record.crc32:
            return None
        if data.chunk != archive.range(record) or unexplained(window, archive) != []:
            return None
        after = record.start + record.nbytes
        tail = window.read(after, window.size - after)
        raw = f"{archive.root}/{record.name}".encode()
        second = tail.index(entry_of(raw, record.nbytes, record.header, record.crc32)) + CRC_AT
        return cls(window.read(0, record.start), _without(tail, second), second)

    def data(self, window: File, wanted: Wanted) -> Data | None:
        """The data of another item; None where that is not alike."""
        nbytes = window.size - len(self.head) - len(self.tail)
        tail = window.read(len(self.head) + nbytes, len(self.tail))
        crc = tail[4:8]
        if not any(crc) or tail[self.second : self.second + 4] != crc:
            return None
        if _without(tail, self.second) != self.tail or window.read(0, len(self.head)) != self.head:
            return None
        source = window.range(len(self.head), nbytes)
        return Data(source, SourceCheck(source, int.from_bytes(crc, "little"), _what(wanted)))


def _without(tail: bytes, second: int) -> bytes:
    return tail[:4] + bytes(4) + tail[8:second] + bytes(4) + tail[second + 4 :]


def foresee(file: File, wanted: Iterable[Wanted]) -> None:
    """What is around the data of all items is going to be read."""
    ends: list[tuple[int, int]] = []
    for item in (each.item for each in wanted):
        n = end_nbytes(item.nbytes)
        ends += [(item.start, min(BEGINNING, item.nbytes)), (item.start + item.nbytes - n, n)]
    file.prefetch(ends)


def refuse_compressed(path: Location, wanted: Wanted) -> None:
    """Raises Unsupported for an item that an extension of torch's writer has packed."""
    if wanted.item.transforms:
        raise Unsupported(
            "item-compressed",
            f"'{escape(wanted.key)}' was compressed when it was saved ({', '.join(wanted.item.transforms)})",
            where=path,
            why="an extension of torch's writer packed it; ckpt reads items as torch writes them",
            hint="load it with torch, with the same extension, and save it without",
        )


def _what(wanted: Wanted) -> str:
    return f"'{wanted.key}'"  # escaped where it is shown


def _opened(path: Location, key: str):  # type: ignore[no-untyped-def]
    if not exists(path):
        raise CkptError(
            "shard-missing",
            f"{escape(path.name)} is missing: it holds '{escape(key)}' and others",
            where=path,
            why="without it these tensors cannot be restored",
            hint="copy the file from the node that wrote it",
        )
    return opened(path)


# --- writing ------------------------------------------------------------------------------------------


class Writer:
    """The segments of one data file, item after item. What equal items share is kept once in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.segments: list[Segment] = []
        self.nbytes = 0
        self._frames: dict[object, tuple[Segment, ...]] = {}

    def tensor(self, ref: TensorRef) -> Item:
        """Add a tensor or a piece of one."""
        key = (ref.dtype.name, ref.shape)
        if key not in self._frames:
            storage = new_storage(ref.dtype, ref.numel, (Zeros(ref.nbytes),) if ref.nbytes else ())
            self._frames[key] = _segments(tensor_node(TensorRef(ref.dtype, ref.shape, ()), storage))
        return self._add(self._frames[key], ref.chunks)

    def value(self, value: Value) -> Item:
        """Add an object."""
        kinds = (type(None), bool, int, float, str, tuple, list, dict)
        if not all(type(leaf) in kinds for _, leaf in leaves(value)):
            return self._add(_segments(encode(value)))
        key = repr(value)
        if key not in self._frames:
            self._frames[key] = _segments(encode(value))
        return self._add(self._frames[key])

    def _add(self, item: tuple[Segment, ...], data: tuple[Segment, ...] = ()) -> Item:
        """Add an item; `data` takes the place of its zeros."""
        start, here, more = self.nbytes, len(self.segments), max(len(data) - 1, 0)
        for segment in item:
            self.nbytes += segment.nbytes
            match segment:
                case Zeros() if data:
                    self.segments += data
                case Sealed(own, holes):
                    moved = ((at, here + first, here + last + more) for at, first, last in holes)
                    self.segments.append(Sealed(own, tuple(moved)))
                case _:
                    self.segments.append(segment)
        return Item(self.name, start, self.nbytes - start)


def _segments(node: Node) -> tuple[Segment, ...]:
    return write_torch_file(f"{ROOT}.pt", node).segments
