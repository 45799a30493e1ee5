"""A self-contained page of runs, or of two checkpoints: data in, HTML out.

The template gets plain values. Every text in it goes through `escape` (control, bidirectional and invalid
characters) and then through HTML escaping; the charts alone are markup, and escape their own texts. The page
asks for nothing: no script, no font, no picture from anywhere, and its policy forbids them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ckpttools import __version__
from ckpttools.charts import Chart, number, svg
from ckpttools.errors import UsageError, escape

if TYPE_CHECKING:
    from markupsafe import Markup

FOLDER, TEMPLATE = Path(__file__).parent, "page.html.j2"
# by which a page that ckpt wrote is known: in its first bytes
SIGNATURE = "<!doctype html>\n<!-- made by ckpt report -->"


def check() -> None:
    """Raises UsageError where jinja2 is not installed."""
    if importlib.util.find_spec("jinja2") is None:
        raise UsageError(
            "report-needs",
            "a report needs jinja2, which is not installed",
            hint="pip install 'ckpttools[report]'",
        )


def render(data: Mapping[str, object]) -> bytes:
    """The page. Raises UsageError where jinja2 is not installed."""
    check()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def text(value: object) -> object:
        if value is None:
            return "?"
        if isinstance(value, Markup | int) and not isinstance(value, bool):
            return value
        return f"{value:.6g}" if isinstance(value, float) else escape(value, 1000)

    def drawn(chart: Chart) -> Markup:
        return Markup(svg.draw(chart))

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"chart": drawn, "number": number, "size": size}
    page = environment.get_template(TEMPLATE)
    style = Markup(svg.STYLE)
    html = page.render(data, style=style, version=__version__, signature=Markup(SIGNATURE))
    return html.encode()


def size(nbytes: int) -> str:
    """Bytes for people, in powers of 1000."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def duration(seconds: float) -> str:
    """For people: 3.2 h, 12 min, 7 s."""
    for unit, name in ((86400 * 2, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / min(unit, 86400):.3g} {name}"
    return f"{seconds:.0f} s"
