"""Builders of hostile checkpoints. Each makes its file or folder in `folder` and returns the path to open.

`PAYLOAD` would create the file `marker` if anything ever ran it.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

P = b"\x80\x02"
MARKER = "marker"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(module: str, name: str, *args: bytes) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def payloads(folder: Path) -> dict[str, bytes]:
    """Pickles that would run something when loaded; the value is a dict or whatever the call returns."""
    touch = text(f"touch {folder / MARKER}")
    code = text(f"open({str(folder / MARKER)!r}, 'w')")
    system = b"cos\nsystem\n"
    return {
        "reduce": P + call("os", "system", touch) + b".",
        "posix": P + call("posix", "system", touch) + b".",
        "eval": P + call("builtins", "eval", code) + b".",
        "python 2 eval": P + call("__builtin__", "eval", code) + b".",
        "exec": P + call("__builtin__", "exec", code) + b".",
        "popped": P + call("os", "system", touch) + b"0}.",
        "in a key": P + b"}" + call("os", "system", touch) + b"K\x01s.",
        "inst": P + b"(" + touch + b"ios\nsystem\n.",
        "obj": P + b"(" + system + touch + b"o.",
        "newobj": P + b"csubprocess\nPopen\n" + touch + b"\x85\x81.",
        "newobj_ex": b"\x80\x04csubprocess\nPopen\n" + touch + b"\x85}\x92.",
        "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93" + touch + b"\x85R.",
        "dotted": b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + touch + b"\x85R.",
        "getattr": P + b"c__builtin__\ngetattr\n(cos\npath\n" + text("os") + b"tR" + b"0}.",
        "getattr called": P
        + call("__builtin__", "getattr", b"ctorch\nhub\n", text("load"))
        + touch
        + b"\x85R.",
        "torch.load": P + call("torch", "load", touch) + b".",
        "torch.hub": P + call("torch.hub", "load", touch) + b".",
        "torch.jit": P + call("torch.jit", "load", touch) + b".",
        "nested load": P + call("torch.storage", "_load_from_bytes", text("x")) + b".",
        "pickle.loads": P + call("pickle", "loads", text("x")) + b".",
        "_pickle.loads": P + call("_pickle", "loads", text("x")) + b".",
        "numpy.load": P + call("numpy", "load", touch) + b".",
        "numpy runstring": P + call("numpy.testing._private.utils", "runstring", code, b"}") + b".",
        "pandas": P + call("pandas", "read_pickle", touch) + b".",
        "pandas deep": P + call("pandas.io.pickle", "read_pickle", touch) + b".",
        "joblib": P + call("joblib", "load", touch) + b".",
        "cloudpickle": P + call("cloudpickle.cloudpickle", "_make_function", code) + b".",
        "dill": P + call("dill._dill", "_create_function", code) + b".",
        "runpy": P + call("runpy", "run_path", touch) + b".",
        "webbrowser": P + call("webbrowser", "open", text("http://localhost/")) + b".",
        "import": P + call("importlib", "import_module", text("antigravity")) + b".",
        "from type": P
        + call("torch._tensor", "_rebuild_from_type_v2", system, b"ctorch\nTensor\n", touch + b"\x85", b"}")
        + b".",
        "from type after a good one": P
        + call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            b"ctorch._utils\n_rebuild_tensor\n",
            b"ctorch\nTensor\n",
            b")",
            b"}",
        )
        + b"0"
        + call("torch._tensor", "_rebuild_from_type_v2", system, b"ctorch\nTensor\n", touch + b"\x85", b"}")
        + b".",
        "numpy random": P + call("numpy.random._pickle", "__randomstate_ctor", touch, system) + b".",
        "numpy bit generator": P
        + call("numpy.random._pickle", "__bit_generator_ctor", b"csubprocess\nPopen\n")
        + b".",
        "reconstructor": P
        + call("copyreg", "_reconstructor", b"cargparse\nNamespace\n", b"csubprocess\nPopen\n", touch)
        + b".",
        "newobj function": P + call("copyreg", "__newobj__", b"csubprocess\nPopen\n", touch) + b".",
        "defaultdict": P + call("collections", "defaultdict", system) + b".",
        "partial": P + call("functools", "partial", system, touch) + b".",
        "map": P
        + call("__builtin__", "list", call("__builtin__", "map", system, b"(" + touch + b"l"))
        + b".",
        "type": P + call("__builtin__", "type", text("X"), b")", b"}") + b".",
        "attrgetter": P + call("operator", "attrgetter", text("system")) + b".",
        "codec": P + call("_codecs", "encode", text("x"), text("rot13")) + b".",
        "bytearray": P + call("__builtin__", "bytearray", b"\x8a\x05\x00\x00\x00\x00\x10") + b".",
        "fx graph": P + call("torch.fx.graph_module", "reduce_graph_module", b"}", code) + b".",
        "name with escapes": P + call("os\x1b[2J", "system", touch) + b".",
        "called number": P + b"K\x05" + touch + b"\x85R.",
        # nothing is called: importing is enough, or what is held is called by somebody else
        "imported": P + b"cpip\nmain\n0}.",
        "imported from Python": P + b"cantigravity\nfly\n0}.",
        "imported as a value": P + b"}" + text("x") + b"cthis\ns\ns.",
        "imported for nothing": P + b"csome_library.setup\nX\n0}.",
        "called for nothing": P + call("some_library.setup", "X") + b"0}.",
        "a program of torch": P + b"ctorch.utils.bottleneck.__main__\nmain\n0}.",
        "held": P + b"}" + text("x") + system + b"s.",
        "given to a class": P + call("some_library", "Callback", system, touch) + b".",
        "partial called": P + call("functools", "partial", b"csome_library\nX\n") + b")R.",
        # attributes and items
        "class by state": P
        + call("argparse", "Namespace")
        + b"N}"
        + text("__class__")
        + b"csome_library\nX\ns\x86b.",
        "class of a tensor": P
        + call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            b"ctorch._utils\n_rebuild_tensor\n",
            b"ctorch\nTensor\n",
            b")",
            b"}" + text("__class__") + b"csome_library\nX\ns",
        )
        + b".",
        "class of a parameter": P
        + call(
            "torch._utils",
            "_rebuild_parameter_with_state",
            b"N",
            b"\x88",
            b"}",
            b"}" + text("__class__") + b"Ns",
        )
        + b".",
        "item of a tensor": P + call("torch._utils", "_rebuild_tensor_v2", b"N") + b"K\x00K\x01s.",
        "state of a tensor": P + call("torch._utils", "_rebuild_tensor_v2", b"N") + b"}b.",
    }


def damaged_pickles() -> dict[str, bytes]:
    """Pickles that nobody should load, for other reasons."""
    shared = [P, b"](K\x01K\x01eq\x00"]
    for i in range(100):
        shared.append(b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]))
    state = P + b"cargparse\nNamespace\n)R}" + text("append") + b"cos\nsystem\nsb" + text("id") + b"a."
    key = text("state_dict")
    return {
        "dag": b"".join(shared) + b".",
        "dag as weights": P + b"}" + key + b"".join(shared)[2:] + b"s.",
        "dag as scheduler": P + b"}" + text("lr_scheduler") + b"".join(shared)[2:] + b"s.",
        "deep": P + b"]" * 100_000 + b"a" * 99_999 + b".",
        "marks": P + b"(" * 100_000 + b".",
        "dups": P + b"](N" + b"2" * 1_000_000 + b"e.",
        "itself": P + b"}q\x00" + key + b"h\x00s.",
        "big int": P + b"\x8b" + struct.pack("<i", 20_000) + bytes(20_000) + b".",
        "long text": P + b"\x8d" + struct.pack("<Q", 2**62) + b".",
        "ext": P + b"\x82\x01.",
        "second pickle": P + b"}." + P + call("os", "system", text("id")) + b".",
        "method in state": state,
        "huge counters": P + b"}" + text("epoch") + b"\x8a\x80" + b"\x7f" * 128 + b"s.",
        "bidi names": P + b"}" + text("\u202egnp.exe\x1b[31m\n") + b"K\x01s.",
        "surrogates": P + b"}X\x03\x00\x00\x00\xed\xa0\x80K\x01s.",
        "empty": b"",
        "pushed and popped": P + b"N0" * 100_000 + b"N.",
        "marked and popped": P + b"(NN1" * 100_000 + b"N.",
    }


def archives(folder: Path) -> dict[str, Callable[[], Path]]:
    """Archives that torch runs as a program, or that hold more than records."""
    path = folder / "a.pt"

    def with_member(name: str, mode: int) -> Path:
        torch_zip(path, P + b"}.")
        with zipfile.ZipFile(path, "a") as archive:
            member = zipfile.ZipInfo(f"r/{name}")
            member.external_attr = mode << 16
            archive.writestr(member, b"/etc/passwd")
        return path

    return {
        "script": lambda: torch_zip(path, P + b"}.", {"constants.pkl": P + b").", "code/a.py": b"1"}),
        "script without code": lambda: torch_zip(path, P + b"}.", {"constants.pkl": P + b")."}),
        "link": lambda: with_member("data/0", 0o120777),
        "link beside": lambda: with_member("x", 0o120777),
        "device": lambda: with_member("x", 0o020666),
    }


def torch_zip(path: Path, pickle: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("r/data.pkl", pickle)
        archive.writestr("r/version", b"3\n")
        for name, data in (records or {}).items():
            archive.writestr(f"r/{name}", data)
    return path


LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03."
SYSTEM = P + b"}" + text("little_endian") + b"\x88s."


def torch_files(folder: Path) -> dict[str, Callable[[], Path]]:
    """One file per hostile pickle, in both serializations."""
    made: dict[str, Callable[[], Path]] = {}
    for name, pickle in {**payloads(folder), **damaged_pickles()}.items():
        made[f"zip: {name}"] = lambda pickle=pickle: torch_zip(folder / "a.pt", pickle)  # type: ignore[misc]
        made[f"legacy: {name}"] = lambda pickle=pickle: written(  # type: ignore[misc]
            folder / "a.pt", LEGACY + SYSTEM + pickle + P + b"]."
        )
    return made


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def safetensors(header: bytes, data: bytes = b"", nbytes: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if nbytes is None else nbytes) + header + data


def entry(**fields: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}


def headers() -> dict[str, bytes]:
    """Safetensors files whose header lies."""

    def one(**fields: object) -> bytes:
        return safetensors(json.dumps({"a": entry(**fields)}).encode(), bytes(8))

    def two(a: tuple[int, int], b: tuple[int, int]) -> bytes:
        header = {"a": entry(data_offsets=a), "b": entry(data_offsets=b)}
        return safetensors(json.dumps(header).encode(), bytes(16))

    return {
        "no header": b"\x05\0\0",
        "header past the end": safetensors(b"{}", nbytes=100),
        "header of 2**63": safetensors(b"{}", nbytes=2**63),
        "header over the limit": safetensors(b"{}", nbytes=100_000_001),
        "empty header": safetensors(b""),
        "a list": safetensors(b"[]"),
        "leading blank": safetensors(b" {}"),
        "not JSON": safetensors(b"{"),
        "not UTF-8": safetensors(b'{"\xff": 1}'),
        "NaN": safetensors(b'{"a": NaN}'),
        "duplicate tensor": safetensors(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],'
            b'"data_offsets":[0,8]}}',
            bytes(8),
        ),
        "duplicate field": safetensors(
            b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
        ),
        "deep": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "long number": safetensors(b'{"a": ' + b"9" * 100_000 + b"}"),
        "many values": safetensors(b'{"a": [' + b"0," * 5_000_000 + b"0]}"),
        "half a surrogate": safetensors(
            b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
        ),
        "metadata list": safetensors(b'{"__metadata__": []}'),
        "metadata of ints": safetensors(b'{"__metadata__": {"a": 1}}'),
        "unknown dtype": one(dtype="F99"),
        "dtype is a list": one(dtype=["F32"]),
        "other dtype": one(dtype="F64"),
        "no shape": safetensors(b'{"a": {"dtype": "F32", "data_offsets": [0, 8]}}', bytes(8)),
        "more fields": one(extra=1),
        "negative shape": one(shape=[-2]),
        "float shape": one(shape=[2.0]),
        "bool shape": one(shape=[True, 2]),
        "text shape": one(shape="2"),
        "overflowing shape": one(shape=[2**40, 2**40, 0]) + b"x",
        "huge shape": one(shape=[2**62, 4]),
        "1,000 dimensions": one(shape=[1] * 999 + [2]),
        "offsets reversed": one(data_offsets=[8, 0]),
        "offsets negative": one(data_offsets=[-8, 0]),
        "offsets past the end": one(data_offsets=[8, 16]),
        "three offsets": one(data_offsets=[0, 4, 8]),
        "offsets huge": one(data_offsets=[0, 2**70]),
        "overlap": two((0, 8), (4, 12)),
        "gap": two((0, 8), (12, 20)),
        "same range": two((0, 8), (0, 8)),
        "appended": one() + b"x",
        "cut": one()[:-1],
        "entry is a number": safetensors(b'{"a": 1}'),
    }


GOOD = safetensors(json.dumps({"w": entry()}).encode(), bytes(8))


def folders(folder: Path) -> dict[str, Callable[[], Path]]:
    """Folders that lead elsewhere, or whose files are no files."""

    def put(name: str, data: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def index(shard: object, **more: object) -> Path:
        put("model.safetensors.index.json", json.dumps({"weight_map": {"w": shard}, **more}).encode())
        return folder

    def indexed(raw: bytes) -> Path:
        put("model.safetensors.index.json", raw)
        return folder

    def shard(make: Callable[[Path], object]) -> Path:
        make(folder / "a.safetensors")
        return index("a.safetensors")

    def outside(name: str) -> Path:
        """A readable safetensors file, text or folder of the machine, which nobody named."""
        path = folder.parent / f"outside-{name}"
        if name == "global_step1":
            path.mkdir(exist_ok=True)
            (path / "mp_rank_00_model_states.pt").write_bytes(b"PK")
        else:
            path.write_bytes(GOOD if name.endswith(".safetensors") else b"global_step1")
        return path

    def linked(name: str, make: Callable[[], Path] | None = None) -> Path:
        made = make() if make else folder
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside(name))
        return made

    def latest(raw: bytes) -> Path:
        put("latest", raw)
        put("zero_to_fp32.py", f"open({str(folder / MARKER)!r}, 'w')".encode())
        return folder

    def tag() -> Path:
        for name, data in payloads(folder).items():
            if name == "reduce":
                (folder / "global_step1").mkdir()
                for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
                    torch_zip(folder / "global_step1" / file, data)
        return latest(b"global_step1")

    return {
        "shard with a path": lambda: index("../../etc/passwd"),
        "absolute shard": lambda: index("/etc/passwd"),
        "shard with NUL": lambda: index("a\0b"),
        "shard with newline": lambda: index("a\nb"),
        "shard is a number": lambda: index(1),
        "shard is missing": lambda: index("b.safetensors"),
        "shard of dots": lambda: index(".."),
        "long shard name": lambda: index("a" * 5000),
        "shard is a folder": lambda: shard(lambda p: p.mkdir()),
        "shard is a pipe": lambda: shard(os.mkfifo),
        "shard is a device": lambda: shard(lambda p: p.symlink_to("/dev/zero")),
        "shard is a loop": lambda: shard(lambda p: p.symlink_to(p)),
        "shard is a link out": lambda: linked("a.safetensors", lambda: index("a.safetensors")),
        "model is a link out": lambda: linked("model.safetensors"),
        "latest is a link out": lambda: linked("latest", tag),
        "tag is a link out": lambda: linked("global_step1", lambda: latest(b"global_step1")),
        "all is a link out": lambda: linked("global_step1"),
        "shard leads nowhere": lambda: shard(lambda p: p.symlink_to("nowhere")),
        "index is a list": lambda: indexed(b"[]"),
        "index is deep": lambda: indexed(b'{"weight_map":' + b"[" * 100_000),
        "index repeats": lambda: indexed(b'{"weight_map": {"w": "a"}, "weight_map": {"w": "b"}}'),
        "index is huge": lambda: indexed(b'{"weight_map": {"w": [' + b"[]," * 3_000_000 + b"[]]}}"),
        "latest with a path": lambda: latest(b"../outside"),
        "latest is absolute": lambda: latest(b"/etc"),
        "latest with NUL": lambda: latest(b"a\0b"),
        "latest is long": lambda: latest(b"a" * 100_000),
        "latest is binary": lambda: latest(bytes(range(256))),
        "latest is missing": lambda: latest(b"global_step9"),
        "hostile tag": tag,
    }


def samples(folder: Path) -> dict[str, Callable[[], Path]]:
    """Every sample by name; each builder makes it in `folder`, which must be empty."""
    single = {
        f"safetensors: {name}": (lambda data=data: written(folder / "a.safetensors", data))
        for name, data in headers().items()
    }
    made = {f"archive: {name}": make for name, make in archives(folder).items()}
    made |= {f"folder: {name}": make for name, make in folders(folder).items()}
    return {**torch_files(folder), **single, **made}
