"""Looking at blocks of values: by themselves, and against the block that is their partner.

The two sides of a pair come when the pass reaches them in their files. What the first one leaves behind for
the second is small: a digest where they must be equal, the places of zeros where the mean of squares is 0.
Two blocks that disagree are read once more, side by side, to say where.
"""

from __future__ import annotations

from collections.abc import Iterator

import xxhash
from msgspec import Struct
from msgspec.structs import replace

from ckpttools.passes.read import Reader
from ckpttools.passes.tasks import (
    Compare,
    Constant,
    Denormal,
    Mismatch,
    Moments,
    NonFinite,
    Odd,
    Pair,
    Result,
    Scan,
    ScanView,
    Twins,
    Unlike,
    itemsizes,
    sides,
)
from ckpttools.tensors import FLOAT32, ByteRange, DType
from ckpttools.values import (
    BLOCK_NBYTES,
    Array,
    Places,
    comparable,
    constant,
    denormals,
    holes,
    large,
    meet,
    negatives,
    nonfinite,
    numpy_array,
    ordinary,
    repeats,
    same_after_cast,
    wild,
    zeros,
)

RUN = 8  # elements: as many may be equal, or denormals, by chance; what `repeats` looks for
SAMPLED = 64  # elements of a block that are looked at before all of them are
MAX_KEPT = 64 << 20  # bytes of the places that wait for their partner

Left = bytes | Places  # what one side of a pair leaves behind


class Side(Struct):
    """A block of one side of a pair, which begins at element `first` of it."""

    pair: Pair
    number: int  # of the pair
    side: int
    first: int


Look = Scan | Side


def odd_values(
    values: Array, dtype: DType, source: ByteRange, name: str, *, squares: bool = False
) -> list[Result]:
    """Elements of the block at `source` that no tensor should hold."""
    if ordinary(values, dtype, squares=squares):
        return []
    found: list[Result] = []
    if count := wild(values, dtype):
        found.append(Odd(what="wild", path=source.path, name=name, count=count))
    nan, inf = nonfinite(values, dtype)
    if nan or inf:
        first = next(i for i in range(len(values)) if any(nonfinite(values[i : i + 1], dtype)))
        byte = source.start + first * dtype.itemsize
        found.append(NonFinite(path=source.path, byte=byte, name=name, nan=nan, inf=inf))
    if squares and (count := negatives(values)):
        found.append(Odd(what="negative", path=source.path, name=name, count=count))
    return found


def patterns(
    values: Array, dtype: DType, source: ByteRange, name: str, *, many: bool = False
) -> list[Result]:
    """What no trained weight looks like: one value throughout, denormals. Of a large block a few elements are
    looked at before all of them are; of `many` small tensors, whether any may be so.
    """
    if len(values) < RUN:
        return []
    some = values if many else values[:: max(1, len(values) // SAMPLED)]
    found: list[Result] = []
    if repeats(values, dtype) if many else constant(some, dtype) and constant(values, dtype):
        value = float(values[0])
        found.append(Constant(path=source.path, name=name, count=len(values), value=value))
    few = RUN if many else len(some) // 20
    if not found and (count := denormals(some, dtype)) > few:
        count = count if many else denormals(values, dtype)
        found.append(Denormal(path=source.path, name=name, count=count))
    return found


def look(what: Look, source: ByteRange, block: memoryview) -> tuple[list[Result], Left]:
    """What is wrong with a block by itself, and what it leaves for its partner."""
    match what:
        case Scan(dtype=dtype, name=name, squares=squares, many=many):
            if dtype is None:
                return [], b""
            values = numpy_array(block, dtype)
            found = odd_values(values, dtype, source, name, squares=squares)
            return found + patterns(values, dtype, source, name, many=many), b""
        case Side(pair=Twins()):
            return [], _digest(block)
        case Side(pair=Compare() as pair, side=side):
            dtype = pair.dtype if side else FLOAT32
            values = numpy_array(block, dtype)
            found = odd_values(values, dtype, source, pair.name)
            left = _digest(comparable(values, dtype, pair.dtype, is_ordinary=not found).data)
            name = pair.name if side else f"{pair.name} (fp32)"
            return found + patterns(values, dtype, source, name, many=pair.many), left
        case Side(pair=Moments() as pair, side=0):
            values = numpy_array(block, pair.dtype)
            name = f"{pair.name} (exp_avg)"
            found = odd_values(values, pair.dtype, source, name)
            return found + patterns(values, pair.dtype, source, name), large(values, pair.dtype)
        case Side(pair=Moments() as pair):
            values = numpy_array(block, pair.dtype)
            name = f"{pair.name} (exp_avg_sq)"
            found = odd_values(values, pair.dtype, source, name, squares=True)
            return found + patterns(values, pair.dtype, source, name), zeros(values, pair.dtype)
    raise AssertionError(what)


def _digest(block: memoryview) -> bytes:
    return xxhash.xxh3_128(block).digest()  # unlike xxh3_128_digest, it lets other threads run


class Meetings:
    """The blocks that wait for their partners. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], Left | None] = {}
        self._kept = 0

    def add(self, side: Side, left: Left, numel: int) -> Iterator[Result | Pair]:
        """One side's block of `numel` elements: what is wrong, or the piece that needs another look."""
        key = side.number, side.first
        if key not in self._waiting:
            nbytes = left.nbytes if isinstance(left, Places) else 0
            keep = self._kept + nbytes <= MAX_KEPT
            self._kept += nbytes if keep else 0
            self._waiting[key] = left if keep else None
            return
        other = self._waiting.pop(key)
        match side.pair, left, other:
            case Moments() as pair, Places(), Places():
                self._kept -= other.nbytes
                if count := meet(left, other):
                    at, name = pair.square.path, f"{pair.name} (exp_avg_sq)"
                    yield Odd(what="hole", path=at, name=name, count=count)
            case pair, _, _ if other is None or left != other:
                yield piece(pair, side.first, numel)


def piece(pair: Pair, first: int, numel: int) -> Pair:
    """Elements `first` to `first + numel` of a pair."""
    one, other = (
        side.cut(first * item, numel * item) for side, item in zip(sides(pair), itemsizes(pair), strict=True)
    )
    match pair:
        case Compare(dtype=dtype, name=name, first=before):
            return Compare(master=one, model=other, dtype=dtype, name=name, first=before + first)
        case Twins(name=name, twin=twin):
            return Twins(one=one, other=other, name=name, twin=twin, apart=False)
        case Moments(dtype=dtype, name=name):
            return Moments(mean=one, square=other, dtype=dtype, name=name)


def side_by_side(pair: Pair, reader: Reader, buffer: memoryview) -> Iterator[Result]:
    """Read both sides of a pair and compare them exactly; `buffer` has room for two blocks."""
    one, other = sides(pair)
    items = itemsizes(pair)
    numel, step = one.nbytes // items[0], BLOCK_NBYTES // max(items)
    for first in range(0, numel, step):
        n = min(step, numel - first)
        here, there = buffer[: n * items[0]], buffer[BLOCK_NBYTES : BLOCK_NBYTES + n * items[1]]
        reader.read(here, one.path, one.start + first * items[0])
        reader.read(there, other.path, other.start + first * items[1])
        match pair:
            case Twins(name=name, twin=twin) if here != there:
                yield Unlike(path=one.path, name=name, twin=twin)
            case Compare(dtype=dtype, name=name):
                at = same_after_cast(numpy_array(here, FLOAT32), numpy_array(there, dtype), dtype)
                if at is not None:
                    element = pair.first + first + at
                    yield Mismatch(master=one.path, model=other.path, name=name, element=element, dtype=dtype)
            case Moments(dtype=dtype, name=name):
                if count := holes(numpy_array(here, dtype), numpy_array(there, dtype)):
                    yield Odd(what="hole", path=other.path, name=f"{name} (exp_avg_sq)", count=count)


def look_at_view(view: ScanView, reader: Reader, buffer: memoryview) -> Iterator[Result]:
    """Read the elements of a view, a block of them at a time, and look at them; `buffer` holds a block."""
    whole, dtype = view.source, view.dtype
    # so few that one read holds them with the gaps between them: else `gather` may take them one by one
    step = BLOCK_NBYTES // 16 // dtype.itemsize
    for first in range(0, whole.numel, step):
        part = whole.cut(first * dtype.itemsize, min(step, whole.numel - first) * dtype.itemsize)
        block = buffer[: part.nbytes]
        reader.fill(block, (part,))
        values, place = numpy_array(block, dtype), ByteRange(whole.path, 0, part.nbytes)
        for found in odd_values(values, dtype, place, view.name, squares=view.squares):
            if isinstance(found, NonFinite):
                yield replace(found, byte=whole.byte_of(part.first + found.byte // dtype.itemsize))
            else:
                yield found
        yield from patterns(values, dtype, place, view.name)
