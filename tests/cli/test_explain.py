"""`ckpt explain`, and the file that it is made from."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from commands import run

from ckpttools.explain import EXPLANATIONS, TEXT


def test_the_file_is_in_its_form() -> None:
    text = TEXT.read_text()
    headings = re.findall(r"^### (\S+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings)) and set(headings) == EXPLANATIONS.keys()
    for id, found in EXPLANATIONS.items():
        assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", id) and found.kind and found.meaning and found.mend
        assert len(found.line) <= 160, f"{id}: the first sentence is its line in the list"


def test_each_has_a_line_of_meaning() -> None:
    listed = run("explain").out.splitlines()
    assert len(listed) == len(EXPLANATIONS) + 1
    for line in listed[1:]:
        id = line.split()[0]
        assert EXPLANATIONS[id].line in line and EXPLANATIONS[id].kind in line


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("shard-mising", "shard-missing"), ("SHARD-MISSING", None), ("latest", "latest-missing")],
)
def test_an_unknown_id_is_answered_with_the_nearest(asked: str, meant: str | None) -> None:
    ran = run("explain", asked)
    assert ran.code == 2 and "error[bad-usage]" in ran.err
    assert meant is None or (f"{meant}" in ran.err and "did you mean" in ran.err)


def test_an_id_as_it_is_printed_is_understood() -> None:
    assert run("explain", "error[shard-missing]").out == run("explain", "shard-missing").out


def test_the_file_is_part_of_the_package() -> None:
    settings = tomllib.loads((TEXT.parents[1] / "pyproject.toml").read_text())
    assert TEXT.name in settings["tool"]["setuptools"]["package-data"]["ckpttools"]


def test_the_same_as_one_document() -> None:
    every = json.loads(run("explain", "--json").out)["problems"]
    assert [problem["id"] for problem in every] == sorted(EXPLANATIONS)
    (one,) = json.loads(run("explain", "shard-missing", "--json").out)["problems"]
    assert one in every and one["mend"] == EXPLANATIONS["shard-missing"].mend
