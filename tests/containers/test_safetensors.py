"""safetensors: the library is the oracle for reading and for what we write; headers that lie are refused."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors import torch as oracle

from ckpttools.containers import jsons
from ckpttools.containers.safetensors import read_safetensors, safetensors_file
from ckpttools.errors import CkptError, UsageError
from ckpttools.execute import execute
from ckpttools.passes.read import load
from ckpttools.plan import OutputFile, Plan
from ckpttools.stores import files
from ckpttools.stores.links import plain_name
from ckpttools.tensors import BFLOAT16, BY_SAFETENSORS, DTYPES, FLOAT32, TensorRef, Zeros


def write(path: Path, tensors: dict[str, TensorRef], metadata: dict[str, str] | None = None) -> Path:
    file = safetensors_file(path.name, tensors, metadata or {})
    execute(Plan(files=(OutputFile(path="", segments=file.segments),)), path)
    return path


def some() -> dict[str, torch.Tensor]:
    bits = torch.arange(48, dtype=torch.uint8)
    made = {
        d.name: bits.view(getattr(torch, d.name)).clone() for d in BY_SAFETENSORS.values() if d.name != "bool"
    }
    return {
        **made,
        "bool": torch.tensor([True, False]),
        "0-d": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "odd": torch.arange(3, dtype=torch.int8),
        "é\n": torch.arange(6.0).reshape(2, 3),
    }


def test_what_the_library_writes(tmp_path: Path) -> None:
    tensors = some()
    path = tmp_path / "a.safetensors"
    oracle.save_file(tensors, path, metadata={"format": "pt", "é": "ü"})
    file = read_safetensors(path)
    assert file.metadata == {"format": "pt", "é": "ü"} and file.size == path.stat().st_size
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        ref = file.tensors[name]
        assert (ref.dtype.name, ref.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert load(ref).tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    oracle.save_file(some(), source, metadata={"format": "pt"})
    file = read_safetensors(source)
    ours = write(tmp_path / "b.safetensors", dict(file.tensors), dict(file.metadata))
    back = oracle.load_file(ours)
    for name, tensor in some().items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    with safe_open(ours, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    again = read_safetensors(ours)
    assert list(again.tensors) == sorted(file.tensors, key=lambda n: (-file.tensors[n].dtype.itemsize, n))
    for ref in again.tensors.values():
        assert all(chunk.start % ref.dtype.itemsize == 0 for chunk in ref.chunks)  # type: ignore[union-attr]


def test_no_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {})
    assert oracle.load_file(path) == {} and read_safetensors(path).tensors == {}


def test_casts(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    value = torch.randn(1000)
    oracle.save_file({"a": value}, source)
    file = safetensors_file("b", {"a": read_safetensors(source).tensors["a"].cast(BFLOAT16)}, {})
    execute(Plan(files=(OutputFile(path="", segments=file.segments),)), tmp_path / "b")
    assert oracle.load_file(tmp_path / "b")["a"].equal(value.to(torch.bfloat16))


def test_a_dtype_that_the_format_lacks() -> None:
    dtype = DTYPES["complex128"]
    with pytest.raises(CkptError, match="no complex128"):
        safetensors_file("a", {"a": TensorRef(dtype, (1,), (Zeros(16),))}, {})


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda n: n != "__metadata__")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        NAMES,
        st.tuples(st.sampled_from(list(BY_SAFETENSORS.values())), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=3),
)
def test_any_header_is_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, entries: dict, metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("h") / "a.safetensors"
    tensors = {}
    for name, (dtype, shape) in entries.items():
        nbytes = int(np.prod(shape)) * dtype.itemsize
        tensors[name] = TensorRef(dtype, tuple(shape), (Zeros(nbytes),) if nbytes else ())
    write(path, tensors, metadata)
    file = read_safetensors(path)
    assert {n: (r.dtype, r.shape) for n, r in file.tensors.items()} == {
        n: (r.dtype, r.shape) for n, r in tensors.items()
    }
    assert file.metadata == metadata
    with safe_open(path, "np") as opened:
        assert set(opened.keys()) == set(tensors)


@pytest.mark.parametrize("name", hostile.headers())
def test_headers_that_lie(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(hostile.headers()[name])
    with pytest.raises(CkptError) as caught:
        read_safetensors(path)
    assert str(caught.value).isprintable() and caught.value.where == str(path)


def test_we_refuse_what_the_library_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for data in hostile.headers().values():
        path.write_bytes(data)
        try:
            oracle.load_file(path)
        except (SafetensorError, OSError, ValueError, OverflowError, MemoryError):
            with pytest.raises(CkptError):
                read_safetensors(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    oracle.save_file({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int8)}, path)
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(CkptError):
            read_safetensors(path)


def test_every_flipped_bit_of_a_header_is_found_or_read_as_the_library_does(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    oracle.save_file({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int8)}, path)
    data = path.read_bytes()
    (nheader,) = struct.unpack_from("<Q", data)
    for at in range(8 + nheader):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                ours = read_safetensors(path)
            except CkptError:
                continue
            with safe_open(path, "pt") as opened:
                assert set(opened.keys()) == set(ours.tensors)


# --- JSON and files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"1", b"{", b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}', b'{"a": Infinity}',
     b'{"a": -Infinity}', b'{"a": 1}x', b'\xff{}',
     b'{"a":' * 40 + b"1" + b"}" * 40, b'{"a": "\\udfff"}', b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_json_that_is_refused(raw: bytes) -> None:
    with pytest.raises(CkptError) as caught:
        jsons.parse(Path("a"), raw)
    assert caught.value.id == "json-damaged"


def test_json_that_is_read() -> None:
    value = {"a": [1, 2.5, None, True, "é\U0001f600"], "b": {"c": {}}}
    assert jsons.parse(Path("a"), json.dumps(value).encode()) == value
    assert jsons.parse(Path("a"), b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_json_that_holds_the_name_of_a_file() -> None:
    """Python gives bytes that are not UTF-8 as halves of surrogate pairs, and writes them as they are."""
    value = {"best_model_checkpoint": os.fsdecode(b"/runs/\xe4/checkpoint-2")}
    assert jsons.parse(Path("a"), json.dumps(value).encode(), allow_nan=True) == value
    with pytest.raises(CkptError, match="surrogate"):
        jsons.parse(Path("a"), b'{"a": "\\ud8ff"}', allow_nan=True)


def test_json_of_any_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": 1}' + b" " * 1000)
    with pytest.raises(CkptError, match="limit"):
        jsons.read(path, 100)


def test_what_is_no_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "nowhere").symlink_to("nothing")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "lfs").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("socket")  # a socket's path may not be long
        for name in (
            "pipe",
            "folder",
            "loop",
            "zero",
            "nowhere",
            "empty",
            "lfs",
            "socket",
            "file/x",
            "a" * 300,
            "a\0b",
        ):
            with pytest.raises(CkptError), files.opened(tmp_path / name):
                pass
    for name in ("file", "loop", "nowhere", "a\0b", "a" * 300):
        with pytest.raises(UsageError):
            files.entries(tmp_path / name)


def test_reads_stay_within_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    with files.opened(path) as file:
        assert file.read(1, 3) == b"234" and file.read(5, 0) == b"" and file.head(100) == b"12345"
        for start, nbytes in ((-1, 1), (0, 6), (6, 0), (0, -1), (2**70, 1)):
            with pytest.raises(CkptError):
                file.read(start, nbytes)
        path.write_bytes(b"1")  # shortened while it is read
        with pytest.raises(CkptError):
            file.read(0, 5)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", "a\n", "\u202e", "a" * 256])
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(CkptError) as caught:
        plain_name(name, Path("index"))
    assert str(caught.value).isprintable()


def test_the_dtype_table_is_the_librarys() -> None:
    for dtype in BY_SAFETENSORS.values():
        data = oracle.save({"a": torch.zeros(1, dtype=getattr(torch, dtype.name))})
        assert json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])["a"]["dtype"] == dtype.safetensors
    assert FLOAT32.safetensors == "F32"


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("F4", [8], 4), ("F6_E2M3", [4], 3), ("F6_E3M2", [2, 2], 3)]
)
def test_elements_that_are_no_whole_bytes_are_not_damage(
    dtype: str, shape: list[int], nbytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "packed.safetensors"
    for size, id, code in ((nbytes, "dtype-not-read", 2), (nbytes + 1, "safetensors-header", 1)):
        header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
        if code == 2:
            with safe_open(path, "pt") as file:  # the library takes it
                assert list(file.keys()) == ["a"]
        with pytest.raises(CkptError) as refused:
            read_safetensors(path)
        assert (refused.value.id, refused.value.exit_code) == (id, code)


def test_no_notes_may_be_null(tmp_path: Path) -> None:
    header = json.dumps(
        {"__metadata__": None, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    path = tmp_path / "null.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["a"] and not file.metadata()
    assert read_safetensors(path).metadata == {}
