"""Files of torch.save: torch is the oracle for reading, and for what we write."""

from __future__ import annotations

import collections
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from work import at_most

from ckpttools.containers import torch_file
from ckpttools.containers.archive import read_archive, unexplained
from ckpttools.containers.pickles import Dict, Global, Node, Object, Persistent, dumps, plain, walk
from ckpttools.containers.torch_file import read_torch_file, scalar, tensor_node, write_torch_file
from ckpttools.containers.torch_file.legacy import LEGACY_MAGIC, LEGACY_PROTOCOL
from ckpttools.errors import CkptError
from ckpttools.execute import execute
from ckpttools.passes.read import Reader
from ckpttools.plan import OutputFile, Plan
from ckpttools.stores.files import opened
from ckpttools.tensors import DTYPES, FLOAT32, TensorRef, Zeros

KINDS = {"zip": {}, "zip 4": {"pickle_protocol": 4}, "legacy": {"_use_new_zipfile_serialization": False}}


def raw(ref: TensorRef) -> bytes:
    out = bytearray(ref.nbytes)
    with Reader() as reader:
        reader.fill(memoryview(out), ref.chunks)
    return bytes(out)


def raw_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def copy(path: Path, out: Path, value: Node = None) -> Path:
    """Read, write and check a file: the value unchanged unless another is given."""
    file = read_torch_file(path)
    target = out / path.name
    written = write_torch_file(path.name, file.value if value is None else value)
    execute(Plan(files=(OutputFile(path="", segments=written.segments),)), target, force=True)
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        assert all(_data_start(target, info) % 64 == 0 for info in archive.infolist())
    with opened(target) as opened_file:
        assert unexplained(opened_file, read_archive(opened_file)) == []
    torch.load(target, mmap=True, weights_only=False)
    return target


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    head = path.read_bytes()[info.header_offset : info.header_offset + 30]
    nname, nextra = struct.unpack_from("<HH", head, 26)
    return info.header_offset + 30 + int(nname) + int(nextra)


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
            return False
        if a.layout != torch.strided:
            return equal(a.to_dense(), b.to_dense())
        if a.is_quantized:
            return a.qscheme() == b.qscheme() and equal(a.int_repr(), b.int_repr())
        return a.stride() == b.stride() and raw_of(a) == raw_of(b) and a.requires_grad == b.requires_grad
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


# --- reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(tmp_path: Path, name: str, kind: str) -> None:
    dtype = getattr(torch, name)
    bits = torch.arange(240, dtype=torch.uint8)
    bits = bits % 2 if dtype is torch.bool else bits
    value = {
        "a": bits.view(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "scalar": bits.view(dtype)[1].clone(),
    }
    path = tmp_path / "a.pt"
    torch.save(value, path, **KINDS[kind])
    file = read_torch_file(path)
    assert isinstance(file.value, Dict)
    for key, tensor in value.items():
        view = file.view(file.value.get(key))
        assert view is not None
        assert (view.dtype.name, view.shape) == (name, tuple(tensor.shape))
        assert raw(view.ref) == raw_of(tensor)
    (tmp_path / "out").mkdir()
    again = torch.load(copy(path, tmp_path / "out"))
    assert equal(again, value)


def shapes() -> dict[str, torch.Tensor]:
    base = torch.arange(120.0).reshape(2, 3, 4, 5)
    long = torch.arange(10_000)
    return {
        "0-d": torch.tensor(3.5),
        "plain": base,
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(3, 1, 0, 2),
        "every second": base[:, ::2, 1:3],
        "expanded": torch.arange(3.0).reshape(3, 1).expand(3, 4),
        "expanded from one": torch.ones(1).expand(5, 5),
        "channels last": base.to(memory_format=torch.channels_last),
        "a row": base[1, 2, 3],
        "of a long storage": long[5000:5010],
        "overlapping": torch.arange(10).as_strided((4, 3), (2, 1), 1),
        "diagonal": torch.arange(25.0).reshape(5, 5).diagonal(),
        "empty": torch.zeros(2, 0, 3),
        "empty view": long[5:5],
        "ones in shape": base[:1, :, :1],
        "flipped bits": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_views(tmp_path: Path, kind: str) -> None:
    value = shapes()
    path = tmp_path / "views.pt"
    torch.save(value, path, **KINDS[kind])
    file = read_torch_file(path)
    assert isinstance(file.value, Dict)
    for key, tensor in value.items():
        view = file.view(file.value.get(key))
        assert view is not None, key
        assert view.shape == tuple(tensor.shape) and view.strides == tensor.stride(), key
        assert raw(view.ref) == raw_of(tensor), key
        if view.ref.numel > 1:
            part = view.ref.flat(1, view.ref.numel - 1)
            assert raw(part) == raw_of(tensor)[view.dtype.itemsize :], key
    (tmp_path / "out").mkdir()
    assert equal(torch.load(copy(path, tmp_path / "out")), value)


@pytest.mark.parametrize("kind", KINDS)
def test_sharing_is_kept(tmp_path: Path, kind: str) -> None:
    base = torch.arange(12.0)
    param = torch.nn.Parameter(torch.ones(3))
    value = {
        "base": base,
        "view": base[3:6],
        "reshaped": base.reshape(3, 4),
        "same": base,
        "param": param,
        "tied": param,
        "data": param.data,
        "other": base.clone(),
    }
    path = tmp_path / "shared.pt"
    torch.save(value, path, **KINDS[kind])
    file = read_torch_file(path)
    assert len(file.storages) == 3
    (tmp_path / "out").mkdir()
    back = torch.load(copy(path, tmp_path / "out"))
    assert equal(back, value)
    assert back["base"] is back["same"] and back["param"] is back["tied"]
    assert storage_of(back["base"]) == storage_of(back["reshaped"])
    assert back["view"].data_ptr() == back["base"].data_ptr() + 12
    assert storage_of(back["param"]) == storage_of(back["data"])
    assert isinstance(back["param"], torch.nn.Parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_shown_as_data(tmp_path: Path, kind: str) -> None:
    value: dict[str, Any] = {
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.quint8),
        "per channel": torch.quantize_per_channel(
            torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
        ),
        "int32": torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint32),
        "plain": torch.ones(2),
    }
    path = tmp_path / "odd.pt"
    torch.save(value, path, **KINDS[kind])
    file = read_torch_file(path)
    assert isinstance(file.value, Dict)
    assert [key for key, node in file.value.named() if file.view(node) is not None] == ["plain"]
    plain(file.value)
    (tmp_path / "out").mkdir()
    back = torch.load(copy(path, tmp_path / "out"), weights_only=False)
    assert equal(back, value)


def test_meta_tensors_and_bare_storages(tmp_path: Path) -> None:
    value = {
        "meta": torch.empty(3, device="meta"),
        "storage": torch.arange(3.0).untyped_storage(),
        "size": torch.Size([2]),
    }
    path = tmp_path / "meta.pt"
    torch.save(value, path)
    file = read_torch_file(path)
    assert isinstance(file.value, Dict) and file.view(file.value.get("meta")) is None
    assert torch_file.size(file.value.get("size")) == (2,)
    (tmp_path / "out").mkdir()
    back = torch.load(copy(path, tmp_path / "out"), weights_only=False)
    assert back["meta"].is_meta and back["size"] == (2,)
    assert bytes(back["storage"]) == bytes(value["storage"])  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_around_tensors(tmp_path: Path, kind: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    value = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "numpy": np.arange(4.0),
        "rng": torch.get_rng_state(),
        "names": {"a", "b"},
        "bytes": b"\x00\xff",
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "counter": collections.Counter("abca"),
        "text": "é\n" * 100,
    }
    path = tmp_path / "all.pt"
    torch.save(value, path, **KINDS[kind])
    (tmp_path / "out").mkdir()
    back = torch.load(copy(path, tmp_path / "out"), weights_only=False)
    assert np.array_equal(back.pop("numpy"), value.pop("numpy"))
    assert equal(back, value)
    assert back["model"]._metadata == value["model"]._metadata


def test_a_whole_module_comes_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    path = tmp_path / "module.pt"
    torch.save(model, path)
    (tmp_path / "out").mkdir()
    back = torch.load(copy(path, tmp_path / "out"), weights_only=False)
    assert isinstance(back, torch.nn.Linear) and equal(dict(back.state_dict()), dict(model.state_dict()))


def test_without_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    file = read_torch_file(path)
    assert not file.has_checksums and not list(file.checks())
    (tmp_path / "out").mkdir()
    ours = read_torch_file(copy(path, tmp_path / "out"))
    assert ours.has_checksums and len(list(ours.checks())) == 4


def test_many_tensors_cost_as_much_as_each(tmp_path: Path) -> None:
    path = tmp_path / "many.pt"
    torch.save({f"layer.{i}": torch.full((2,), float(i)) for i in range(5000)}, path)
    with at_most(5000 * 1000):
        file = read_torch_file(path)
        assert isinstance(file.value, Dict)
        views = [file.view(node) for _, node in file.value.named()]
    last = views[-1]
    assert len(views) == 5000 and last is not None and scalar(last.ref) is None
    assert struct.unpack("<2f", raw(last.ref)) == (4999.0, 4999.0)
    assert len(file.storages) == 5000


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"m": {"w": torch.ones(2)}, "l": [torch.ones(1), (torch.ones(3),)], 5: torch.ones(1)}, path)
    file = read_torch_file(path)
    found = dict(torch_file.labelled(file))
    assert list(found) == ["m.w", "l[0]", "l[1][0]", "[5]"]
    assert scalar(found["l[0]"].ref) == 1.0 and scalar(found["m.w"].ref) is None


# --- writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_new_tensors(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    node = Dict.of([("a", tensor_node(TensorRef(dtype, (2, 3), (Zeros(6 * dtype.itemsize),))))])
    path = tmp_path / "new.pt"
    written = write_torch_file("new.pt", node)
    execute(Plan(files=(OutputFile(path="", segments=written.segments),)), path)
    back = torch.load(path)["a"]
    assert back.dtype is getattr(torch, name) and tuple(back.shape) == (2, 3)
    assert raw_of(back) == bytes(6 * dtype.itemsize)


def test_the_root_is_the_stem(tmp_path: Path) -> None:
    for name, root in (("sub/a.b.pt", "a.b"), ("plain", "plain"), ("x.pth.tar", "x.pth")):
        written = write_torch_file(name, Dict())
        path = tmp_path / "out"
        execute(Plan(files=(OutputFile(path="", segments=written.segments),)), path, force=True)
        assert read_torch_file(path).root == root


@pytest.mark.heavy
def test_more_than_4_gib(tmp_path: Path) -> None:
    nbytes = 5 << 30
    tensors = [
        ("small", tensor_node(TensorRef(FLOAT32, (2,), (Zeros(8),)))),
        ("big", tensor_node(TensorRef(FLOAT32, (nbytes // 4,), (Zeros(nbytes),)))),
        ("behind", tensor_node(TensorRef(FLOAT32, (3,), (Zeros(12),)))),
    ]
    written = write_torch_file("big.pt", Dict.of(tensors))
    path = tmp_path / "big.pt"
    execute(Plan(files=(OutputFile(path="", segments=written.segments),)), path)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("big/data/1").file_size == nbytes
    back = torch.load(path, mmap=True)
    assert (
        back["big"].numel() == nbytes // 4 and back["big"][-1] == 0 and back["behind"].tolist() == [0, 0, 0]
    )
    file = read_torch_file(path)
    assert file.storages["1"].nbytes == nbytes
    with opened(path) as opened_file:
        assert unexplained(opened_file, read_archive(opened_file)) == []
    path.unlink()


# --- damage and tricks --------------------------------------------------------------------------------


def zip_of(path: Path, pickle: bytes, data: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("r/data.pkl", pickle)
        for key, value in (data or {}).items():
            archive.writestr(f"r/data/{key}", value)
        archive.writestr("r/version", b"3\n")
    return path


def storage_id(
    kind: str = "FloatStorage", key: object = "0", numel: object = 4, location: object = "cpu"
) -> Persistent:
    return Persistent(("storage", Global("torch", kind), key, location, numel))


def rebuilt(*args: Node, name: str = "_rebuild_tensor_v2") -> Object:
    return Object("reduce", Global("torch._utils", name), args)


def test_the_tensors_below_would_be_good(tmp_path: Path) -> None:
    file = read_torch_file(
        zip_of(tmp_path / "r.pt", dumps(rebuilt(storage_id(), 1, (3,), (1,), False)), {"0": bytes(16)})
    )
    view = file.view(file.value)
    assert view is not None and view.offset == 1


V3 = (storage_id(), 0, (4,), (1,), False, None)
BAD_TENSORS: dict[str, Node] = {
    "size": rebuilt(storage_id(), 0, (5,), (1,), False),
    "offset": rebuilt(storage_id(), 2, (3,), (1,), False),
    "stride": rebuilt(storage_id(), 0, (2, 2), (3, 1), False),
    "negative size": rebuilt(storage_id(), 0, (-1,), (1,), False),
    "negative stride": rebuilt(storage_id(), 3, (2,), (-1,), False),
    "negative offset": rebuilt(storage_id(), -1, (2,), (1,), False),
    "overflow": rebuilt(storage_id(), 0, (2**62, 4), (0, 0), False),
    "huge size": rebuilt(storage_id(), 0, (2**70,), (0,), False),
    "huge offset": rebuilt(storage_id(), 2**62, (1,), (1,), False),
    "2,000 dimensions": rebuilt(storage_id(), 0, (1,) * 2000, (1,) * 2000, False),
    "bool": rebuilt(storage_id(), True, (1,), (1,), False),
    "float": rebuilt(storage_id(), 0, (1.0,), (1,), False),
    "text": rebuilt(storage_id(), 0, "ab", (1, 1), False),
    "more strides": rebuilt(storage_id(), 0, (1,), (1, 1), False),
    "no storage": rebuilt("0", 0, (1,), (1,), False),
    "dtype of v3": rebuilt(*V3, Global("os", "system"), name="_rebuild_tensor_v3"),
    "dtype is a list": rebuilt(*V3, [], name="_rebuild_tensor_v3"),
    "wider dtype": rebuilt(*V3, Global("torch", "float64"), name="_rebuild_tensor_v3"),
}  # fmt: skip
BAD_STORAGES: dict[str, Node] = {
    "unknown class": storage_id("EvilStorage"),
    "a path as key": storage_id(key="../0"),
    "an int as key": storage_id(key=0),
    "a bool as size": storage_id(numel=True),
    "a negative size": storage_id(numel=-4),
    "2**63": storage_id(numel=2**63),
    "another size": storage_id(numel=5),
    "another dtype": storage_id("DoubleStorage"),
    "no data": storage_id(key="1"),
    "location": storage_id(location="cpu\x1b[2J"),
    "location is a list": storage_id(location=[]),
    "two dtypes": [storage_id(), storage_id("IntStorage")],
    "no storage": Persistent(("module", "x")),
    "text": Persistent("x"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_impossible_tensors(tmp_path: Path, name: str) -> None:
    data = {} if name == "no storage" else {"0": bytes(16)}
    file = read_torch_file(zip_of(tmp_path / "r.pt", dumps(BAD_TENSORS[name]), data))
    with pytest.raises(CkptError) as caught:
        file.view(file.value)
    assert caught.value.where.endswith("r.pt")


@pytest.mark.parametrize("name", BAD_STORAGES)
def test_impossible_storages(tmp_path: Path, name: str) -> None:
    with pytest.raises(CkptError) as caught:
        read_torch_file(zip_of(tmp_path / "r.pt", dumps(BAD_STORAGES[name]), {"0": bytes(16)}))
    assert caught.value.where.endswith("r.pt") and str(caught.value).isprintable()


def test_storages_that_nothing_uses(tmp_path: Path) -> None:
    file = read_torch_file(zip_of(tmp_path / "r.pt", dumps(Dict()), {"0": bytes(16)}))
    assert file.stray == ("data/0",) and not file.storages


def test_parameters_within_parameters(tmp_path: Path) -> None:
    node: Node = rebuilt(storage_id(), 0, (4,), (1,), False)
    for _ in range(2_000):
        node = rebuilt(node, True, None, name="_rebuild_parameter")
    file = read_torch_file(zip_of(tmp_path / "r.pt", dumps(node), {"0": bytes(16)}))
    with pytest.raises(CkptError, match="too often"):
        file.view(file.value)


def dag() -> bytes:
    out = [b"](K\x01K\x01eq\x00"]
    for i in range(60):
        out.append(b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]))
    return b"".join(out)


@pytest.mark.parametrize("where", ["keys", "dtype", "size", "labels"])
def test_graphs_with_2_to_the_60_leaves(tmp_path: Path, where: str) -> None:
    path = tmp_path / "r.pt"
    with at_most(20_000_000):
        if where == "keys":
            path.write_bytes(legacy(keys=b"\x80\x02]" + dag() + b"a."))
            with pytest.raises(CkptError):
                read_torch_file(path)
        elif where == "labels":
            file = read_torch_file(zip_of(path, b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."))
            assert list(torch_file.labelled(file)) == []
        else:
            tail = (
                b"K\x00K\x04\x85K\x01\x85\x89N" + dag() + b"t"
                if where == "dtype"
                else b"K\x00" + dag() + b"K\x01\x85\x89t"
            )
            name = b"_rebuild_tensor_v3" if where == "dtype" else b"_rebuild_tensor_v2"
            head = b"\x80\x02ctorch._utils\n" + name + b"\n(" + dumps(storage_id())[2:-1].replace(b"q", b"q")
            file = read_torch_file(zip_of(path, head + tail + b"R.", {"0": bytes(16)}))
            with pytest.raises(CkptError):
                file.view(file.value)


def legacy(
    system: bytes | None = None, value: bytes | None = None, keys: bytes | None = None, data: bytes = b""
) -> bytes:
    def opcodes(node: Node) -> bytes:
        return dumps(node)

    return b"".join(
        (
            opcodes(LEGACY_MAGIC),
            opcodes(LEGACY_PROTOCOL),
            system or opcodes(Dict.of([("protocol_version", 1001), ("little_endian", True)])),
            value or opcodes(Dict()),
            keys or opcodes([]),
            data,
        )
    )


ONE = {"value": dumps(storage_id()), "keys": dumps(["0"])}
BAD_LEGACY = {
    "other magic": dumps(1) + legacy()[len(dumps(LEGACY_MAGIC)) :],
    "big endian": legacy(system=dumps(Dict.of([("little_endian", False)]))),
    "system is a list": legacy(system=dumps([])),
    "keys too many": legacy(keys=dumps(["0"])),
    "keys of ints": legacy(value=dumps(storage_id()), keys=dumps([0]), data=struct.pack("<q", 4) + bytes(16)),
    "keys of lists": legacy(value=dumps(storage_id()), keys=dumps([["0"]])),
    "keys twice": legacy(value=dumps(storage_id()), keys=dumps(["0", "0"])),
    "keys is text": legacy(value=dumps(storage_id()), keys=dumps("0")),
    "no data": legacy(**ONE),
    "short data": legacy(**ONE, data=struct.pack("<q", 4) + bytes(15)),
    "long data": legacy(**ONE, data=struct.pack("<q", 4) + bytes(17)),
    "other length": legacy(**ONE, data=struct.pack("<q", 5) + bytes(20)),
    "negative length": legacy(**ONE, data=struct.pack("<q", -1) + bytes(20)),
    "appended": legacy() + b"x",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LEGACY)
def test_bad_legacy_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(BAD_LEGACY[name])
    with pytest.raises(CkptError):
        read_torch_file(path)


def test_calls_in_any_part_of_a_legacy_file_are_seen(tmp_path: Path) -> None:
    call = b"cos\nsystem\nU\x02id\x85R0"
    system = dumps(Dict.of([("little_endian", True)]))
    path = tmp_path / "a.pt"
    path.write_bytes(legacy(system=system[:2] + call + system[2:]))
    assert [str(call.cls) for call in read_torch_file(path).pickle.calls] == ["os.system"]


def test_every_truncation_of_a_legacy_file_is_found(tmp_path: Path) -> None:
    source = io.BytesIO()
    torch.save({"a": torch.arange(5.0), "b": torch.zeros(0)}, source, _use_new_zipfile_serialization=False)
    path = tmp_path / "a.pt"
    for n in range(len(source.getvalue())):
        path.write_bytes(source.getvalue()[:n])
        with pytest.raises(CkptError):
            read_torch_file(path)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\x80\x02N.",
        b"PK\x03\x04",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"#!/bin/sh",
        bytes(100),
    ],
)
def test_files_that_are_not_torch_files(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(head)
    with pytest.raises(CkptError):
        read_torch_file(path)


def test_walk_finds_every_storage_once(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    base = torch.ones(2)
    torch.save([base, base[1:], torch.ones(3)], path)
    file = read_torch_file(path)
    assert len(list(torch_file.stored(file.value))) == 2
    assert sum(isinstance(node, Object) for node in walk(file.value)) >= 3
