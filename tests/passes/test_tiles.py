"""Arrays in boxes: any grid, any cut, several files, read and written, with the checksums of the boxes."""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpttools.errors import CkptError
from ckpttools.execute import execute
from ckpttools.passes.read import blocks, load
from ckpttools.plan import OutputFile, Plan, SourceCheck
from ckpttools.tensors import BFLOAT16, DTYPES, FLOAT32, Box, ByteRange, TensorRef, Tiles, spans


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiles")


def tiled(folder: Path, array: np.ndarray, cuts: list[list[int]]) -> Tiles:
    """The array in a grid of boxes, in two files by turns, with a byte of noise before each box."""
    parts: list[bytearray] = [bytearray(), bytearray()]
    boxes = []
    edges = [sorted({0, n, *at}) for n, at in zip(array.shape, cuts, strict=True)]
    for k, cell in enumerate(itertools.product(*(itertools.pairwise(e) for e in edges))):
        data = parts[k % 2]
        data += b"\xff"
        box = array[tuple(slice(low, high) for low, high in cell)]
        origin = tuple(low for low, _ in cell)
        boxes.append(Box(folder / f"{k % 2}.bin", len(data), origin, box.shape))
        data += box.tobytes()
    for k, data in enumerate(parts):
        (folder / f"{k}.bin").write_bytes(data)
    boxes.reverse()  # the order of the boxes means nothing
    item = array.itemsize
    return Tiles(itemsize=item, shape=array.shape, boxes=tuple(boxes), first=0, numel=array.size)


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    cuts = [draw(st.lists(st.integers(0, n), max_size=3)) for n in shape]
    numel = int(np.prod(shape))
    first = draw(st.integers(0, numel))
    return shape, cuts, first, draw(st.integers(0, numel - first))


@given(grids(), st.sampled_from([np.uint8, np.uint16, np.float32, np.complex128]))
@settings(max_examples=300, deadline=None)
def test_any_grid_and_any_cut(folder: Path, grid: tuple, kind: type) -> None:  # type: ignore[type-arg]
    shape, cuts, first, numel = grid
    array = np.arange(int(np.prod(shape))).astype(kind).reshape(shape)
    whole = tiled(folder, array, cuts)
    part = whole.cut(first * array.itemsize, numel * array.itemsize)
    assert part.nbytes == numel * array.itemsize
    dtype = {1: "uint8", 2: "uint16", 4: "float32", 16: "complex128"}[array.itemsize]
    ref = TensorRef(DTYPES[dtype], (numel,), (part,) if numel else ())
    assert load(ref).tobytes() == array.reshape(-1)[first : first + numel].tobytes()
    size = {path: path.stat().st_size for path in (folder / "0.bin", folder / "1.bin")}
    assert all(0 <= span.start < span.end <= size[span.path] for span in spans(part))


def test_a_large_array_is_copied_and_its_boxes_are_checked(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((1500, 2100)).astype(np.float32)
    tiles = tiled(tmp_path, array, [[700], [1000, 1999]])
    checks = tuple(
        SourceCheck(span, zlib.crc32(span.path.read_bytes()[span.start : span.end]), f"box {k}")
        for k, span in enumerate(tiles.ranges)
    )
    plan = Plan(files=(OutputFile(path="out", segments=(tiles,)),), checks=checks)
    report = execute(plan, tmp_path / "copy")
    assert (tmp_path / "copy/out").read_bytes() == array.tobytes()
    assert report.checked == 6

    bad = tmp_path / "1.bin"
    data = bytearray(bad.read_bytes())
    data[-5] ^= 1
    bad.write_bytes(data)
    with pytest.raises(CkptError) as caught:
        execute(plan, tmp_path / "again")
    assert caught.value.id == "checksum" and not (tmp_path / "again").exists()


def test_blocks_and_casts(tmp_path: Path) -> None:
    array = np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32)
    tiles = tiled(tmp_path, array, [[17], [5, 40]])
    read = np.concatenate([block.copy() for block in blocks((tiles,), FLOAT32, 4096)])
    assert read.tobytes() == array.tobytes()
    ref = TensorRef(FLOAT32, array.shape, (tiles,)).cast(BFLOAT16)
    assert load(ref.flat(100, 500)).tobytes() == load(ref).reshape(-1)[100:600].tobytes()


def test_spans_of_other_chunks(tmp_path: Path) -> None:
    part = ByteRange(tmp_path, 3, 4)
    assert list(spans(part)) == [part]
