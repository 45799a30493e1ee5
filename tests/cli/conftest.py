"""The command line, run in an empty working folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Ckpt, run


@pytest.fixture
def ckpt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ckpt:
    (tmp_path / "cwd").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "cwd")
    return run
