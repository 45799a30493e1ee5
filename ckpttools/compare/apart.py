"""How far apart tensors of two checkpoints are: both sides streamed, in parts that threads share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from msgspec import Struct

from ckpttools.compare.stream import Stream, in_threads, place
from ckpttools.passes.apart import Sums, sums
from ckpttools.passes.read import Reader
from ckpttools.progress import Progress
from ckpttools.tensors import TensorRef
from ckpttools.values import Array

_PART = 4 * 1024 * 1024  # elements of a tensor that one thread goes through at a time


class Apart(Struct, frozen=True, kw_only=True):
    """`equal` elements of `numel` have the same bits (the same value, where the types differ).

    `largest` is the largest absolute difference, NaN where one is; `relative` the norm of the difference over
    that of the left tensor, `cosine` that of the angle between them: None where a norm is 0.
    """

    numel: int
    equal: int
    largest: float
    relative: float | None
    cosine: float | None


def measure(
    pairs: Sequence[tuple[TensorRef, TensorRef]],
    left: Stream,
    right: Stream,
    *,
    workers: int = 0,
    bar: Progress | None = None,
) -> list[Apart]:
    """For each pair of tensors of as many elements. The streams' checksums remain to be finished."""
    order = sorted(range(len(pairs)), key=lambda i: place(pairs[i][0]))
    parts = [
        (i, first, min(_PART, pairs[i][0].numel - first))
        for i in order
        for first in range(0, pairs[i][0].numel, _PART)
    ]
    found: dict[tuple[int, int], Sums] = {}

    def work(part: tuple[int, int, int], reader: Reader) -> int:
        i, first, numel = part
        a, b = (ref if numel == ref.numel else ref.flat(first, numel) for ref in pairs[i])
        total = Sums()
        for x, y in _together(left.blocks(a, reader), right.blocks(b, reader)):
            total += sums(x, y)
        found[i, first] = total
        return a.nbytes + b.nbytes

    in_threads(workers, work, parts, bar)
    totals = [Sums() for _ in pairs]
    for i, first, _ in parts:  # in order: sums of floats depend on it
        totals[i] += found[i, first]
    return list(map(_apart, totals))


def _together(a: Iterator[Array], b: Iterator[Array]) -> Iterator[tuple[Array, Array]]:
    """The same elements of both sides, whatever the lengths of their blocks."""
    x, y = next(a, None), next(b, None)
    while x is not None and y is not None:
        numel = min(len(x), len(y))
        yield x[:numel], y[:numel]
        x, y = x[numel:], y[numel:]
        x = x if len(x) else next(a, None)
        y = y if len(y) else next(b, None)


def _apart(total: Sums) -> Apart:
    left, right = math.sqrt(total.left), math.sqrt(total.right)
    same = total.equal == total.numel
    return Apart(
        numel=total.numel,
        equal=total.equal,
        largest=total.largest,
        relative=0.0 if same else math.sqrt(total.squares) / left if left else None,
        cosine=1.0 if same else total.dot / (left * right) if left and right else None,
    )
