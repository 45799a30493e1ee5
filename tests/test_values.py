"""Values: gathering, casts (torch is the oracle), scans and comparisons."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpttools import values
from ckpttools.errors import CkptError, Unsupported, UsageError
from ckpttools.passes.ranges import Cutter
from ckpttools.passes.read import Handles, blocks, load
from ckpttools.tensors import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT64,
    UINT8,
    ByteRange,
    Strided,
    TensorRef,
    Zeros,
)
from ckpttools.transforms.cast import DTYPE_NAMES
from ckpttools.values import cast, nonfinite, numpy_dtype, repeats, same_after_cast, same_before_cast

FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_float]
TARGETS = [dtype for dtype in FLOATS if dtype in DTYPE_NAMES.values()]  # all that --dtype takes
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED_TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def patterns(name: str) -> np.ndarray:
    """Every bit pattern of the narrow types; for the wide ones ties, neighbours of ties and noise."""
    dtype = numpy_dtype(DTYPES[name])
    rng = np.random.default_rng(0)
    if dtype.itemsize <= 2:
        return np.arange(256**dtype.itemsize, dtype=np.uint32).astype(UNSIGNED[dtype.itemsize]).view(dtype)
    if dtype.itemsize == 4:
        high = np.arange(65536, dtype=np.uint32) << 16
        tails = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
        noise = rng.integers(0, 2**32, 300_000, dtype=np.uint32)
        return np.concatenate([noise, *(high | np.uint32(tail) for tail in tails)]).view(np.float32)
    with np.errstate(all="ignore"):
        wide = patterns("float32").astype(np.float64)
        near = [np.nextafter(wide, np.inf), np.nextafter(wide, -np.inf)]
    return np.concatenate([wide, *near, rng.integers(0, 2**64, 300_000, dtype=np.uint64).view(np.float64)])


def to_torch(array: np.ndarray, name: str) -> torch.Tensor:
    bits = array.view(f"i{array.itemsize}" if array.itemsize > 1 else "u1").copy()
    return torch.from_numpy(bits).view(getattr(torch, name))


@pytest.mark.parametrize("target", TARGETS, ids=lambda d: d.short)
@pytest.mark.parametrize("source", FLOATS, ids=lambda d: d.short)
def test_cast_gives_the_bits_that_torch_gives(source, target):
    values = patterns(source.name)
    want = to_torch(values, source.name).to(getattr(torch, target.name))
    bits = want.view(SIGNED_TORCH[target.itemsize]).numpy().view(UNSIGNED[target.itemsize])
    got = cast(values, source, target)
    assert got.dtype == numpy_dtype(target)
    with np.errstate(invalid="ignore"):
        both_nan = np.isnan(got.astype(np.float64)) & want.to(torch.float64).isnan().numpy()
    assert ((got.view(bits.dtype) == bits) | both_nan).all()


@pytest.mark.parametrize(
    ("source", "target"), [(INT64, FLOAT32), (FLOAT32, UINT8), (FLOAT32, DTYPES["float8_e8m0fnu"])]
)
def test_cast_refuses_what_is_not_a_float(source, target):
    with pytest.raises(Unsupported, match="no cast"):
        cast(np.zeros(3, numpy_dtype(source)), source, target)


@pytest.mark.parametrize("name", [d.name for d in DTYPES.values()])
def test_nonfinite_counts(name):
    dtype = DTYPES[name]
    if not dtype.is_float:
        assert nonfinite(np.ones(10, numpy_dtype(dtype)), dtype) == (0, 0)
        return
    values = patterns(name)
    with np.errstate(all="ignore"):
        wide = values.astype(np.float64)
    assert nonfinite(values, dtype) == (np.isnan(wide).sum(), np.isinf(wide).sum())
    finite = values[np.isfinite(wide)]
    assert nonfinite(finite, dtype) == (0, 0)
    assert nonfinite(finite[:0], dtype) == (0, 0)


def test_nonfinite_of_complex():
    block = np.array([1, complex("nan"), complex(np.inf, 0), complex(np.inf, np.nan)], np.complex64)
    assert nonfinite(block, DTYPES["complex64"]) == (2, 1)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("at", [0, 65535, 65536, 199_999])
def test_same_after_cast_names_the_first_difference(dtype, at):
    master = np.random.default_rng(1).standard_normal(200_000, np.float32)
    master[7] = np.nan
    model = cast(master, FLOAT32, dtype)
    model.view(np.uint16)[7] ^= 1  # another NaN
    assert same_after_cast(master, model, dtype) is None
    model.view(np.uint16)[[at, 199_999]] ^= 0x8000
    assert same_after_cast(master, model, dtype) == at
    with pytest.raises(ValueError, match="200000 master weights"):
        same_after_cast(master, model[1:], dtype)


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    strides = tuple(draw(st.integers(0, 40)) for _ in shape)
    numel = int(np.prod(shape))
    first = draw(st.integers(0, numel))
    return shape, strides, first, draw(st.integers(0, numel - first))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("values") / "noise"
    path.write_bytes(np.random.default_rng(2).bytes(20_000))
    return path


@settings(deadline=None, max_examples=200)
@given(view=views(), itemsize=st.sampled_from([1, 2, 4, 8, 16]), start=st.integers(0, 9))
def test_gather_is_numpys_strided_view(noise, view, itemsize, start):
    shape, strides, first, numel = view
    raw = noise.read_bytes()
    array = np.ndarray(
        shape, f"V{itemsize}", raw, offset=start, strides=[stride * itemsize for stride in strides]
    )
    chunk = Strided(
        path=noise,
        start=start,
        itemsize=itemsize,
        shape=shape,
        strides=strides,
        first=first,
        numel=numel,
    )
    got = load(TensorRef(UINT8, (numel * itemsize,), (chunk,)))
    assert got.tobytes() == array.reshape(-1)[first : first + numel].tobytes()


def transposed(path: Path, rows: int, columns: int) -> tuple[np.ndarray, TensorRef]:
    data = np.random.default_rng(3).integers(0, 2**16, (columns, rows), dtype=np.uint16)
    data.tofile(path)
    chunk = Strided(
        path=path,
        start=0,
        itemsize=2,
        shape=(rows, columns),
        strides=(1, rows),
        first=0,
        numel=rows * columns,
    )
    return data.T, TensorRef(BFLOAT16, (rows, columns), (chunk,))


def test_gather_of_a_large_transposed_weight(tmp_path):
    want, ref = transposed(tmp_path / "w", 3000, 1111)
    assert (load(ref).view(np.uint16) == want).all()


def test_gather_needs_a_fixed_buffer(tmp_path):
    transposed(tmp_path / "w", 8192, 8192)  # 128 MiB
    code = """if True:
        import sys
        from pathlib import Path
        from ckpttools.tensors import BFLOAT16, Strided
        from ckpttools.passes.read import blocks
        chunk = Strided(path=Path(sys.argv[1]), start=0, itemsize=2, shape=(8192, 8192),
                        strides=(1, 8192), first=0, numel=8192 * 8192)
        peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
        before = peak()
        assert sum(block.size for block in blocks([chunk], BFLOAT16, 1 << 20)) == 8192 * 8192
        print(peak() - before)
    """
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "w"], capture_output=True, check=True)
    assert int(out.stdout) < 8 * 1024  # KiB


@given(sizes=st.lists(st.integers(0, 50), max_size=6), block=st.integers(1, 64))
@settings(deadline=None)
def test_blocks_join_to_the_chunks(noise, sizes, block):
    chunks, want, at = [], b"", 0
    for k, size in enumerate(sizes):
        chunks.append(Zeros(size) if k % 3 == 2 else ByteRange(noise, at, size))
        want += bytes(size) if k % 3 == 2 else noise.read_bytes()[at : at + size]
        at += size + k
    want = want[: len(want) // 4 * 4]
    chunks = list(Cutter(chunks).take(len(want)))
    got = [array.copy() for array in blocks(chunks, FLOAT32, block)]
    assert b"".join(array.tobytes() for array in got) == want
    assert all(array.nbytes == max(block // 4, 1) * 4 for array in got[:-1])


def test_short_and_missing_sources_are_named(tmp_path):
    (tmp_path / "short").write_bytes(b"12345")
    with pytest.raises(CkptError, match="ends at byte 5, but its tensors go to byte 9") as short:
        load(TensorRef(UINT8, (8,), (ByteRange(tmp_path / "short", 1, 8),)))
    assert short.value.id == "source-truncated" and short.value.exit_code == 1
    with pytest.raises(UsageError) as missing:
        load(TensorRef(UINT8, (8,), (ByteRange(tmp_path / "none", 1, 8),)))
    assert missing.value.id == "source-unreadable"


def test_load_of_scalars_and_bfloat16(tmp_path):
    value = np.array(3.5, ml_dtypes.bfloat16)
    (tmp_path / "x").write_bytes(value.tobytes())
    ref = TensorRef(BFLOAT16, (), (ByteRange(tmp_path / "x", 0, 2),))
    assert load(ref).shape == () and load(ref) == value
    assert load(TensorRef(FLOAT64, (0, 3), ())).shape == (0, 3)


def test_handles_stay_few(tmp_path):
    handles = Handles(lambda path: os.open(path, os.O_RDONLY), os.close, limit=3)
    paths = [tmp_path / str(k) for k in range(10)]
    for path in [*paths, *paths]:
        path.touch()
        os.fstat(handles[path])
    assert opened_below(tmp_path) == 3
    handles.close()
    assert opened_below(tmp_path) == 0


def opened_below(folder: Path) -> int:
    """Descriptors of this process for files in `folder`; those of the runner's threads come and go."""
    return sum(
        link.is_symlink() and link.readlink().parent == folder for link in Path("/proc/self/fd").iterdir()
    )


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_wild_values_are_finite_and_huge(name: str) -> None:
    dtype = DTYPES[name]
    kind = values.numpy_dtype(dtype)
    extreme = float(torch.finfo(getattr(torch, name)).max)
    tame = np.array([0, 1, -1e9, 9e9, np.inf, -np.inf, np.nan, extreme, -extreme], np.float64).astype(kind)
    assert values.wild(tame, dtype) == 0
    assert values.wild(np.append(tame, np.array([2e10, -1e30], np.float64).astype(kind)), dtype) == 2


def test_negatives() -> None:
    assert values.negatives(np.array([0, -0.0, 1, np.nan], np.float32)) == 0
    assert values.negatives(np.array([0, -1e-30, 1, -2], np.float32)) == 2
    assert values.negatives(np.array([], np.float32)) == 0


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("squares", [False, True])
def test_ordinary_is_when_nothing_else_is_found(name: str, squares: bool) -> None:
    """Against the functions that count, over bit patterns around every border."""
    dtype = DTYPES[name]
    kind = UNSIGNED[dtype.itemsize]
    sign, rng = 1 << (8 * dtype.itemsize - 1), np.random.default_rng(5)
    borders = [0, 1, *values._INFINITY.values(), *values._WILD.values()]
    near = {b + d for b in borders for d in (-1, 0, 1) if 0 <= b + d < sign}
    patterns = np.array([p | s for p in near for s in (0, sign)], kind)
    ordinary = 0
    for i in range(400):
        block = rng.choice(patterns, size=int(rng.integers(1, 4)))
        if i % 2:
            block &= kind((sign >> 3) - 1)  # small positive numbers
        shown = values.numpy_array(memoryview(block).cast("B"), dtype)
        odd = values.wild(shown, dtype) or any(nonfinite(shown, dtype))
        odd = odd or (squares and bool(values.negatives(shown)))
        found = values.ordinary(shown, dtype, squares=squares)
        assert not (found and odd), block
        assert found or not i % 2, block
        ordinary += found
    assert 200 < ordinary < 400


@pytest.mark.parametrize("code", ["f2", "f4", "f8"])
def test_eight_equal_elements_in_a_row_are_found_and_seven_are_not(code: str) -> None:
    """Wherever they lie; equal neighbours that come and go, as 16-bit weights have by chance, are none."""
    dtype = {"f2": FLOAT16, "f4": FLOAT32, "f8": FLOAT64}[code]
    for length in (8, 9, 15, 40):
        for run in range(1, length + 1):
            for start in range(length - run + 1):
                block = np.arange(length).astype(code)
                block[start : start + run] = start
                assert repeats(block, dtype) == (run >= 8), (length, run, start)
    pairs = np.arange(1000).repeat(7).astype(code)
    assert not repeats(pairs, dtype) and not repeats(pairs[:0], dtype)


def test_one_number_in_two_types() -> None:
    """Whatever fp32 number was rounded to both, and no other that is two steps of the coarser away."""
    wide = patterns("float32")
    half, brain = (cast(wide, FLOAT32, dtype) for dtype in (FLOAT16, BFLOAT16))
    assert same_before_cast(half, FLOAT16, brain, BFLOAT16)
    assert same_before_cast(brain, BFLOAT16, half, FLOAT16)
    assert same_before_cast(half, FLOAT16, cast(half, FLOAT16, BFLOAT16), BFLOAT16)
    bits = brain.view(np.uint16)
    ordinary = (np.abs(wide) > 1e-4) & (np.abs(wide) < 6e4)
    for off in (2, -2):
        other = (bits[ordinary] + np.uint16(off % 65536)).view(brain.dtype)
        pairs = zip(half[ordinary][::997], other[::997], strict=True)
        assert not any(same_before_cast(np.array([a]), FLOAT16, np.array([b]), BFLOAT16) for a, b in pairs)
