"""Charts as data: panels of lines and points over one axis, drawn as SVG without a library, or as PNG.

svg    inline in a page, or a file of its own, light and dark
png    the same with matplotlib, where it is installed

A chart says in words what it shows, for those who cannot see it; lines differ in their dashes and points in
their shapes as well as in colour. Everything that came out of a file is escaped by whoever draws it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import Struct

Point = tuple[float, float]
# of points: what a checkpoint is
State = Literal["good", "unverified", "damaged", "pinned", "pruned"]
MOST = 300  # points of a line


class Line(Struct, frozen=True, kw_only=True):
    """`slot` is its colour and dash: the same for the lines of one run. A `faint` one is background."""

    name: str
    points: tuple[Point, ...]
    slot: int = 0
    faint: bool = False


class Dot(Struct, frozen=True, kw_only=True):
    """A point of its own, such as a checkpoint; `label` says all of it."""

    x: float
    y: float
    label: str
    state: State = "unverified"


class Panel(Struct, frozen=True, kw_only=True):
    """`lanes` names whole values of y, from 0: then the axis has no numbers. `floor` is where y begins, None
    for the least of what is drawn."""

    title: str
    lines: tuple[Line, ...] = ()
    dots: tuple[Dot, ...] = ()
    lanes: tuple[str, ...] = ()
    floor: float | None = None
    height: int = 220


class Chart(Struct, frozen=True, kw_only=True):
    """Panels one above the other over the same axis."""

    title: str
    xlabel: str
    panels: tuple[Panel, ...]


def finite(points: Iterable[Point]) -> tuple[Point, ...]:
    """Those that can be drawn."""
    return tuple((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))


def thinned(points: Sequence[Point], most: int = MOST) -> tuple[Point, ...]:
    """At most about so many points that look the same: of each run of them the first, the least, the
    largest and the last.

    >>> thinned([(x, x % 7) for x in range(1000)], 40)[-1]
    (999, 5)
    """
    points = finite(points)
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / max(most // 4, 1))
    out: list[Point] = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        ends = {0, len(part) - 1}
        ends |= {f(range(len(part)), key=lambda i: part[i][1]) for f in (min, max)}
        out += [part[i] for i in sorted(ends)]
    return tuple(out)


def extent(values: Iterable[float]) -> tuple[float, float]:
    """From the least to the largest, never empty."""
    found = [value for value in values if math.isfinite(value)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    if low == high:
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    return low, high


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two, about so many.

    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    raw = (high - low) / count
    if not math.isfinite(raw) or raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999), power)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)][:50] or [low]


def number(value: float) -> str:
    """A number on an axis or in words.

    >>> number(12_500_000), number(0.0003), number(40)
    ('12.5M', '0.0003', '40')
    """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}"


def said(line: Line) -> str:
    """A line in words."""
    points = finite(line.points)
    if not points:
        return f"{line.name}: nothing"
    (x, y), (u, v) = points[0], points[-1]
    at, least = min(points, key=lambda point: point[1])
    return (
        f"{line.name}: {number(y)} at {number(x)}, {number(v)} at {number(u)}, "
        f"the least {number(least)} at {number(at)}"
    )
