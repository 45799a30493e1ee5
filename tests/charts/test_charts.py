"""Charts: well-formed, escaped, said in words, and small whatever is drawn."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ckpttools.charts import Chart, Dot, Line, Panel, png, svg, thinned, ticks
from ckpttools.errors import UsageError
from ckpttools.operations.figures import check_picture

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e]]>"


def chart(*lines: Line, dots: tuple[Dot, ...] = ()) -> Chart:
    return Chart(title="a title", xlabel="samples", panels=(Panel(title="loss", lines=lines, dots=dots),))


def parsed(drawn: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(svg.draw(drawn, standalone=True))


def test_it_says_in_words_what_it_shows() -> None:
    root = parsed(chart(Line(name="run a", points=((0, 3.0), (10, 1.0), (20, 2.0)))))
    title, words = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None and title.text == "a title" and words is not None and words.text
    assert "run a: 3 at 0, 2 at 20, the least 1 at 10" in words.text
    assert root.get("role") == "img" and set(root.get("aria-labelledby", "").split()) == {
        title.get("id"), words.get("id"),
    }  # fmt: skip


def test_names_cannot_leave_their_place() -> None:
    dot = Dot(x=1, y=1, label=HOSTILE, state="damaged")
    hostile = Chart(
        title=HOSTILE,
        xlabel=HOSTILE,
        panels=(Panel(title=HOSTILE, lines=(Line(name=HOSTILE, points=((0, 1), (1, 2))),) * 2, dots=(dot,)),),
    )
    text = svg.draw(hostile)
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    root = ElementTree.fromstring(text)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "desc", "text", "line", "path", "polyline", "circle", "rect",
    }  # fmt: skip
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)


def test_what_cannot_be_drawn_is_left_out() -> None:
    odd = ((0, math.nan), (1, 2.0), (math.inf, 3.0), (2, math.inf), (3, 1.0))
    for points in (odd, (), ((5, 5.0),), ((1, 2.0), (1, 2.0)), ((0, 1e300), (1, -1e300))):
        text = svg.draw(chart(Line(name="a", points=points)))
        ElementTree.fromstring(text)
        assert "nan" not in text and "inf" not in text.replace("info", "")
    assert ticks(0, math.inf) == [0] and ticks(2, 2) == [2]


def test_a_million_points_are_few_and_keep_their_ends() -> None:
    points = [(float(x), -5.0 if x == 77_777 else x % 13) for x in range(1_000_000)]
    thin = thinned(points)
    assert len(thin) <= 310 and thin[0] == points[0] and thin[-1] == points[-1] and (77_777.0, -5.0) in thin
    assert list(thin) == sorted(thin)
    many = chart(*(Line(name=f"run {i}", points=tuple(points[:5000]), slot=i) for i in range(40)))
    assert len(svg.draw(many)) < 400_000


def test_states_differ_in_their_shapes() -> None:
    states = ("good", "unverified", "damaged", "pinned", "pruned")
    drawn = set()
    for state in states:
        text = svg.draw(chart(dots=(Dot(x=1, y=1, label="x", state=state),)))  # type: ignore[arg-type]
        drawn.add(re.sub(r"s\d|d\d", "", text.split("<title>x")[0].rpartition("<")[2]))
        assert f"1 {state}" in text
    assert len(drawn) == len(states)


def test_colours_stand_out_from_the_paper() -> None:
    """At least 4.5 to 1 on white and on the dark page: WCAG 2.2, 1.4.3."""

    def bright(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colors, paper in ((svg.LIGHT, "#ffffff"), (svg.DARK, "#16161a")):
        for color in colors:
            low, high = sorted((bright(color), bright(paper)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (color, paper)


def test_a_picture_of_pixels() -> None:
    pytest.importorskip("matplotlib")
    drawn = chart(Line(name="$x_{", points=((0, 1), (1, 2))), Line(name="_b", points=((0, 1),)))
    assert png.draw(drawn, "png").startswith(b"\x89PNG") and png.draw(drawn, "pdf").startswith(b"%PDF")
    with pytest.raises(UsageError, match="not a picture"):
        check_picture(Path("a.gif"))
