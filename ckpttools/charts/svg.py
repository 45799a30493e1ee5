"""A chart as SVG: text that is selectable, a title and a description, colours by style sheet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from xml.sax.saxutils import escape as xml

from ckpttools.charts import Chart, Dot, Line, Panel, State, extent, number, said, thinned, ticks
from ckpttools.errors import escape

WIDTH, RIGHT, TOP, GAP, FOOT = 860, 16, 26, 34, 44
LEFT, WIDEST = 68, 22  # room for numbers; characters of a lane's name
SLOTS = 8
# colours that differ for every kind of sight (Okabe and Ito), on white and on black
LIGHT = ("#0072b2", "#b34a00", "#007a5a", "#a3457f", "#6b5b00", "#3d6d8e", "#8a2f2f", "#444444")
DARK = ("#56b4e9", "#ff9d5c", "#3ddbb0", "#f0a3d0", "#e6d44a", "#9cc9e8", "#ff8f8f", "#c8c8c8")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 2", "6 2 1 2 1 2")
ORDER: tuple[State, ...] = ("pruned", "unverified", "good", "pinned", "damaged")
STATES = {"good": 2, "unverified": 0, "damaged": 6, "pinned": 3, "pruned": 7}

_ROOTS = "--ink:{ink};--paper:{paper};--rule:{rule};"
STYLE = (
    ":root{color-scheme:light dark;"
    + _ROOTS.format(ink="#1d1d1f", paper="#ffffff", rule="#d0d0d4")
    + "".join(f"--c{i}:{color};" for i, color in enumerate(LIGHT))
    + "}@media(prefers-color-scheme:dark){:root{"
    + _ROOTS.format(ink="#ececf0", paper="#16161a", rule="#45454d")
    + "".join(f"--c{i}:{color};" for i, color in enumerate(DARK))
    + "}}@media print{:root{"
    + _ROOTS.format(ink="#000000", paper="#ffffff", rule="#bbbbbb")
    + "".join(f"--c{i}:{color};" for i, color in enumerate(LIGHT))
    + "}}.chart text{font:12px system-ui,sans-serif;fill:var(--ink)}.chart .t{font-weight:600}"
    ".chart .g{stroke:var(--rule);stroke-width:1}.chart .l{fill:none;stroke-width:1.8}"
    ".chart .f{opacity:.45;stroke-width:1}"
    + "".join(f".chart .s{i}{{stroke:var(--c{i})}}.chart .d{i}{{fill:var(--c{i})}}" for i in range(SLOTS))
)
_names = itertools.count()


def draw(chart: Chart, *, standalone: bool = False) -> str:
    """An `<svg>`; `standalone` for a file of its own, which brings its style sheet."""
    low, high = extent(x for panel in chart.panels for x in _xs(panel))
    names = [len(name) for panel in chart.panels for name in panel.lanes]
    left = max(LEFT, min(max(names, default=0), WIDEST) * 7 + 14)
    body: list[str] = []
    top = 0
    for panel in chart.panels:
        body += _panel(panel, top, left, low, high)
        top += TOP + panel.height + GAP
    at = top + 6
    middle = (left + WIDTH - RIGHT) // 2
    body.append(f'<text x="{middle}" y="{at}" text-anchor="middle">{_text(chart.xlabel)}</text>')
    height = at + FOOT - 30
    id = f"chart{next(_names)}"
    words = "; ".join(said(line) for panel in chart.panels for line in panel.lines)
    words = f"Over {chart.xlabel}. {words}" + "".join(_counted(panel) for panel in chart.panels)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-labelledby="{id}t {id}d"><title id="{id}t">{_text(chart.title)}</title>'
        f'<desc id="{id}d">{_text(words, 4000)}</desc>'
    )
    if standalone:
        head += f'<style>{STYLE}</style><rect width="100%" height="100%" style="fill:var(--paper)"/>'
    return head + "".join(body) + "</svg>\n"


def _counted(panel: Panel) -> str:
    if not panel.dots:
        return ""
    states = [dot.state for dot in panel.dots]
    counts = (f"{states.count(state)} {state}" for state in STATES if state in states)
    return f" {panel.title}: {len(states)} points, {', '.join(counts)}."


def _xs(panel: Panel) -> Iterator[float]:
    for line in panel.lines:
        yield from (x for x, _ in line.points)
    yield from (dot.x for dot in panel.dots)


def _ys(panel: Panel) -> Iterator[float]:
    for line in panel.lines:
        yield from (y for _, y in line.points)
    yield from (dot.y for dot in panel.dots)


def _panel(panel: Panel, top: int, left: int, low: float, high: float) -> Iterator[str]:
    start, end = top + TOP, top + TOP + panel.height
    if panel.lanes:
        least, most = -0.5, len(panel.lanes) - 0.5
    else:
        least, most = extent(_ys(panel))
        room = (most - least) * 0.04
        least, most = least - (room if least else 0), most + room
        if panel.floor is not None:
            least = min(panel.floor, least)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    def y(value: float) -> float:
        return end - (value - least) / (most - least) * (end - start)

    yield f'<text class="t" x="{left}" y="{top + 14}">{_text(panel.title)}</text>'
    for value in ticks(low, high, 6):
        yield f'<line class="g" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{start}" y2="{end}"/>'
        yield f'<text x="{x(value):.1f}" y="{end + 15}" text-anchor="middle">{_text(number(value))}</text>'
    marks = enumerate(panel.lanes) if panel.lanes else ((v, number(v)) for v in ticks(least, most, 4))
    for value, name in marks:
        yield f'<line class="g" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        yield f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_text(name, WIDEST)}</text>'
    most_points = max(60, 12_000 // max(len(panel.lines), 1))
    for line in panel.lines:
        yield from _line(line, x, y, min(300, most_points))
    if len(panel.lines) > 1:
        yield from _legend(panel.lines, start)
    # many are drawn from the least to the most telling, so that none of these is hidden
    for dot in sorted(panel.dots, key=lambda dot: ORDER.index(dot.state)):
        yield _dot(dot, x(dot.x), y(dot.y))


def _line(line: Line, x: object, y: object, most: int) -> Iterator[str]:
    points = [(x(u), y(v)) for u, v in thinned(line.points, most)]  # type: ignore[operator]
    slot = line.slot % SLOTS
    name = f"<title>{_text(line.name)}</title>"
    if len(points) == 1:
        yield f'<circle class="d{slot}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3">{name}</circle>'
    elif points:
        dash = f' stroke-dasharray="{DASHES[slot]}"' if DASHES[slot] else ""
        path = " ".join(f"{u:.1f},{v:.1f}" for u, v in points)
        faint = " f" if line.faint else ""
        yield f'<polyline class="l s{slot}{faint}"{dash} points="{path}">{name}</polyline>'


def _legend(lines: tuple[Line, ...], top: int) -> Iterator[str]:
    for row, line in enumerate(lines[:10]):
        slot, at = line.slot % SLOTS, top + 14 + 15 * row
        dash = f' stroke-dasharray="{DASHES[slot]}"' if DASHES[slot] else ""
        faint = " f" if line.faint else ""
        path = f"M{WIDTH - 236},{at - 4}h28"
        yield f'<path class="l s{slot}{faint}"{dash} d="{path}"/>'
        yield f'<text x="{WIDTH - 202}" y="{at}">{_text(line.name, 30)}</text>'
    if len(lines) > 10:
        yield f'<text x="{WIDTH - 202}" y="{top + 14 + 150}">and {len(lines) - 10} more</text>'


def _dot(dot: Dot, x: float, y: float) -> str:
    """A shape for each state, so that no colour is needed to tell them apart."""
    slot, name = STATES[dot.state], f"<title>{_text(dot.label)}</title>"
    match dot.state:
        case "damaged":
            d = f"M{x - 4:.1f},{y - 4:.1f}l8,8m0,-8l-8,8"
            return f'<path class="l s{slot}" d="{d}">{name}</path>'
        case "pinned":
            return f'<path class="d{slot}" d="M{x:.1f},{y - 6:.1f}l5,6l-5,6l-5,-6z">{name}</path>'
        case "pruned":
            return f'<circle class="l s{slot}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{name}</circle>'
        case "good":
            return f'<circle class="d{slot}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{name}</circle>'
    return f'<rect class="d{slot}" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6">{name}</rect>'


def _text(text: object, limit: int = 300) -> str:
    """Text that may come out of a file, for the inside of an element or an attribute."""
    return xml(escape(text, limit), {'"': "&quot;", "'": "&#39;"})
