"""Interrupted runs see every sample once, in order; see soak.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainer import soak

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def children(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.heavy
def test_two_interruptions(tmp_path: Path) -> None:
    found = soak.story(tmp_path / "soak", 5, 2, changes=True, kinds=("SIGKILL", "disk full"))
    assert sum(found.done[kind] for kind in soak.KINDS) == 2


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_interruptions(tmp_path: Path, seed: int) -> None:
    straight = soak.story(tmp_path / "whole", seed, 0, changes=False, kinds=soak.KINDS)
    changed = soak.story(tmp_path / "soak", seed, 10, changes=bool(seed % 2), kinds=soak.KINDS)
    if seed % 2:
        assert changed.final == pytest.approx(straight.final, rel=0.1)
    else:
        assert changed.losses == straight.losses
