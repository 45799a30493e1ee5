"""Scalars of TensorBoard's event files, without TensorBoard.

    record    length (8 bytes, little-endian), masked CRC-32C of the length, data, masked CRC-32C of the data
    data      a protobuf Event: 1 wall_time (double), 2 step (varint), 5 summary (message)
    summary   1 value (message, repeated): 1 tag (text), 2 simple_value (float), 8 tensor (message)
    tensor    1 dtype (1 float, 2 double), 4 tensor_content (bytes), 5 float_val, 6 double_val

Source: tensorflow/core/lib/io/record_writer.cc, tensorboard/compat/proto/{event,summary,tensor}.proto. The
checksums are not looked at: a torn file, as a killed run leaves it, ends where its records do.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ckpttools.errors import CkptError
from ckpttools.location import Location
from ckpttools.runs.logs.record import Record
from ckpttools.stores.files import File, opened

MAX_BYTES, MAX_RECORD = 1 << 30, 16 << 20
_BLOCK = 4 << 20
Field = tuple[int, int | bytes]


def scalars(path: Location) -> Iterator[Record]:
    """Every scalar in the order of the file. Raises CkptError for what is no event file."""
    with opened(path) as file:
        if file.size > MAX_BYTES:
            raise CkptError(
                "text-too-long",
                f"a log of {file.size} bytes",
                where=path,
                why="every scalar of it is kept in memory",
            )
        for data in _records(file, path):
            yield from _event(data)


def _records(file: File, path: Location) -> Iterator[bytes]:
    at, start, block = 0, 0, b""
    while at + 16 <= file.size:
        if at + 12 > start + len(block):
            start, block = at, file.read(at, min(_BLOCK, file.size - at))
        (nbytes,) = struct.unpack_from("<Q", block, at - start)
        if nbytes > MAX_RECORD:
            if not at:
                raise CkptError(
                    "not-a-log",
                    "no file of TensorBoard events",
                    where=path,
                    why="its first eight bytes are the length of a record, and no record is so long",
                )
            return
        if at + 16 + nbytes > file.size:
            return
        if at + 16 + nbytes > start + len(block):
            start, block = at, file.read(at, min(max(_BLOCK, nbytes + 16), file.size - at))
        yield block[at - start + 12 : at - start + 12 + nbytes]
        at += 16 + nbytes


def _event(data: bytes) -> Iterator[Record]:
    time: float | None = None
    step = 0
    values: dict[str, float] = {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes) and len(value) == 8:
            (time,) = struct.unpack("<d", value)
        elif number == 2 and isinstance(value, int):
            step = value - (1 << 64) if value >> 63 else value
        elif number == 5 and isinstance(value, bytes):
            values |= _summary(value)
    if values:
        yield Record(count=float(step), values=values, time=time)


def _summary(data: bytes) -> dict[str, float]:
    out: dict[str, float] = {}
    for number, message in _fields(data):
        if number != 1 or not isinstance(message, bytes):
            continue
        tag, found = "", None
        for inner, value in _fields(message):
            if inner == 1 and isinstance(value, bytes):
                tag = value.decode("utf-8", errors="replace")
            elif inner == 2 and isinstance(value, bytes) and len(value) == 4:
                (found,) = struct.unpack("<f", value)
            elif inner == 8 and isinstance(value, bytes):
                found = _tensor(value)
        if tag and found is not None:
            out[tag] = found
    return out


def _tensor(data: bytes) -> float | None:
    """A tensor of one float, which newer writers store scalars as."""
    fields = dict(_fields(data))
    kind = fields.get(1)
    form = {1: "<f", 2: "<d"}.get(kind) if isinstance(kind, int) else None
    for number in (4, 5, 6):
        raw = fields.get(number)
        if form and isinstance(raw, bytes) and len(raw) == struct.calcsize(form):
            (value,) = struct.unpack(form, raw)
            return float(value)
    return None


def _fields(data: bytes) -> Iterator[Field]:
    """A message's fields: varints as numbers, all else as bytes. What is torn ends it."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size, at = {1: (8, at), 5: (4, at)}.get(kind) or (_varint(data, at) if kind == 2 else (-1, at))
        if size < 0 or at + size > len(data):
            return
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return value & ((1 << 64) - 1), at
