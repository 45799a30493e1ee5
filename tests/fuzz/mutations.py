"""Mutations that know the format: opcodes and trees of pickles, fields of zips, values of JSON, and bytes."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from random import Random

from ckpttools.containers.archive import layout
from ckpttools.containers.pickles import Dict, Global, Node, Object, Reject, dumps, loads, walk

INTS = (
    0, 1, -1, 2, 3, 7, 64, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63), 10**30,
)  # fmt: skip
TEXTS = (
    "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "\0", "a\nb", "\u202e", "\x1b[2J", "x" * 300, "-1",
    "0", "1e999", "nan", "storage", "cpu", "é", "model.safetensors", "global_step9", "module", "optimizer",
)  # fmt: skip
GLOBALS = (
    Global("torch", "FloatStorage"), Global("torch", "BFloat16Storage"), Global("torch", "float32"),
    Global("torch", "LongStorage"), Global("torch._utils", "_rebuild_tensor_v2"), Global("os", "system"),
    Global("collections", "OrderedDict"), Global("builtins", "getattr"), Global("torch", "Size"),
)  # fmt: skip


def interesting(rng: Random, value: int = 0) -> int:
    return rng.choice((rng.choice(INTS), value + 1, value - 1, value * 2, -value, rng.randrange(1 << 16)))


# --- bytes --------------------------------------------------------------------------------------------


def of_bytes(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """One to four small edits anywhere; `other` is where spliced bytes come from."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        n = rng.choice((1, 1, 2, 4, 8, rng.randint(1, 200)))
        match rng.randrange(9):
            case 0 | 1 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 2:
                raw[at : at + 1] = rng.randbytes(1)
            case 3:
                del raw[at : at + n]
            case 4:
                raw[at:at] = rng.randbytes(min(n, 16))
            case 5:
                raw[at:at] = raw[at : at + n]
            case 6:
                source = other or data
                start = rng.randrange(len(source) + 1)
                raw[at : at + n] = source[start : start + n]
            case 7:
                form = rng.choice("BHIQ")
                packed = struct.pack("<Q", interesting(rng) % 2**64)[: struct.calcsize(form)]
                raw[at : at + len(packed)] = packed
            case _ if rng.random() < 0.3:
                del raw[at:]
    return bytes(raw)


# --- pickles ------------------------------------------------------------------------------------------


def opcodes(data: bytes) -> list[bytes]:
    """The pickle cut into its opcodes."""
    starts = [at for _, _, at in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def _argument(op: bytes, rng: Random) -> bytes:
    """The same opcode with another argument: a length or number that lies, or another text."""
    info = pickletools.code2op.get(op[:1].decode("latin1"))
    if info is None or info.arg is None:
        return op
    body = op[1:]
    widths = {1: 1, 2: 2, 4: 4, 8: 8}
    if info.arg.n in widths:
        return op[:1] + struct.pack("<Q", interesting(rng, body[0]) % 2**64)[: info.arg.n]
    if info.arg.n == pickletools.UP_TO_NEWLINE:
        lines = body.split(b"\n")
        lines[rng.randrange(len(lines))] = rng.choice((b"", b"0", b"-1", b"9" * 5000, b"os", b"'", b"\xff"))
        return op[:1] + b"\n".join(lines)
    width = {pickletools.TAKEN_FROM_ARGUMENT1: 1}.get(info.arg.n, 8 if "8" in info.name else 4)
    if rng.random() < 0.5:  # the length lies
        return op[:1] + struct.pack("<Q", interesting(rng, len(body)) % 2**64)[:width] + body[width:]
    text = rng.choice(TEXTS).encode()[: 255 if width == 1 else None]
    return op[:1] + struct.pack("<Q", len(text))[:width] + text


def _some_opcode(rng: Random) -> bytes:
    info = rng.choice(pickletools.opcodes)
    op = info.code.encode("latin1")
    if info.arg is None:
        return op
    if info.arg.n > 0:
        return op + rng.randbytes(info.arg.n)
    if info.arg.n == pickletools.UP_TO_NEWLINE:
        return op + rng.choice((b"1\n", b"a\nb\n", b"'x'\n", b"os\nsystem\n"))
    return _argument(op + bytes(8), rng)


def of_opcodes(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Opcodes deleted, doubled, swapped, given other arguments, inserted, or spliced from other pickles."""
    ops = opcodes(data)
    for _ in range(rng.randint(1, 4)):
        at, to = rng.randrange(len(ops)), rng.randrange(len(ops))
        n = rng.choice((1, 1, 2, rng.randint(1, 20)))
        match rng.randrange(8):
            case 0:
                del ops[at : at + n]
            case 1:
                ops[at:at] = ops[at : at + n]
            case 2:
                ops[at], ops[to] = ops[to], ops[at]
            case 3 | 4:
                ops[at] = _argument(ops[at], rng)
            case 5:
                ops.insert(at, _some_opcode(rng))
            case 6 if others:
                source = opcodes(rng.choice(others))
                start = rng.randrange(len(source))
                ops[at : at + rng.randrange(2) * n] = source[start : start + n]
            case _:
                ops[at] = _some_opcode(rng)
        if not ops:
            return b""
    return b"".join(ops)


def _slots(value: Node) -> list[tuple[Callable[[], Node], Callable[[Node], None]]]:
    """Every place of the tree that holds a value: how to read it and how to put another there."""
    out: list[tuple[Callable[[], Node], Callable[[Node], None]]] = []

    def item(box: list[Node], i: int) -> None:
        out.append((lambda: box[i], lambda new: box.__setitem__(i, new)))

    for node in walk(value):
        if isinstance(node, list):
            for i in range(len(node)):
                item(node, i)
        elif isinstance(node, Dict | Object):
            for i, (key, old) in enumerate(node.pairs):
                pairs = node.pairs

                def put(new: Node, i: int = i, key: Node = key, pairs: list = pairs) -> None:  # type: ignore[type-arg]
                    if i < len(pairs):
                        pairs[i] = (key, new)

                out.append((lambda old=old: old, put))  # type: ignore[misc]
            if isinstance(node, Object):
                for i, arg in enumerate(node.args):

                    def put_arg(new: Node, i: int = i, node: Object = node) -> None:
                        node.args = (*node.args[:i], new, *node.args[i + 1 :])

                    out.append((lambda arg=arg: arg, put_arg))  # type: ignore[misc]
                if node.has_state:
                    out.append((lambda node=node: node.state, lambda new, node=node: _state(node, new)))  # type: ignore[misc]
    return out


def _state(node: Object, new: Node) -> None:
    node.state = new


def _another(old: Node, rng: Random, all_values: Callable[[], Node]) -> Node:
    match rng.randrange(10):
        case 0 | 1 | 2 if isinstance(old, int):
            return interesting(rng, int(old))
        case 0 | 1 if isinstance(old, str):
            return rng.choice((rng.choice(TEXTS), old + "x", old[:-1], old.upper()))
        case 0 | 1 if isinstance(old, tuple) and old:
            i = rng.randrange(len(old))
            return rng.choice(
                ((*old[:i], _another(old[i], rng, all_values), *old[i + 1 :]), old[:i], (*old, old[i]))
            )
        case 3 | 4:
            return all_values()
        case 5:
            return rng.choice((None, True, False, 0.5, float("nan"), float("inf"), -1.0, 1e300, b"x"))
        case 6:
            return interesting(rng)
        case 7:
            return rng.choice(TEXTS)
        case 8:
            return rng.choice(([], (), Dict(), [old], (old,), Dict.of([("a", old)]), [old] * 3))
        case _:
            return rng.choice(GLOBALS)


def of_tree(data: bytes, rng: Random) -> bytes:
    """Values replaced, dropped, doubled and moved in the tree that a pickle describes; it stays a pickle."""
    value = loads(data).value
    for _ in range(rng.randint(1, 3)):
        slots = _slots(value)
        if not slots:
            break
        read, put = rng.choice(slots)
        containers = [n for n in walk(value) if isinstance(n, list | Dict | Object)]
        box = rng.choice(containers)
        pairs: list[object] = box if isinstance(box, list) else box.pairs  # type: ignore[assignment]
        match rng.randrange(8):
            case 0 if pairs:
                del pairs[rng.randrange(len(pairs))]
            case 1 if pairs:
                pairs.insert(rng.randrange(len(pairs)), rng.choice(pairs))
            case 2 if pairs:
                rng.shuffle(pairs)
            case 3 if isinstance(box, Dict | Object) and box.pairs:
                i = rng.randrange(len(box.pairs))
                key, held = box.pairs[i]
                box.pairs[i] = (_another(key, rng, lambda: 0), held)
            case _:
                put(_another(read(), rng, lambda slots=slots: rng.choice(slots)[0]()))  # type: ignore[misc]
    try:
        return dumps(value)
    except Reject:  # a cycle that no pickle can express
        return of_bytes(data, rng)


def of_pickle(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    match rng.randrange(6):
        case 0:
            return of_bytes(data, rng, rng.choice(others) if others else b"")
        case 1 | 2 | 3:
            return of_tree(data, rng)
        case _:
            return of_opcodes(data, rng, others)


# --- zip ----------------------------------------------------------------------------------------------

_HEADERS = {
    b"PK\x03\x04": layout.LOCAL,
    b"PK\x01\x02": layout.CENTRAL,
    b"PK\x05\x06": layout.END,
    b"PK\x06\x06": layout.END64,
    b"PK\x06\x07": layout.LOCATOR64,
    b"PK\x07\x08": struct.Struct("<IIQQ"),
}


def _found(data: bytes, magic: bytes) -> list[int]:
    out, at = [], data.find(magic)
    while at >= 0:
        out.append(at)
        at = data.find(magic, at + 1)
    return out


def _field(data: bytes, rng: Random) -> bytes:
    """One field of one header gets another value."""
    magic = rng.choice(list(_HEADERS))
    form = _HEADERS[magic]
    places = [at for at in _found(data, magic) if at + form.size <= len(data)]
    if not places:
        return of_bytes(data, rng)
    at = rng.choice(places)
    codes = form.format.lstrip("<")
    values = list(form.unpack_from(data, at))
    i = rng.randrange(0 if rng.random() < 0.05 else 1, len(values))
    bits = 8 * struct.calcsize("<" + codes[i])
    values[i] = interesting(rng, values[i]) % 2**bits
    raw = bytearray(data)
    form.pack_into(raw, at, *values)
    return bytes(raw)


def repacked(data: bytes, rng: Random | None, **changes: bytes) -> bytes:
    """The same records (by their name without the root), some changed, with right checksums.

    With `rng`, records are also dropped, doubled, renamed, reordered or deflated.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
    records = [(name, changes.get(name.partition("/")[2], raw)) for name, raw in records]
    method = zipfile.ZIP_STORED
    if rng is not None:
        i = rng.randrange(len(records))
        name, raw = records[i]
        match rng.randrange(8):
            case 0:
                del records[i]
            case 1:
                records.insert(i, (rng.choice((name, name.upper(), name + "0")), raw))
            case 2:
                records[i] = (rng.choice((rng.choice(TEXTS), "r/" + rng.choice(TEXTS), "other/x")), raw)
            case 3:
                rng.shuffle(records)
            case 4:
                method = zipfile.ZIP_DEFLATED
            case 5:
                records[i] = (name, of_bytes(raw, rng))
            case 6:
                records[i] = (name, raw[: len(raw) // 2])
            case _:
                records[i] = (name, rng.choice(records)[1])
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as new:
        warnings.simplefilter("ignore")  # doubled names are meant
        for name, raw in records:
            new.writestr(zipfile.ZipInfo(name.replace("\0", "_") or "_"), raw, method)
    return out.getvalue()


def record(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        return next(old.read(i) for i in old.infolist() if i.filename.partition("/")[2] == name)


def of_zip(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """A torch file: bytes, header fields, whole records, or the pickle inside with a right checksum."""
    match rng.randrange(8):
        case 0:
            return of_bytes(data, rng, rng.choice(others) if others else b"")
        case 1:
            return _field(_field(data, rng), rng) if rng.random() < 0.3 else _field(data, rng)
        case 2:
            return repacked(data, rng)
        case 3 | 4 | 5:
            return repacked(data, None, **{"data.pkl": of_tree(_pickle_of(data), rng)})
        case _:
            pickles = [_pickle_of(other) for other in others]
            return repacked(data, None, **{"data.pkl": of_pickle(_pickle_of(data), rng, pickles)})


@cache
def _pickle_of(data: bytes) -> bytes:
    return record(data, "data.pkl")


# --- legacy torch files -------------------------------------------------------------------------------


@cache
def legacy_parts(data: bytes) -> tuple[tuple[bytes, ...], bytes]:
    """The five pickles, and the storages behind them."""
    parts, at = [], 0
    for _ in range(5):
        end = loads(data, start=at, exact=False).end
        parts.append(data[at:end])
        at = end
    return tuple(parts), data[at:]


def of_legacy(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    if rng.random() < 0.2:
        return of_bytes(data, rng)
    parts, tail = legacy_parts(data)
    pickles = list(parts)
    match rng.randrange(8):
        case 0:
            tail = of_bytes(tail, rng)
        case 1:
            tail = struct.pack("<Q", interesting(rng) % 2**64) + tail[8:]
        case 2:
            i = rng.randrange(5)
            pickles[i] = rng.choice(pickles)
        case 3:
            del pickles[rng.randrange(5)]
        case 4:
            i = rng.choice((2, 4))
            pickles[i] = of_pickle(pickles[i], rng, others)
        case _:
            pickles[3] = of_pickle(pickles[3], rng, others)
    return b"".join(pickles) + tail


# --- JSON ---------------------------------------------------------------------------------------------


def _json_slots(value: object) -> list[tuple[object, object]]:
    """(container, key or index) of every value."""
    out: list[tuple[object, object]] = []
    todo = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            out += [(node, key) for key in node]
            todo += node.values()
        elif isinstance(node, list):
            out += [(node, i) for i in range(len(node))]
            todo += node
    return out


def _json_value(old: object, rng: Random, root: object) -> object:
    match rng.randrange(9):
        case 0 | 1 | 2 if isinstance(old, int):
            return interesting(rng, old)
        case 0 | 1 if isinstance(old, str):
            return rng.choice((rng.choice(TEXTS), old + "x", old[:-1], old.upper()))
        case 0 | 1 if isinstance(old, list) and old:
            return rng.choice((old[:-1], old[::-1], [*old, old[0]], old * 40))
        case 3:
            return rng.choice((None, True, False, 0.5, 1e300, -0.0, float("nan"), float("inf")))
        case 4:
            return rng.choice(TEXTS)
        case 5:
            return rng.choice(([], {}, [old], {"a": old}, [[]], {"": {}}))
        case 6:
            box, key = rng.choice(_json_slots(root))
            return box[key]  # type: ignore[index]
        case _:
            return interesting(rng)


def of_json(data: bytes, rng: Random) -> bytes:
    """Values, keys and structure of the document, or its bytes."""
    if rng.random() < 0.2:
        return of_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        slots = _json_slots(value)
        if not slots:
            break
        box, key = rng.choice(slots)
        assert isinstance(box, dict | list)
        match rng.randrange(8):
            case 0:
                del box[key]  # type: ignore[arg-type]
            case 1 if isinstance(box, dict):
                box[rng.choice(TEXTS)] = box.pop(key)
            case 2 if isinstance(box, dict):
                box[rng.choice(TEXTS)] = box[key]
            case _:
                box[key] = _json_value(box[key], rng, value)  # type: ignore[index]
        try:
            raw = json.dumps(value)
        except ValueError:  # it holds itself now
            return of_bytes(data, rng)
        value = json.loads(raw)
    match rng.randrange(12):
        case 0:
            raw = raw.replace(",", ",,", 1)
        case 1:
            at = raw.rfind("{")
            raw = (
                raw[: at + 1]
                + rng.choice(('"a":1,"a":1,', '"\\ud800":1,', "1:1,", '"x":NaN,'))
                + raw[at + 1 :]
            )
        case 2:
            raw = raw.replace("1", "9" * rng.choice((20, 5000)), 1)
        case 3:
            raw = "[" * rng.choice((1, 40, 5000)) + raw
    return raw.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-16")), "replace")


def of_safetensors(data: bytes, rng: Random) -> bytes:
    (n,) = struct.unpack_from("<Q", data)
    header, tensors = data[8 : 8 + n], data[8 + n :]
    match rng.randrange(8):
        case 0:
            return of_bytes(data, rng)
        case 1:
            return struct.pack("<Q", interesting(rng, n) % 2**64) + data[8:]
        case 2:
            header = header + b" " * rng.choice((1, 7, 8))
        case 3:
            tensors = of_bytes(tensors, rng)
        case _:
            header = of_json(header, rng)
    return struct.pack("<Q", len(header)) + header + tensors


def of_latest(data: bytes, rng: Random) -> bytes:
    match rng.randrange(4):
        case 0:
            return of_bytes(data, rng)
        case 1:
            return rng.choice(TEXTS).encode()
        case 2:
            return data + rng.choice((b"\n", b"\r\n", b"\0", b" ", b"/", b"/..", b"\xef\xbb\xbf", data))
        case _:
            return rng.choice((b"../", b"./", b"\xff", b" ", b"/")) + data
