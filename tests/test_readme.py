"""The README's examples run as they stand, and its two commands are those that CI runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from commands import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def examples() -> list[list[str]]:
    (block,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [shlex.split(line.removeprefix("$ ckpt ")) for line in block.splitlines()]


def test_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    for arguments in examples():
        ran = run(*arguments)
        assert ran.code == 0, (arguments, ran.err)
        assert ran.out, arguments


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = re.findall(r"^bash (tests/run\.sh)$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text()
