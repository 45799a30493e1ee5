"""The documentation: every command on its pages runs, and the site builds strictly."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import structure
from commands import run

from ckpttools.cli.app import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs/pages").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs/pages").as_posix())
def test_the_commands_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            ran = run(*shlex.split(line.removeprefix("$ ckpt ")))
            assert ran.code == 0, (line, ran.out, ran.err)


OUTPUTS = [
    (page, command, shown)
    for page in PAGES
    for command, shown in re.findall(
        r"```console\n\$ ckpt ([^\n]+)\n```\n\n```text\n(.*?)```", page.read_text(), re.DOTALL
    )
]


def test_what_a_page_shows_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of text right below one command is its output."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    guide = ROOT / "docs/pages/guides/convert.md"
    for line in re.findall(r"^\$ ckpt (convert .*)$", guide.read_text(), re.MULTILINE):
        assert run(*shlex.split(line)).code == 0
    assert len(OUTPUTS) >= 2
    for page, command, shown in OUTPUTS:
        printed = run(*shlex.split(command)).out.splitlines()
        assert printed[: len(shown.splitlines())] == shown.splitlines(), (page.name, command)


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", "docs/mkdocs.yml"]
    built = subprocess.run(
        [*command, "-d", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    commands = (tmp_path / "site/commands/index.html").read_text()
    for name in COMMANDS:
        assert f'id="{name}"' in commands
    assert "<svg" in (tmp_path / "site/imports.svg").read_text()
    assert "ckpttools.operations.opened" in (tmp_path / "site/api/index.html").read_text()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_the_places_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:ckpttools|tests|docs|fixtures)/[\w./-]*)", text))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_readme_in_chinese_has_as_many_points_rows_and_commands() -> None:
    one, other = (ROOT / "README.md").read_text(), (ROOT / "docs/pages/zh/readme.md").read_text()
    for pattern in (r"^\* ", r"^\| .*", r"^[^#\n]*(?:ckpt demo|tests/run\.sh)$", r"^\$ ckpt .*"):
        here, there = (re.findall(pattern, text, re.MULTILINE) for text in (one, other))
        assert len(here) == len(there) > 0, pattern
    assert re.findall(r"`(?:convert|extract) --[^`]+`", one.split("## Limits")[0].split("## What")[1]) == (
        re.findall(r"`(?:convert|extract) --[^`]+`", other.split("## 限制")[0].split("## 读什么")[1])
    )


def test_what_the_worked_examples_name_is_there() -> None:
    """A check, a format and a framework: the names in CONTRIBUTING are those of the code."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path, names in {
        "ckpttools/formats/table.py": ("FORMATS",),
        "ckpttools/frameworks/__init__.py": ("FRAMEWORKS",),
        "ckpttools/frameworks/openpcdet.py": ("FRAMEWORK", "Framework"),
        "tests/contract/test_formats.py": ("SOURCES", "DROPPED"),
        "tests/faults/fields.py": ("fault",),
    }.items():
        assert path in text and all(name in text for name in names)
        code = (ROOT / path).read_text()
        assert all(re.search(rf"\b{name}\b", code) for name in names), path


def test_the_drawing_has_no_circle_and_no_arrow_that_points_up() -> None:
    edges = structure.graph()
    level = {name: i for i, row in enumerate(structure.layers(edges)) for name in row}
    assert all(level[below] < level[name] for name in edges for below in edges[name])
    with pytest.raises(ValueError, match="a circle"):
        structure.layers({"a": {"b"}, "b": {"a"}})


def test_no_modules_import_each_other() -> None:
    assert structure.circle() == []


LONGEST = 400  # lines of a module


# what is reached: these numbers may fall, not rise
def test_touch_lists_do_not_grow() -> None:
    named = structure.naming_formats()
    assert not any(named.values()), named
    assert all(len(where) == 1 for where in structure.spelling_frameworks().values())


def test_only_stores_open_list_and_look_up_paths() -> None:
    assert all(map(structure.opens, ("open", "path.resolve", "os.path.exists", "os.scandir", "here.stat")))
    found = structure.opening()
    assert not found, found


def test_only_execute_writes_and_removes() -> None:
    found = structure.changing()
    assert not found, found


def test_no_module_is_longer_than_an_idea() -> None:
    found = {path: count for path, count in structure.lengths().items() if count > LONGEST}
    assert not found, found


def test_every_requirement_has_a_row_and_its_tests_are_there() -> None:
    text = (ROOT / "docs/pages/trainer.md").read_text()
    rows = re.findall(r"^\| R(\d+) \| [^|]+ \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    assert sorted(int(number) for number, _ in rows) == list(range(1, 35))
    for number, held in rows:
        folder = ""
        for name in re.findall(r"[\w/]+(?:\.py|/)", held):
            folder = name.rpartition("/")[0] or folder
            path = ROOT / "tests" / (name if "/" in name else f"{folder}/{name}")
            assert path.exists(), f"R{number} names {name}"
