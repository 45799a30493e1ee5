"""The same charts as pixels or PDF, with matplotlib."""

from __future__ import annotations

import importlib.util
import io

from ckpttools.charts import Chart, Line, finite
from ckpttools.charts.svg import LIGHT, SLOTS
from ckpttools.errors import UsageError, escape

DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (3, 5, 1, 5)))


def check() -> None:
    """Raises UsageError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "plot-needs",
            "pictures other than .svg need matplotlib, which is not installed",
            hint="write FILE.svg, or pip install 'ckpttools[plot]'",
        )


def draw(chart: Chart, form: str) -> bytes:
    """The picture's bytes; `form` is "png" or "pdf"."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = sum(panel.height for panel in chart.panels) / 75 + 1
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(chart.panels), 1, sharex=True, squeeze=False)
    for axes, panel in zip(rows[:, 0], chart.panels, strict=True):
        for line in panel.lines:
            xs, ys = zip(*finite(line.points), strict=True) if finite(line.points) else ((), ())
            axes.plot(xs, ys, **_style(line), label=_plain(line.name))
        if panel.dots:
            axes.scatter([dot.x for dot in panel.dots], [dot.y for dot in panel.dots], s=12)
        axes.set_title(_plain(panel.title), loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        if len(panel.lines) > 1:
            axes.legend(fontsize=8)
    rows[-1, 0].set_xlabel(_plain(chart.xlabel))
    out = io.BytesIO()
    figure.savefig(out, format=form, dpi=120)
    return out.getvalue()


def _style(line: Line) -> dict[str, object]:
    slot = line.slot % SLOTS
    alpha = 0.45 if line.faint else 1.0
    marker = "o" if len(line.points) == 1 else None
    return {"color": LIGHT[slot], "linestyle": DASHES[slot], "alpha": alpha, "marker": marker}


def _plain(text: str) -> str:
    """Without what matplotlib reads as formulas, or as a name that is not to be shown."""
    return " " * text.startswith("_") + escape(text, 60).replace("$", r"\$")
