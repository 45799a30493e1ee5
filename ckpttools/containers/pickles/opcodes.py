"""Which byte is which opcode: those of CPython's `pickletools`, of protocols 0 to 5.

Refused, since no checkpoint needs them and they cannot be data: PERSID, EXT1/2/4, NEXT_BUFFER,
READONLY_BUFFER.
"""

from __future__ import annotations

from collections.abc import Callable

from ckpttools.containers.pickles.cursor import old_string
from ckpttools.containers.pickles.machine import Machine
from ckpttools.containers.pickles.nodes import Dict, Set

STOP = object()  # what the last opcode gives

OPCODES: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": Machine.proto,
    b"\x95": Machine.frame,
    b".": lambda _: STOP,
    b"(": Machine.mark,
    b"0": Machine.pop,
    b"1": lambda m: m.throw_away(1 + len(m.pop_mark())),
    b"2": lambda m: m.push(m.stack[-1]),
    b"q": lambda m: m.remember(m.u8()),
    b"r": lambda m: m.remember(m.u32()),
    b"p": lambda m: m.remember(m.decimal()),
    b"\x94": lambda m: m.remember(len(m.memo) + len(m.far)),
    b"h": lambda m: m.recall(m.u8()),
    b"j": lambda m: m.recall(m.u32()),
    b"g": lambda m: m.recall(m.decimal()),
    b"Q": Machine.persid,
    # plain values
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.i32()),
    b"K": lambda m: m.push(m.u8()),
    b"M": lambda m: m.push(m.u16()),
    b"I": lambda m: m.push(m.decimal_or_bool()),
    b"L": lambda m: m.push(m.decimal(b"L")),
    b"\x8a": lambda m: m.push(m.integer(m.u8())),
    b"\x8b": lambda m: m.push(m.integer(m.i32())),
    b"G": lambda m: m.push(m.f64()),
    b"F": lambda m: m.push(m.float_text()),
    b"\x8c": lambda m: m.push(m.text(m.u8())),
    b"X": lambda m: m.push(m.text(m.u32())),
    b"\x8d": lambda m: m.push(m.text(m.u64())),
    b"V": lambda m: m.push(m.unicode_line()),
    b"U": lambda m: m.push(old_string(m.take(m.u8()))),
    b"T": lambda m: m.push(old_string(m.take(m.i32()))),
    b"S": lambda m: m.push(m.quoted()),
    b"C": lambda m: m.push(m.take(m.u8())),
    b"B": lambda m: m.push(m.take(m.u32())),
    b"\x8e": lambda m: m.push(m.take(m.u64())),
    b"\x96": lambda m: m.push(bytearray(m.take(m.u64()))),
    # containers
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_mark()),
    b"}": lambda m: m.push(Dict()),
    b"d": lambda m: m.push(Dict.of(m.paired(m.pop_mark()))),
    b"\x8f": lambda m: m.push(Set([], frozen=False)),
    b"\x91": lambda m: m.push(Set(m.pop_mark(), frozen=True)),
    b"\x90": Machine.additems,
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.pop_mark()),
    b"s": Machine.setitem,
    b"u": lambda m: m.set_pairs(m.pop_mark()),
    # names and calls
    b"c": lambda m: m.push(m.global_text()),
    b"\x93": Machine.stack_global,
    b"R": lambda m: m.reduce("reduce"),
    b"\x81": lambda m: m.reduce("newobj"),
    b"\x92": Machine.newobj_ex,
    b"o": Machine.obj,
    b"i": Machine.inst,
    b"b": Machine.build,
}
TABLE: list[Callable[[Machine], object] | None] = [OPCODES.get(bytes([i])) for i in range(256)]
