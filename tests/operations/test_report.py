"""ckpt report: one page that holds all it needs, nothing that a file could have put there, and small."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from commands import run
from run_folders import Folder, One, saved
from support import FIXTURES

import ckpttools

pytest.importorskip("jinja2")
HF = FIXTURES / "hf-trainer"
HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\"'`&{{7*7}}{%x%}\x1b[31m\u202e\u2028"
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "a",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "br",
        "nav",
        "ul",
    ),
    *(
        "li",
        "main",
        "section",
        "div",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "span",
        "figure",
    ),
    *(
        "figcaption",
        "details",
        "summary",
        "strong",
        "code",
        "svg",
        "desc",
        "text",
        "line",
        "path",
        "polyline",
    ),
    *("circle", "rect"),
}
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """The page, held against what it may hold; `texts` are those between tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        found = {name: value or "" for name, value in attrs}
        assert not any(name.startswith("on") or name in ("src", "srcdoc", "action") for name in found)
        assert found.get("href", "#").startswith("#")
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


def made(tmp_path: Path, *args: object) -> tuple[Page, str]:
    out = tmp_path / "page.html"
    ran = run("report", *args, "-o", out, "--force")
    assert ran.code == ("\n0 damaged" not in ran.err.replace("; ", "\n")), ran.err
    text = out.read_text()
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    assert all(c.isprintable() or c == "\n" for c in text)
    return Page(text), text


def test_a_page_serves_keyboard_and_screen_reader(tmp_path: Path) -> None:
    page, text = made(tmp_path, HF)
    assert page.all("html") == [{"lang": "en"}] and page.all("title")
    first = page.all("a")[0]
    assert first["href"] == "#main" and any(each.get("id") == "main" for each in page.all("main"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {each["href"][1:] for each in page.all("a")} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(each.get("scope") in ("col", "row") for each in page.all("th"))
    for svg in page.all("svg"):
        assert svg["role"] == "img" and set(svg["aria-labelledby"].split()) <= set(ids)
    regions = [each for each in page.all("div") if each.get("role") == "region"]
    assert regions and all(each["tabindex"] == "0" and each["aria-label"] for each in regions)
    assert "prefers-color-scheme:dark" in text and "@media print" in text and ":focus-visible" in text
    assert "default-src 'none'" in text


def test_hostile_names_and_values_stay_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "").replace("\u2028", "")
    folder = tmp_path / "runs"
    shutil.copytree(FIXTURES / "trainer/z2_bf16_2", folder / "plain")
    shutil.copytree(HF / "plain", folder / name)
    state = folder / name / "checkpoint-4" / "trainer_state.json"
    values = json.loads(state.read_text())
    log = [{"step": 4, "loss": 1.0, f"eval_{HOSTILE}": 2.0, "eval_loss": 1e308}]
    state.write_text(json.dumps(values | {"log_history": [*values["log_history"], *log]}))
    (folder / name / "config.yaml").write_text(json.dumps({HOSTILE[:60]: HOSTILE, "a": {HOSTILE: 1}}))
    shutil.copytree(folder / name / "checkpoint-2", folder / name / f"checkpoint-{name[:40]}")
    os.truncate(folder / name / f"checkpoint-{name[:40]}" / "model.safetensors", 50)
    assert run("pin", folder / name / "checkpoint-2", "-m", HOSTILE).code == 0
    page, _ = made(tmp_path, folder, "--new-bs", 4)
    assert "{{7*7}}" in "".join(page.texts) and "alert(1)" in "".join(page.texts)
    page, _ = made(tmp_path, folder / name / "checkpoint-2", folder / name / "checkpoint-4")
    assert page.all("table")


def test_states_and_findings_are_told(tmp_path: Path) -> None:
    steps = (1, 2, 3, 5, 9, 11, 12)
    folder = Folder(
        tuple(One("", "iter", step, torn=step == 12, guard="pin" * (step == 2)) for step in steps)
    ).make(tmp_path)
    before = sorted(folder.iterdir())
    page, _ = made(tmp_path, folder)
    words = " ".join(page.texts)
    assert "damaged (headers)" in words and "pinned" in words and "would be pruned" in words
    assert "error: file-truncated" in words or "error: zip-damaged" in words
    assert "What to do:" in words and "Nothing was found" not in words
    assert "checkpoints: 6 points" in words and "1 do not say how far they are" in words
    verified, _ = made(tmp_path, folder, "--verify", "--keep-last", "9")
    assert "verified" in " ".join(verified.texts) and "would be pruned" not in " ".join(verified.texts)
    assert sorted(folder.iterdir()) == before  # only looked at


def test_a_rebase_is_foretold(tmp_path: Path) -> None:
    page, _ = made(tmp_path, HF / "plain/checkpoint-2", "--new-bs", 1)
    words = " ".join(page.texts)
    assert "goes on at 4 (now 2), with learning rate 0.005 (now 0.005)" in words
    assert "checkpoint-2 rebased to 1" in words and "checkpoint-2 as scheduled" in words


def test_two_checkpoints_layer_by_layer(tmp_path: Path) -> None:
    a, b = HF / "plain/checkpoint-2", HF / "plain/checkpoint-4"
    page, text = made(tmp_path, a, b)
    words = " ".join(page.texts)
    found = ckpttools.diff(a, b)
    farthest = max(
        (each for each in found.tensors if each.kind == "weight"),
        key=lambda each: (each.apart and each.apart.relative) or 0,
    )
    assert farthest.apart is not None and f"{farthest.apart.relative:.6g}" in words
    assert 'style="width:100.0%"' in text and "model.layers.1" in words
    same, _ = made(tmp_path, a, a)
    assert "They hold the same." in same.texts


def test_a_thousand_checkpoints_are_less_than_a_megabyte(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for step in range(300):  # a row is as long for each of them
        (folder / f"iter_{step:06}.pth").write_bytes(saved(step % 13))
    page, text = made(tmp_path, folder)
    assert len(page.all("tr")) > 300 and "300 checkpoints in 1 run" in " ".join(page.texts)
    assert len(text.encode()) * 1000 / 300 < 1_000_000


def test_what_is_refused(tmp_path: Path) -> None:
    source = HF / "plain"
    (tmp_path / "mine.html").write_text("<!doctype html>\nmine")
    for args, id in (
        ([source, "-o", tmp_path / "mine.html"], "destination-exists"),
        ([source, "-o", tmp_path / "mine.html", "--force"], "not-replaced"),
        ([source, "-o", tmp_path / "no" / "a.html"], "not-found"),
        ([source, "-o", tmp_path, "--force"], "not-replaced"),
        ([source, source, source, "-o", tmp_path / "a.html"], "bad-usage"),
        ([tmp_path / "nothing", "-o", tmp_path / "a.html"], "not-found"),
        ([tmp_path, "-o", tmp_path / "a.html"], "no-checkpoints"),
        ([source], "bad-usage"),
    ):
        ran = run("report", *args)
        assert ran.code == 2 and f"error[{id}]" in ran.err, (args, ran.err)
        assert not (tmp_path / "a.html").exists()
    document = json.loads(run("report", source, "-o", tmp_path / "a.html", "--json").out)
    assert document["ok"] and document["nbytes"] == (tmp_path / "a.html").stat().st_size
    assert (tmp_path / "mine.html").read_text() == "<!doctype html>\nmine"


@pytest.mark.skipif("CKPT_BROWSER_PYTHON" not in os.environ, reason="needs playwright and chromium")
def test_in_chromium(tmp_path: Path) -> None:
    """What a browser makes of it: tests/oracles/report_in_chromium.py."""
    made(tmp_path, HF)
    script = Path(__file__).parents[1] / "oracles" / "report_in_chromium.py"
    command = [os.environ["CKPT_BROWSER_PYTHON"], script, tmp_path / "page.html", tmp_path]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
