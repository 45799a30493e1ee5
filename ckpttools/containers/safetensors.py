"""The safetensors container.

    8 bytes     header length, little-endian, at most 100 MB
    header      JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [start, end]}}
    data        the tensors, C order, little-endian; offsets count from here, without gaps or overlaps

Source: the README of the safetensors project, which is the format's specification.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping

from msgspec import Struct

from ckpttools.containers import jsons
from ckpttools.errors import CkptError, Unsupported, counted, escape, some
from ckpttools.location import Location
from ckpttools.plan import Literal, OutputFile, Segment
from ckpttools.stores.files import opened, truncated
from ckpttools.tensors import BY_SAFETENSORS, ByteRange, DType, TensorRef

MAX_HEADER = 100_000_000
METADATA = "__metadata__"
PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # bits of an element, where several share a byte: not read


class SafetensorsFile(Struct, frozen=True, kw_only=True):
    path: Location
    size: int
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]


def _bad(path: Location, problem: str) -> CkptError:
    return CkptError(
        "safetensors-header",
        problem,
        where=path,
        why="the header says where each tensor lies: no tensor of this file can be trusted",
        hint="copy the file again from where it was saved",
    )


def read_safetensors(path: Location) -> SafetensorsFile:
    """Read the header; tensor data is not read. Raises CkptError for a header that does not fit the file, and
    Unsupported for one that does, of tensors whose elements are no whole bytes.
    """
    with opened(path) as file:
        if file.size < 8:
            raise truncated(path, f"{file.size} bytes hold no header")
        (nbytes,) = struct.unpack("<Q", file.read(0, 8))
        if nbytes > MAX_HEADER:
            raise _bad(path, f"a header of {nbytes} bytes is over the limit of {MAX_HEADER}")
        if 8 + nbytes > file.size:
            raise truncated(path, f"the header needs {nbytes} bytes")
        raw = file.read(8, nbytes)
        size = file.size
    if raw[:1] != b"{":
        raise _bad(path, "the header does not start with '{'")
    header = jsons.parse(path, raw, "the header")
    metadata = header.pop(METADATA, None)
    metadata = {} if metadata is None else metadata  # null: the safetensors library takes it for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "__metadata__ is not a map of strings")
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorRef] = {}
    packed: list[str] = []
    data = 8 + nbytes
    for name, entry in header.items():
        dtype, shape, start, end = _entry(path, name, entry)
        spans.append((start, end, name))
        chunks = (ByteRange(path, data + start, end - start),) if end > start else ()
        if isinstance(dtype, str):
            packed.append(f"{name} ({dtype})")
            continue
        tensors[name] = TensorRef(dtype, shape, chunks)
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise _bad(path, f"tensor '{escape(name)}' starts at {start}, expected {at}: a gap or an overlap")
        at = end
    if data + at > size:
        raise truncated(path, f"the tensors need {at} bytes, {size - data} are there")
    if data + at < size:
        raise CkptError(
            "file-appended",
            f"{size - data - at} bytes follow the last tensor",
            where=path,
            why="the file was appended to, or its header was shortened",
            hint="copy the file again from where it was saved",
        )
    if packed:
        raise Unsupported(
            "dtype-not-read",
            f"{counted(len(packed), 'tensor')} of a kind that is not read: {some(packed)}",
            where=path,
            why="their elements are no whole bytes: nothing is known to be wrong with the file",
            hint="the safetensors library opens it",
        )
    return SafetensorsFile(path=path, size=size, tensors=tensors, metadata=metadata)


def _entry(path: Location, name: str, entry: object) -> tuple[DType | str, tuple[int, ...], int, int]:
    """None instead of an element type of PACKED."""
    where = f"tensor '{escape(name)}'"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{where} has other fields than dtype, shape and data_offsets")
    code = entry["dtype"] if isinstance(entry["dtype"], str) else ""
    dtype: DType | str | None = code if code in PACKED else BY_SAFETENSORS.get(code)
    if dtype is None:
        raise _bad(path, f"{where} has the unknown dtype {escape(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise _bad(path, f"{where} has a malformed shape or data_offsets")
    if not all(type(n) is int and 0 <= n < 2**63 for n in [*shape, *offsets]):
        raise _bad(path, f"{where} has a size or an offset that is no size")
    start, end = offsets
    bits = PACKED[dtype] if isinstance(dtype, str) else 8 * dtype.itemsize
    if len(shape) > 64 or math.prod(shape) * bits != 8 * (end - start):
        raise _bad(path, f"{where} has {end - start} bytes, its shape needs another number")
    return dtype, tuple(shape), start, end


def safetensors_file(path: str, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]) -> OutputFile:
    """A safetensors file with these tensors.

    Tensors are ordered by descending element size, then name, as the safetensors library does, so that
    each one is aligned. Raises CkptError for a dtype that safetensors does not have,
    and Unsupported for a tensor of the name that its header keeps for itself.
    """
    if METADATA in tensors:
        raise Unsupported(
            "name-reserved",
            f"a tensor is called {METADATA}",
            where=path,
            why="a safetensors header keeps its notes under that name: the tensor could not be found again",
            hint=f"leave it out with --exclude {METADATA}, or write a torch file, which has no such names",
        )
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    segments: list[Segment] = []
    at = 0
    for name, ref in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if ref.dtype.safetensors is None:
            raise CkptError(
                "dtype-unsupported",
                f"safetensors has no {ref.dtype}",
                where=name,
                why="its header has no word for the dtype, so no reader could tell",
            )
        header[name] = {
            "dtype": ref.dtype.safetensors,
            "shape": list(ref.shape),
            "data_offsets": [at, at + ref.nbytes],
        }
        at += ref.nbytes
        segments += ref.chunks
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return OutputFile(path=path, segments=(Literal(struct.pack("<Q", len(raw)) + raw), *segments))
