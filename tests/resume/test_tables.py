"""The form of the tables of DeepSpeed's loader: what mypy cannot see."""

from __future__ import annotations

from string import Formatter

import pytest

from ckpttools.resume import deepspeed
from ckpttools.resume.deepspeed.case import Case
from ckpttools.resume.deepspeed.rows import Row

ROWS = [row for question in (*deepspeed.FIRST, *deepspeed.THEN) for row in question if row.setting]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.setting}-{row.error or row.cls}")
def test_a_row_says_when_what_and_where(row: Row) -> None:
    raised = (row.moment is not None, bool(row.error), bool(row.source))
    assert raised in ((True, True, True), (False, False, False))
    assert row.why and (row.cls == "impossible" or row.moment is None)
    for template in (row.setting, row.why, row.hint, row.text):
        for _, field, _, _ in Formatter().parse(template):
            if field is None:
                continue
            at = Case if field.startswith("c.") else None
            assert at is not None or field[0] == "x", field
            name = field.split(".")[1] if at is not None else ""
            assert not name or name in Case.__dict__ or name in Case.__struct_fields__, field


def test_the_last_row_of_a_question_is_reached() -> None:
    """A row that always holds ends its question."""
    for question in (*deepspeed.FIRST, *deepspeed.THEN):
        assert len({id(row.when) for row in question}) == len(question)
