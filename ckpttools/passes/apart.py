"""How far apart two blocks of elements are."""

from __future__ import annotations

import math
from typing import Self

import numpy as np
from msgspec import Struct

from ckpttools.values import UNSIGNED, Array

_STEP = 32 * 1024  # elements: their float64 copies stay in the cache


class Sums(Struct, frozen=True, kw_only=True):
    """What of two runs of elements adds up, in float64.

    `equal` counts elements of the same bits (of the same value, where the types differ). `largest` is the
    largest absolute difference, NaN where one is; `squares` sums the squares of the differences, `left` and
    `right` those of the elements, `dot` their products.
    """

    numel: int = 0
    equal: int = 0
    largest: float = 0.0
    squares: float = 0.0
    left: float = 0.0
    right: float = 0.0
    dot: float = 0.0

    def __add__(self, other: Self) -> Sums:
        return Sums(
            numel=self.numel + other.numel,
            equal=self.equal + other.equal,
            largest=float(np.maximum(self.largest, other.largest)),  # NaN stays
            squares=self.squares + other.squares,
            left=self.left + other.left,
            right=self.right + other.right,
            dot=self.dot + other.dot,
        )


def sums(a: Array, b: Array) -> Sums:
    """Two blocks of as many elements, of any types that are numbers."""
    out = Sums()
    with np.errstate(all="ignore"):
        for at in range(0, len(a), _STEP):
            out += _sums(a[at : at + _STEP], b[at : at + _STEP])
    return out


def _sums(a: Array, b: Array) -> Sums:
    wide = np.dtype("c16" if "c" in (a.dtype.kind, b.dtype.kind) else "f8")
    same = _bits(a) == _bits(b) if a.dtype == b.dtype else a.astype(wide) == b.astype(wide)
    if same.ndim > 1:
        same = same.all(axis=1)
    equal = int(np.count_nonzero(same))
    x = a.astype(wide)
    left = float(np.vdot(x, x).real)
    if equal == len(a):
        return Sums(numel=len(a), equal=equal, left=left, right=left, dot=left)
    y = b.astype(wide)
    apart = x - y
    squares = float(np.vdot(apart, apart).real)
    if not math.isfinite(squares):
        apart[same] = 0  # NaN and Inf of the same bits are no difference
        squares = float(np.vdot(apart, apart).real)
    return Sums(
        numel=len(a),
        equal=equal,
        largest=_largest(apart),
        squares=squares,
        left=left,
        right=float(np.vdot(y, y).real),
        dot=float(np.vdot(x, y).real),
    )


def _largest(apart: Array) -> float:
    if apart.dtype.kind == "c":
        return float(np.abs(apart).max())
    return float(np.maximum(apart.max(), -apart.min()))  # NaN stays; no copy is made


def _bits(block: Array) -> Array:
    width = UNSIGNED.get(block.itemsize)
    return block.view(width) if width is not None else block.view("u8").reshape(-1, 2)
