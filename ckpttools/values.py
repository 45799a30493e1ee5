"""Arithmetic on tensor values: casts, scans and comparisons of blocks in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from ckpttools.errors import Unsupported
from ckpttools.tensors import DTYPES, FLOAT32, FLOAT64, DType

Array = npt.NDArray[Any]

BLOCK_NBYTES = 1024 * 1024  # smaller ones spend their time in Python, which only one thread can at a time

_NUMPY: dict[str, np.dtype[Any]] = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES}
UNSIGNED = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
_SIGNED = {n: np.dtype(f"i{n}") for n in (1, 2, 4, 8)}
# Sign and exponent bits of +Inf, for the formats that have Inf; NaNs are the patterns above it.
_INFINITY = {"float64": 0x7FF0 << 48, "float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """numpy's type of the same elements; bfloat16 and float8 come from ml_dtypes."""
    return _NUMPY[dtype.name]


def numpy_array(view: memoryview, dtype: DType) -> Array:
    """The elements in `view` as a 1-D array that shares its memory."""
    return np.frombuffer(view, numpy_dtype(dtype))


def cast(block: Array, source: DType, target: DType) -> Array:
    """Elements of one float type as another, rounded to nearest even; bits as torch's `.to()` gives them.

    Narrow types are reached through float32, as in torch: float64 is rounded twice. NaN stays NaN, its
    payload may change. Raises `Unsupported` for types that are not floats and for float8_e8m0fnu as
    target (its values are powers of two: scales, not weights).
    """
    if source == target:
        return block
    if not (source.is_float and target.is_float) or target.name == "float8_e8m0fnu":
        raise Unsupported(
            "cast",
            f"no cast from {source} to {target}",
            why="only floating point values can be rounded to another floating point type",
            hint="leave these tensors as they are, or choose one of fp32, fp16, bf16",
        )
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if target == FLOAT64:
            return block.astype(np.float64)
        wide = block.astype(np.float32, copy=False)
        if target.name == "float8_e4m3fn":
            wide = np.clip(wide, -448, 448)  # torch saturates: this type has no Inf
        return wide.astype(numpy_dtype(target), copy=False)


def mean(blocks: Sequence[Array], weights: Sequence[float], target: DType) -> Array:
    """The weighted mean of float blocks, as `numpy.average` takes it of them in float64; then rounded."""
    with np.errstate(all="ignore"):
        total = np.zeros(blocks[0].shape)  # as numpy and torch begin: the mean of -0.0 is 0.0
        for block, weight in zip(blocks, weights, strict=True):
            total += block.astype(np.float64) * weight
        total /= sum(weights)
    return cast(total, FLOAT64, target)


def nonfinite(block: Array, dtype: DType) -> tuple[int, int]:
    """How many elements are NaN, and how many +-Inf; (0, 0) for types that have neither.

    The block should fit in the cache: it is read twice, at about 50 GB/s together.
    """
    infinity = _INFINITY.get(dtype.name)
    if infinity is None:
        return _nonfinite_slow(block, dtype)
    bits = block.view(UNSIGNED[dtype.itemsize])
    sign = 1 << (8 * dtype.itemsize - 1)
    # The largest positive value shows as signed, the largest negative one as unsigned.
    if not bits.size or (
        int(bits.view(f"i{dtype.itemsize}").max()) < infinity and int(bits.max()) < sign | infinity
    ):
        return 0, 0
    magnitude = bits & bits.dtype.type(sign - 1)
    return int(np.count_nonzero(magnitude > infinity)), int(np.count_nonzero(magnitude == infinity))


def _nonfinite_slow(block: Array, dtype: DType) -> tuple[int, int]:
    if not (dtype.is_float or dtype.name.startswith("complex")):
        return 0, 0
    wide = block.astype(np.complex128 if dtype.name.startswith("complex") else np.float32)
    nan = np.isnan(wide)
    return int(np.count_nonzero(nan)), int(np.count_nonzero(np.isinf(wide) & ~nan))


# The bits of 1e10: no weight or moment of a network that trains comes near it.
_WILD = {"float64": 0x4202A05F20000000, "float32": 0x501502F9, "bfloat16": 0x5015}


def wild(block: Array, dtype: DType) -> int:
    """How many finite elements are larger than 1e10, the type's own extremes (masks) not counted."""
    limit = _WILD.get(dtype.name)
    if limit is None or not block.size:
        return 0
    bits = block.view(UNSIGNED[dtype.itemsize])
    sign = 1 << (8 * dtype.itemsize - 1)
    if int(bits.view(f"i{dtype.itemsize}").max()) <= limit and int(bits.max()) <= sign | limit:
        return 0
    magnitude = bits & bits.dtype.type(sign - 1)
    return int(np.count_nonzero((magnitude > limit) & (magnitude < _INFINITY[dtype.name] - 1)))


def ordinary(block: Array, dtype: DType, *, squares: bool = False) -> bool:
    """Whether `nonfinite`, `wild` and, for `squares`, `negatives` would find nothing: one or two passes
    instead of five. False where they must tell: for other types, and for squares of -0.
    """
    infinity = _INFINITY.get(dtype.name)
    if infinity is None or not block.size:
        return not block.size
    limit = _WILD.get(dtype.name, infinity - 1)
    bits = block.view(UNSIGNED[dtype.itemsize])
    if squares:  # as unsigned numbers, those below zero are the largest
        return int(np.maximum.reduce(bits)) <= limit
    sign = 1 << (8 * dtype.itemsize - 1)
    signed = bits.view(_SIGNED[dtype.itemsize])
    return int(np.maximum.reduce(signed)) <= limit and int(np.maximum.reduce(bits)) <= sign | limit


def constant(block: Array, dtype: DType) -> bool:
    """Whether all elements have the same bits."""
    if not block.size or dtype.itemsize not in UNSIGNED:
        return False
    bits = block.view(UNSIGNED[dtype.itemsize])
    return bool((bits == bits[0]).all())


def repeats(block: Array, dtype: DType) -> bool:
    """Whether eight elements in a row have the same bits; of 16 bits, many neighbours have by chance."""
    if dtype.itemsize not in UNSIGNED:
        return False
    bits = block.view(UNSIGNED[dtype.itemsize])
    same = bits[1:] == bits[:-1]
    if np.count_nonzero(same) < 7:
        return False
    three = same[2:] & same[1:-1] & same[:-2]  # and four, and seven
    four = three[1:] & three[:-1]
    return bool((four[3:] & four[:-3]).any())


# The bits of the smallest number with all of its digits: of types in which no weight is that small.
_NORMAL = {"float64": 1 << 52, "float32": 1 << 23, "bfloat16": 1 << 7}


def denormals(block: Array, dtype: DType) -> int:
    """How many elements are too small for all digits of their type, and not 0; 0 for narrow types."""
    normal = _NORMAL.get(dtype.name)
    if normal is None:
        return 0
    bits = block.view(UNSIGNED[dtype.itemsize])
    magnitude = bits & bits.dtype.type((1 << (8 * dtype.itemsize - 1)) - 1)
    return int(np.count_nonzero((magnitude > 0) & (magnitude < normal)))


def negatives(block: Array) -> int:
    """How many elements of a float block are below zero."""
    return int(np.count_nonzero(block < 0)) if block.size and block.min() < 0 else 0


def holes(mean: Array, square: Array) -> int:
    """How many elements have a mean of squares of 0 and a mean that is not: no gradients can give that.

    Means below 1e-15 do not count: the square of such a gradient may be too small for the type.
    """
    if not square.size or square.min() > 0:
        return 0
    return int(np.count_nonzero((square == 0) & (np.abs(mean) > 1e-15)))


def is_zero(block: Array) -> bool:
    """Whether all elements are zero."""
    return not block.any()


def is_rounded(block: Array, dtype: DType) -> bool:
    """Whether all fp32 elements are also numbers of a narrower type."""
    return bool((cast(cast(block, FLOAT32, dtype), dtype, FLOAT32) == block).all())


class Places(Struct, frozen=True):
    """A set of elements of a block: one bit for each, or all of them, or none."""

    bits: bytes | bool

    @property
    def nbytes(self) -> int:
        return len(self.bits) if isinstance(self.bits, bytes) else 0


def large(block: Array, dtype: DType) -> Places:
    """The means that cannot go with a square of 0: above 1e-15. The square of a smaller gradient may be too
    small for the type.
    """
    bits = block.view(UNSIGNED[dtype.itemsize])
    magnitude = bits & bits.dtype.type((1 << (8 * dtype.itemsize - 1)) - 1)
    limit = np.array([1e-15]).astype(block.dtype).view(bits.dtype)[0]
    low, high = int(np.minimum.reduce(magnitude)), int(np.maximum.reduce(magnitude))
    if high <= limit:
        return Places(False)
    if low > limit and high <= _INFINITY[dtype.name]:
        return Places(True)
    return Places(np.packbits((magnitude > limit) & (magnitude <= _INFINITY[dtype.name])).tobytes())


def zeros(block: Array, dtype: DType) -> Places:
    """The elements that are 0 or -0."""
    bits = block.view(UNSIGNED[dtype.itemsize])
    sign = 1 << (8 * dtype.itemsize - 1)
    if int(np.minimum.reduce(bits)) > 0 and int(np.maximum.reduce(bits)) < sign:
        return Places(False)
    return Places(np.packbits((bits == 0) | (bits == sign)).tobytes())


def meet(one: Places, other: Places) -> int:
    """How many elements are in both sets."""
    match one.bits, other.bits:
        case (False, _) | (_, False):
            return 0
        case (bytes() as bits, True) | (True, bytes() as bits):
            return int(np.unpackbits(np.frombuffer(bits, np.uint8)).sum())
        case bytes() as a, bytes() as b:
            both = np.frombuffer(a, np.uint8) & np.frombuffer(b, np.uint8)
            return int(np.unpackbits(both).sum()) if both.any() else 0
    raise ValueError("two whole blocks: their size is not known")


def comparable(block: Array, dtype: DType, target: DType, *, is_ordinary: bool) -> Array:
    """The bits of a block, cast to `target`, with one pattern for every NaN: equal where the values are.

    `is_ordinary` says that there is neither NaN nor Inf.
    """
    if is_ordinary and dtype.name == "float32" and target.name == "bfloat16":
        return (_rounded(block) >> np.uint32(16)).astype(np.uint16)
    values = cast(block, dtype, target)
    bits = values.view(UNSIGNED[target.itemsize])
    if not is_ordinary or _INFINITY.get(target.name) is None:
        nan = np.isnan(values)
        if nan.any():
            bits = bits.copy()
            bits[nan] = np.array([np.nan]).astype(values.dtype).view(bits.dtype)[0]
    return bits


def same_after_cast(master: Array, model: Array, dtype: DType) -> int | None:
    """The first index where `master` (float32), cast to `dtype`, differs in bits from `model`, or None.

    Every NaN equals every other. Works in blocks that stay in the cache.
    """
    if master.size != model.size:
        raise ValueError(f"{master.size} master weights for {model.size} model weights")
    step = BLOCK_NBYTES // 4
    unsigned = UNSIGNED[dtype.itemsize]
    for at in range(0, master.size, step):
        there = model[at : at + step]
        if _rounds_to(master[at : at + step], there, dtype):
            continue
        here = cast(master[at : at + step], DTYPES["float32"], dtype)
        differs = here.view(unsigned) != there.view(unsigned)
        if differs.any():
            differs &= ~(np.isnan(here) & np.isnan(there))
            if differs.any():
                return at + int(differs.argmax())
    return None


def same_before_cast(one: Array, dtype: DType, other: Array, target: DType) -> bool:
    """Whether numbers of one type and of another can be the same fp32 ones, each rounded to its type: they
    are as near as half a step of both.
    """
    a, b = (block.astype(np.float64) for block in (one, other))
    with np.errstate(invalid="ignore"):
        near = np.abs(a - b) <= _half_step(a, dtype) + _half_step(b, target)
    near |= np.isnan(a) & np.isnan(b)
    for block, values, least in ((a, b, _RANGE[dtype.name]), (b, a, _RANGE[target.name])):
        # what is beyond the range of its type became infinite, and is a number of the other
        near |= np.isinf(block) & (np.sign(block) == np.sign(values)) & (np.abs(values) >= least)
    return bool(near.all())


# the largest numbers, of which a little more is rounded to infinity; and of digits, and the smallest steps
_RANGE = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
_STEPS = {"float16": (10, 2.0**-24), "bfloat16": (7, 2.0**-133)}


def _half_step(values: Array, dtype: DType) -> Array:
    """Half the distance to the next number of the type, of finite ones."""
    digits, least = _STEPS[dtype.name]
    _, exponent = np.frexp(np.where(np.isfinite(values), values, 0))
    half: Array = np.maximum(np.ldexp(1.0, exponent - 1 - digits), least) / 2
    return half


def _rounds_to(master: Array, model: Array, dtype: DType) -> bool:
    """Whether float32 bits, rounded as integers, are the bits of bfloat16: twice as fast as the cast.

    NaNs may round to other NaNs, and other types are not looked at: False means that the cast must tell.
    """
    if dtype.name != "bfloat16":
        return False
    rounded = _rounded(master)
    there = model.view(np.uint16).astype(np.uint32)
    there <<= np.uint32(16)
    rounded -= there
    return not rounded.size or int(np.maximum.reduce(rounded)) <= 0xFFFF


def _rounded(master: Array) -> Array:
    """float32 bits as integers, whose upper halves are the values rounded to bfloat16."""
    bits = master.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    return rounded
