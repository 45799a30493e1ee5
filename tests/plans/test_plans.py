"""Plans are what they were: a change of a layout shows in the text of tests/plans/golden/, for a review."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_text import CASES, GOLDEN, made

AGAIN = "python tests/plans/plan_text.py writes them again: look at the difference before you commit it"


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_one_that_is_kept(name: str, tmp_path: Path) -> None:
    assert made(name, tmp_path) == (GOLDEN / f"{name}.txt").read_text(), AGAIN
    assert list(tmp_path.iterdir()) == []


def test_every_text_belongs_to_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES), AGAIN
