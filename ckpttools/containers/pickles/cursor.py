"""The bytes of a pickle, read in order: every length is compared with what is left before it is used."""

from __future__ import annotations

import re
import struct

from ckpttools.containers.pickles.nodes import Node, Reject

MAX_INT_BYTES = 512
MAX_TEXT = 1 << 20  # bytes of a protocol 0 string

_DECIMAL = re.compile(rb"[+-]?[0-9]{1,1240}")
_FLOAT = re.compile(rb"[+-]?(?:[0-9.eE+-]{1,64}|inf|nan)")
unpack_u16 = struct.Struct("<H").unpack_from
unpack_i32 = struct.Struct("<i").unpack_from
unpack_u32 = struct.Struct("<I").unpack_from
_unpack_u64 = struct.Struct("<Q").unpack_from
_unpack_f64 = struct.Struct(">d").unpack_from


class Cursor:
    """`pos` is the offset of the next unread byte. Past the end: Reject, IndexError or struct.error."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data = data
        self.start = self.pos = start
        self.end = len(data)

    def take(self, n: int) -> bytes:
        pos = self.pos
        if n < 0 or n > self.end - pos:
            raise Reject(f"a length of {n} bytes is longer than the file", pos)
        self.pos = pos + n
        return self.data[pos : pos + n]

    def line(self, limit: int) -> bytes:
        pos = self.pos
        stop = self.data.find(b"\n", pos, pos + limit + 1)
        if stop < 0:
            raise Reject("a text argument does not end", pos)
        self.pos = stop + 1
        return self.data[pos:stop]

    def u8(self) -> int:
        self.pos += 1
        return self.data[self.pos - 1]

    def u16(self) -> int:
        self.pos += 2
        return int(unpack_u16(self.data, self.pos - 2)[0])

    def i32(self) -> int:
        self.pos += 4
        return int(unpack_i32(self.data, self.pos - 4)[0])

    def u32(self) -> int:
        self.pos += 4
        return int(unpack_u32(self.data, self.pos - 4)[0])

    def u64(self) -> int:
        self.pos += 8
        return int(_unpack_u64(self.data, self.pos - 8)[0])

    def f64(self) -> float:
        self.pos += 8
        return float(_unpack_f64(self.data, self.pos - 8)[0])

    def integer(self, n: int) -> int:
        """Of `n` bytes, little-endian and signed."""
        if n > MAX_INT_BYTES:
            raise Reject(f"an integer of {n} bytes is over the limit of {MAX_INT_BYTES}", self.pos)
        return int.from_bytes(self.take(n), "little", signed=True)

    def decimal(self, suffix: bytes = b"") -> int:
        text = self.line(1300).removesuffix(suffix)
        if not _DECIMAL.fullmatch(text):
            raise Reject("an integer is not decimal", self.pos)
        return int(text)

    def decimal_or_bool(self) -> int:
        if self.data[self.pos : self.pos + 3] in (b"00\n", b"01\n"):
            return self.line(2) == b"01"
        return self.decimal()

    def float_text(self) -> float:
        text = self.line(80)
        try:
            if _FLOAT.fullmatch(text):
                return float(text)
        except ValueError:
            pass
        raise Reject("a float is not a number", self.pos)

    def text(self, n: int) -> str:
        try:
            return self.take(n).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise Reject("a string is not UTF-8", self.pos - n) from None

    def unicode_line(self) -> str:
        try:
            return self.line(MAX_TEXT).decode("raw-unicode-escape")
        except UnicodeDecodeError:
            raise Reject("a string is not raw-unicode-escape", self.pos) from None

    def quoted(self) -> Node:
        raw = self.line(MAX_TEXT)
        if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"') or b"\\" in raw:
            raise Reject("a quoted string is malformed or escaped", self.pos)
        return old_string(raw[1:-1])


def old_string(raw: bytes) -> Node:
    """Python 2 did not tell text from bytes: torch decodes UTF-8; numpy's raw data stays bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
