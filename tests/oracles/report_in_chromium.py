"""What headless Chromium makes of a report: requests, errors, accessibility tree, keyboard, colours, print.

python report_in_chromium.py PAGE.html FOLDER [CHROMIUM]      in an environment with playwright

Writes light.png, dark.png, print.pdf and tree.txt to the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


def check(page: Page, path: Path, out: Path) -> None:
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    papers = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto(path.resolve().as_uri())
        page.screenshot(path=out / f"{scheme}.png", full_page=True)
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2, papers
    tree = page.locator("body").aria_snapshot()
    (out / "tree.txt").write_text(tree)
    for role in (
        "banner",
        "navigation",
        "main",
        "heading",
        "table",
        "img",
        "region",
        "rowheader",
        "columnheader",
    ):
        assert f"{role} " in tree or f"{role}:" in tree, role
    assert page.get_by_role("img").count() and page.get_by_role("table").count()
    unnamed = [i for i in range(page.get_by_role("img").count()) if not _name(page, i)]
    assert not unnamed, unnamed
    page.keyboard.press("Tab")
    first = page.evaluate("document.activeElement.textContent")
    assert first == "Skip to the content", first
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert {"DIV", "SUMMARY"} <= reached, reached  # tables scroll, details open
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), "a phone scrolls sideways"
    page.pdf(path=out / "print.pdf", format="A4")
    assert len(set(asked)) == 1 and not said, (asked, said)


def _name(page: Page, at: int) -> str:
    return page.get_by_role("img").nth(at).evaluate("each => each.querySelector('title').textContent")


def main() -> None:
    path, out = Path(sys.argv[1]), Path(sys.argv[2])
    chromium = sys.argv[3] if len(sys.argv) > 3 else "/usr/bin/chromium"
    with sync_playwright() as run:
        browser = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        check(browser.new_page(viewport={"width": 1000, "height": 900}), path, out)
        browser.close()


if __name__ == "__main__":
    main()
