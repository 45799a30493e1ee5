"""The README's examples run as they stand, and its two commands are those that CI runs."""

from __future__ import annotations

import contextlib
import re
import shlex
import tempfile
from pathlib import Path

import pytest
from commands import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


SCREEN = 62  # lines
Example = tuple[str, list[str]]  # a command line, and what the README shows of its output


def examples(text: str) -> list[list[Example]]:
    """The examples of each block; a command without lines below it is only run."""
    out: list[list[Example]] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        out.append([])
        for line in block.splitlines():
            if line.startswith("$ ckpt "):
                out[-1].append((line, []))
            else:
                out[-1][-1][1].append(line)
    return out


def said(line: str) -> list[str]:
    """What a command prints, in a folder with `fixtures` and `out`."""
    ran = run(*shlex.split(line.removeprefix("$ ckpt ")))
    assert ran.code == 0, (line, ran.err)
    assert ran.out, line
    return ran.out.rstrip("\n").split("\n")


def masked(lines: list[str]) -> list[str]:
    """Without figures, and without the room that a column of them takes."""
    return [" ".join(re.sub(r"[0-9][0-9.,]*(e-?[0-9]+)?", "#", line).split()) for line in lines]


def test_the_five_commands_show_what_they_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    (five,) = examples(README)
    assert len(five) == 5
    for line, shown in five:  # python tests/test_readme.py writes it anew
        assert shown and masked(shown) == masked(said(line))


def test_an_idea_of_the_readme_is_a_screen() -> None:
    sections = re.split(r"^## ", README, flags=re.MULTILINE)
    assert {part.split("\n")[0]: n for part in sections if (n := len(part.splitlines())) > SCREEN} == {}


def refresh() -> None:
    """Write what the five commands print into the README."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("fixtures").symlink_to(ROOT / "fixtures")
        Path("out").mkdir()
        lines = [text for line, _ in examples(README)[0] for text in (line, *said(line))]
    block = "```console\n" + "".join(f"{line.rstrip()}\n" for line in lines) + "```"
    (ROOT / "README.md").write_text(
        re.sub(r"```console\n.*?```", lambda _: block, README, count=1, flags=re.S)
    )


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = re.findall(r"^bash (tests/run\.sh)$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text()


if __name__ == "__main__":
    refresh()
