"""Reads a pickle: its opcodes, one after the other, to nodes. Nothing is looked up, imported or called."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from ckpttools.containers.pickles import machine as limited
from ckpttools.containers.pickles.cursor import unpack_i32, unpack_u16, unpack_u32
from ckpttools.containers.pickles.machine import Machine
from ckpttools.containers.pickles.nodes import Dict, Node, Object, Persistent, Pickle, Reject
from ckpttools.containers.pickles.opcodes import STOP, TABLE

MAX_BYTES = 256 << 20
# 400,000 tensors or 20 million logged numbers: the rest of the work is bounded with them
MAX_OPCODES = 20_000_000
_FREQUENT = b"rhRKX(Qt\x86M)\x89j\x85J\x81}ub"
_INTEGERS = re.compile(rb"(?:K.)+", re.DOTALL)


def loads(
    data: bytes,
    *,
    start: int = 0,
    exact: bool = True,
    persistent: Callable[[Node], Node] | None = None,
    limits: int = 1,
) -> Pickle:
    """Read one pickle that begins at `start`. With `exact`, STOP must be the last byte.

    `persistent` turns a persistent id into the node that stands for it (a Persistent by default). `limits`
    multiplies what a pickle may memoize, call and do, for one that is large by its nature.
    Raises Reject for anything that is not a well-formed pickle of data.
    """
    if len(data) > MAX_BYTES:
        raise Reject(f"a pickle of {len(data)} bytes is over the limit of {MAX_BYTES}")
    machine = Machine(data, start, persistent or Persistent, limits)
    try:
        _carry_out(machine)
    except (IndexError, struct.error):
        raise Reject("an opcode finds too little on the stack or in the file", machine.pos) from None
    result = machine.result()
    if exact and result.end != len(data):
        raise Reject(f"{len(data) - result.end} bytes follow the end of the pickle", result.end)
    return result


def _carry_out(machine: Machine) -> None:
    """Every opcode up to STOP. Those that make up nine tenths of a checkpoint's pickle are carried out
    here while they are ordinary; all others, and all limits, by the table.
    """
    data, end, table = machine.data, machine.end, TABLE
    memo, far, memo_limit = machine.memo, machine.far, machine.limits * limited.MAX_MEMO
    persistent = machine.persistent
    called, most_calls = machine.called, machine.limits * limited.MAX_CALLS
    room, marks, most = limited.MAX_STACK, machine.marks, limited.MAX_MARKS
    pos, before, frame_end, stack = machine.pos, machine.pos, machine.frame_end, machine.stack
    for _ in range(machine.limits * MAX_OPCODES):
        if frame_end and pos >= frame_end:
            machine.end_frame(pos, before)
            frame_end = 0
        if pos >= end:
            raise Reject("the pickle ends before STOP", pos)
        before, opcode = pos, data[pos]
        if opcode in _FREQUENT and len(stack) < room:
            if opcode == 0x72:  # LONG_BINPUT
                i = len(memo)
                if i < memo_limit and not far and stack and unpack_u32(data, pos + 1)[0] == i:
                    memo.append(stack[-1])
                    pos += 5
                    continue
            elif opcode == 0x68:  # BINGET
                i = data[pos + 1]
                if i < len(memo):
                    stack.append(memo[i])
                    pos += 2
                    continue
            elif opcode in (0x52, 0x81):  # REDUCE and NEWOBJ, of a name whose first call tells all
                if (
                    len(stack) > 1
                    and machine.ncalls < most_calls
                    and isinstance(args := stack[-1], tuple)
                    and id(stack[-2]) in called
                ):
                    stack.pop()
                    stack[-1] = Object("reduce" if opcode == 0x52 else "newobj", stack[-1], args)
                    machine.ncalls += 1
                    pos += 1
                    continue
            elif opcode == 0x4B:  # BININT1
                if data[pos + 2 : pos + 3] == b"K":  # many: a list of small numbers
                    last = min(frame_end or end, pos + 2 * (room - len(stack)))
                    if many := _INTEGERS.match(data, pos, last):
                        stack += data[pos + 1 : many.end() : 2]
                        pos = many.end()
                        before = pos - 2
                        continue
                stack.append(data[pos + 1])
                pos += 2
                continue
            elif opcode == 0x58:  # BINUNICODE
                stop = pos + 5 + unpack_u32(data, pos + 1)[0]
                raw = data[pos + 5 : stop]
                if stop <= end and raw.isascii():
                    stack.append(str(raw, "ascii"))
                    pos = stop
                    continue
            elif opcode == 0x28:  # MARK
                if len(marks) < most:
                    marks.append(stack)
                    stack = machine.stack = []
                    pos += 1
                    continue
            elif opcode == 0x51 and stack:  # BINPERSID
                stack[-1] = persistent(stack[-1])
                pos += 1
                continue
            elif opcode == 0x74:  # TUPLE
                if marks and len(marks[-1]) < room:
                    items = tuple(stack)
                    stack = machine.stack = marks.pop()
                    stack.append(items)
                    pos += 1
                    continue
            elif opcode == 0x86:  # TUPLE2
                if len(stack) > 1:
                    stack[-2:] = [(stack[-2], stack[-1])]
                    pos += 1
                    continue
            elif opcode == 0x4D:  # BININT2
                stack.append(unpack_u16(data, pos + 1)[0])
                pos += 3
                continue
            elif opcode == 0x29:  # EMPTY_TUPLE
                stack.append(())
                pos += 1
                continue
            elif opcode == 0x89:  # NEWFALSE
                stack.append(False)
                pos += 1
                continue
            elif opcode == 0x85:  # TUPLE1
                if stack:
                    stack[-1] = (stack[-1],)
                    pos += 1
                    continue
            elif opcode == 0x4A:  # BININT
                stack.append(unpack_i32(data, pos + 1)[0])
                pos += 5
                continue
            elif opcode == 0x6A:  # LONG_BINGET
                i = unpack_u32(data, pos + 1)[0]
                if i < len(memo):
                    stack.append(memo[i])
                    pos += 5
                    continue
            elif opcode == 0x7D:  # EMPTY_DICT
                stack.append(Dict())
                pos += 1
                continue
            elif opcode == 0x75:  # SETITEMS, of a dict
                if marks and marks[-1] and type(filled := marks[-1][-1]) is Dict and not len(stack) % 2:
                    filled.extend(zip(stack[::2], stack[1::2], strict=True))
                    stack = machine.stack = marks.pop()
                    pos += 1
                    continue
            elif (
                opcode == 0x62  # BUILD, of an object that was only made
                and len(stack) > 1
                and type(made := stack[-2]) is Object
                and not (made.has_state or made.items or made.pairs)
            ):
                machine.changed.append(made)
                made.state = stack.pop()
                pos += 1
                continue
        operation = table[opcode]
        if operation is None:
            raise Reject(f"opcode 0x{opcode:02x} is unknown or not allowed", pos)
        machine.pos = pos + 1
        if operation(machine) is STOP:
            return
        pos, frame_end, stack = machine.pos, machine.frame_end, machine.stack
    raise Reject(f"more than {MAX_OPCODES} opcodes", pos)
