"""`ckpt explain`, and the file that it is made from."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterable, Iterator

import pytest
import structure
from commands import run

from ckpttools.explain import EXPLANATIONS, TEXT


def test_the_file_is_in_its_form() -> None:
    text = TEXT.read_text()
    headings = re.findall(r"^### (\S+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings)) and set(headings) == EXPLANATIONS.keys()
    for id, found in EXPLANATIONS.items():
        assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", id) and found.kind and found.meaning and found.mend
        assert len(found.line) <= 160, f"{id}: the first sentence is its line in the list"


RAISES = ("CkptError", "UsageError", "Unsupported", "Problem", "Finding", "found")


def test_every_id_that_is_printed_has_a_section_and_no_other() -> None:
    nodes = [node for tree in structure.modules().values() for node in ast.walk(tree)]
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") in RAISES]
    given = [call.args[0] for call in calls if call.args]
    given += [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "id"]
    ids = {text for each in given for text in texts(ast.walk(each)) if "-" in text and text.islower()}
    assert len(ids) > 150 and ids <= EXPLANATIONS.keys(), ids - EXPLANATIONS.keys()
    assert EXPLANATIONS.keys() <= set(texts(nodes)), "a section of an id that nothing prints"


def texts(nodes: Iterable[ast.AST]) -> Iterator[str]:
    return (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


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
