"""Every kind of damage to a distributed checkpoint is found, and said where it is."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from commands import run
from support import FIXTURES
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from ckpttools import convert
from ckpttools.checks import verify
from ckpttools.errors import CkptError
from ckpttools.findings import ERROR, Finding
from ckpttools.formats import open_checkpoint

from .compare import edited

KEY = "optimizer.state.up.weight.exp_avg"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "dcp/fsdp2_ws2", tmp_path / "made"))


def found(folder: Path, *, quick: bool = False) -> list[Finding]:
    return [f for f in verify(folder, quick=quick, workers=1).findings if f.severity == ERROR]


def piece(metadata: Any, key: str = KEY, k: int = 0) -> tuple[Any, Any]:
    """A chunk of a tensor, and the entry that says where it lies."""
    chunk = metadata.state_dict_metadata[key].chunks[k]
    return chunk, metadata.storage_data[MetadataIndex(key, chunk.offsets)]


def patched(folder: Path, file: str, at: int, data: bytes) -> None:
    path = folder / file
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)


def metadata_gone(folder: Path) -> None:
    (folder / ".metadata").unlink()


def metadata_cut(folder: Path) -> None:
    os.truncate(folder / ".metadata", 3000)


def file_gone(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def file_cut(folder: Path) -> None:
    os.truncate(folder / "__1_0.distcp", (folder / "__1_0.distcp").stat().st_size - 10)


def file_left_over(folder: Path) -> None:
    shutil.copy(folder / "__0_0.distcp", folder / "__2_0.distcp")


def file_longer(folder: Path) -> None:
    with (folder / "__0_0.distcp").open("ab") as file:
        file.write(b"x" * 40)


def files_exchanged(folder: Path) -> None:
    one, two = folder / "__0_0.distcp", folder / "__1_0.distcp"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def hole(folder: Path) -> None:
    with edited(folder) as metadata:
        chunk, _ = piece(metadata, k=1)
        metadata.state_dict_metadata[KEY].chunks.remove(chunk)
        del metadata.storage_data[MetadataIndex(KEY, chunk.offsets)]


def overlap(folder: Path) -> None:
    with edited(folder) as metadata:
        chunk, info = piece(metadata, k=1)
        del metadata.storage_data[MetadataIndex(KEY, chunk.offsets)]
        chunk.offsets = torch.Size([chunk.offsets[0] - 1, 0])
        metadata.storage_data[MetadataIndex(KEY, chunk.offsets)] = info


def outside(folder: Path) -> None:
    with edited(folder) as metadata:
        piece(metadata)[0].offsets = torch.Size([100, 0])


def entry_gone(folder: Path) -> None:
    with edited(folder) as metadata:
        del metadata.storage_data[MetadataIndex(KEY, piece(metadata)[0].offsets)]


def value_gone(folder: Path) -> None:
    with edited(folder) as metadata:
        del metadata.storage_data[MetadataIndex("optimizer.param_groups.0.lr")]


def entry_moved(folder: Path) -> None:
    with edited(folder) as metadata:
        piece(metadata)[1].offset += 64


def entry_behind_the_end(folder: Path) -> None:
    with edited(folder) as metadata:
        piece(metadata)[1].offset += 1 << 40


def other_dtype(folder: Path) -> None:
    with edited(folder) as metadata:
        metadata.state_dict_metadata[KEY].properties.dtype = torch.bfloat16


def other_shape(folder: Path) -> None:
    with edited(folder) as metadata:
        tensor = metadata.state_dict_metadata[KEY]
        tensor.size = torch.Size([tensor.size[0], tensor.size[1] * 2])
        for chunk in tensor.chunks:
            chunk.sizes = torch.Size([chunk.sizes[0], chunk.sizes[1] * 2])


def items_exchanged(folder: Path) -> None:
    """The two halves of a tensor in each other's place are found by their checksums nowhere: shapes tell."""
    with edited(folder) as metadata:
        _, one = piece(metadata, "model.up.weight")
        _, two = piece(metadata, "model.up.bias")
        one.__dict__, two.__dict__ = dict(two.__dict__), dict(one.__dict__)


def path_climbs(folder: Path) -> None:
    with edited(folder) as metadata:
        piece(metadata)[1].relative_path = "../made/__0_0.distcp"


def path_of_another_key(folder: Path) -> None:
    with edited(folder) as metadata:
        metadata.planner_data[KEY] = ("optimizer", "state", "else")


def bit_in_data(folder: Path) -> None:
    chunk = open_checkpoint(folder).groups[0].state["exp_avg"]["up.weight"].chunks[0]
    raw = chunk.path.read_bytes()[chunk.start + 4]  # type: ignore[union-attr]
    patched(folder, chunk.path.name, chunk.start + 4, bytes([raw ^ 1]))  # type: ignore[union-attr]


def checksum_mended(folder: Path) -> None:
    """One element changed, and the zip's checksums with it: the item's own id tells."""
    import zlib

    chunk = open_checkpoint(folder).groups[0].state["exp_avg"]["up.weight"].chunks[0]
    raw = bytearray(chunk.path.read_bytes())  # type: ignore[union-attr]
    start, end = chunk.start, chunk.end  # type: ignore[union-attr]
    old = struct.pack("<I", zlib.crc32(raw[start:end]))
    raw[start] ^= 1
    new = struct.pack("<I", zlib.crc32(raw[start:end]))
    for _ in range(2):
        at = raw.index(old, start)
        raw[at : at + 4] = new
    chunk.path.write_bytes(raw)  # type: ignore[union-attr]


def header_of_an_item(folder: Path) -> None:
    with edited(folder) as metadata:
        _, info = piece(metadata)
        patched(folder, info.relative_path, info.offset + 4, b"\x01")


def byte_in_a_value(folder: Path) -> None:
    with edited(folder) as metadata:
        info = metadata.storage_data[MetadataIndex("optimizer.param_groups.1.betas")]
    raw = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    at = raw.index(struct.pack(">d", 0.9))
    patched(folder, info.relative_path, info.offset + at + 7, b"\x00")


def nan(folder: Path) -> None:
    """A whole item is saved again with a NaN, as a run that diverged would."""
    import io

    with edited(folder) as metadata:
        _, info = piece(metadata)
        raw = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        tensor = torch.load(io.BytesIO(raw), weights_only=True)
        tensor[0] = float("nan")
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        patched(folder, info.relative_path, info.offset, buffer.getvalue())


FAULTS: dict[Callable[[Path], None], tuple[str, str]] = {
    metadata_gone: ("metadata-missing", ""),
    metadata_cut: ("pickle-damaged", ".metadata"),
    file_gone: ("shard-missing", "__1_0.distcp"),
    file_cut: ("file-truncated", "__1_0.distcp"),
    file_left_over: ("shard-extra", "__2_0.distcp"),
    file_longer: ("bytes-unexplained", "__0_0.distcp"),
    files_exchanged: ("file-truncated", "__1_0.distcp"),
    hole: ("chunk-missing", ".metadata"),
    overlap: ("chunks-overlap", ".metadata"),
    outside: ("field-damaged", ".metadata"),
    entry_gone: ("entry-missing", ".metadata"),
    value_gone: ("entry-missing", ".metadata"),
    entry_moved: ("entries-overlap", ".distcp"),
    entry_behind_the_end: ("file-truncated", ".distcp"),
    other_dtype: ("item-mismatch", ".distcp"),
    other_shape: ("item-mismatch", ".distcp"),
    items_exchanged: ("item-mismatch", ".distcp"),
    path_climbs: ("name-unsafe", ".metadata"),
    path_of_another_key: ("field-damaged", ".metadata"),
    bit_in_data: ("checksum", ".distcp"),
    checksum_mended: ("records-edited", ".distcp"),
    header_of_an_item: ("zip-unexplained", ".distcp"),
    byte_in_a_value: ("checksum", ".distcp"),
    nan: ("nonfinite", ".distcp"),
}
IN_THE_BYTES = ("checksum bit_in_data", "nonfinite nan")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_every_fault_is_found_and_located(fault: Callable[[Path], None], folder: Path) -> None:
    id, file = FAULTS[fault]
    assert found(folder) == []
    fault(folder)
    findings = found(folder)
    mine = [f for f in findings if f.id == id]
    assert mine, findings
    assert any(f.file.endswith(file) or f.file.endswith("made") for f in mine), mine
    quick = {f.id for f in found(folder, quick=True)}
    assert (id in quick) == (f"{id} {fault.__name__}" not in IN_THE_BYTES)
    done = run("verify", folder)
    assert done.code == 1 and id in done.out


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_what_is_written_from_a_damaged_one_is_refused_or_right(
    fault: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    """extract copies no byte that its checksum does not vouch for, and no tensor with a hole."""
    fault(folder)
    done = run("extract", folder, tmp_path / "out", "--weights-only")
    assert (done.code == 0) == (tmp_path / "out").exists()
    assert "Traceback" not in done.err
    if done.code == 0:
        assert fault.__name__ in ("bit_in_data", "nan")  # in the optimizer alone


def test_what_a_good_one_holds(folder: Path) -> None:
    (folder / "__2_0.distcp").touch()  # of a rank that had nothing to save, as with full_state_dict=True
    out = run("verify", folder).out
    assert ": good (" in out
    assert run("reshard", folder, folder.parent / "three", "--world-size", 3).code == 0
    assert "step 3, epoch 1" in out and "no optimizer" not in out and "no scheduler" in out
    assert run("verify", FIXTURES / "dcp/step-3").out.count("no ") == 0


def test_the_tensor_is_named(folder: Path) -> None:
    other_dtype(folder)
    assert all(KEY in f.where + f.message for f in found(folder))
    (folder / ".metadata").unlink()
    shutil.copy(FIXTURES / "dcp/fsdp2_ws2/.metadata", folder)
    bit_in_data(folder)
    (finding,) = found(folder)
    assert KEY in finding.where


@pytest.mark.parametrize("ours", [False, True], ids=["torch's", "ours"])
def test_every_changed_byte_of_a_data_file_is_found(folder: Path, ours: bool) -> None:
    """Of some places, drawn once: every byte is explained or checked. Of ours, items are alike."""
    if ours:
        convert(folder, folder.with_name("ours"), to="dcp", digest=False)
        folder = folder.with_name("ours")
        (folder / "ckpt-manifest.json").unlink()
    path = folder / "__0_0.distcp"
    good = path.read_bytes()
    random = Random(1)
    missed = []
    for at in sorted(random.sample(range(len(good)), 40)):
        bad = bytearray(good)
        bad[at] ^= 1 << random.randrange(8)
        path.write_bytes(bad)
        if not found(folder):
            missed.append(at)
    assert missed == []


def test_code_in_the_metadata_and_in_a_value(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch marker",)

    with edited(folder) as metadata:
        metadata.storage_meta = Evil()
    (finding,) = found(folder)
    assert finding.id == "pickle-dangerous" and finding.file.endswith(".metadata")
    assert not (Path.cwd() / "marker").exists()


# --- hostile ------------------------------------------------------------------------------------------


def hostile(folder: Path, change: Callable[[Any], None]) -> CkptError:
    with edited(folder) as metadata:
        change(metadata)
    with pytest.raises(CkptError) as caught:
        open_checkpoint(folder)
    assert run("verify", folder).code in (1, 2)
    return caught.value


def test_more_chunks_than_entries(folder: Path) -> None:
    """A list of chunks that is shared costs a few bytes for each tensor; together they would be billions."""

    def change(metadata: Any) -> None:
        chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 1]))] * 1_500_000
        for key in list(metadata.state_dict_metadata):
            if key.startswith("optimizer.state") and not key.endswith("step"):
                metadata.state_dict_metadata[key].chunks = chunks

    assert hostile(folder, change).id == "field-damaged"


@pytest.mark.parametrize(
    "shape", [(1 << 62, 1 << 62), (-1, 4), (1 << 70,), (0,) * 70, ("a",), (1.5,)], ids=lambda s: str(s)[:20]
)
def test_impossible_shapes(shape: tuple[Any, ...], folder: Path) -> None:
    path = folder / ".metadata"

    class Size:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.Size, (shape,)

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[KEY].size = Size()

    assert hostile(folder, change).id in ("field-damaged", "pickle-damaged") and path.exists()


def test_a_huge_tensor_that_is_not_there(folder: Path) -> None:
    """Nothing is allocated for what the metadata claims."""

    def change(metadata: Any) -> None:
        tensor = metadata.state_dict_metadata[KEY]
        tensor.size = torch.Size([1 << 40, 1 << 20])

    assert hostile(folder, change).id == "chunk-missing"


@pytest.mark.parametrize("index", [10**9, -1])
def test_a_list_index_that_would_fill_the_memory(index: int, folder: Path) -> None:
    with edited(folder) as metadata:
        for setting in ("lr", "params"):
            old, new = f"optimizer.param_groups.1.{setting}", f"optimizer.param_groups.{index}.{setting}"
            metadata.planner_data[new] = ("optimizer", "param_groups", index, setting)
            metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
            metadata.storage_data[MetadataIndex(new)] = metadata.storage_data.pop(MetadataIndex(old))
    with pytest.raises(CkptError) as caught:
        open_checkpoint(folder)
    assert caught.value.id == "field-damaged"


@pytest.mark.parametrize(
    "value",
    [None, 3, [], {}, {"state_dict_metadata": {}}, "text", (1, 2)],
    ids=lambda v: str(v)[:20],
)
def test_a_pickle_that_is_no_metadata(value: object, folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CkptError) as caught:
        open_checkpoint(folder)
    assert caught.value.id == "field-damaged"


def test_compressed_items_are_refused(folder: Path) -> None:
    with edited(folder) as metadata:
        piece(metadata)[1].transform_descriptors = ["stream.zstd/1"]
    done = run("verify", folder)
    assert done.code == 2 and "stream.zstd" in done.out
