"""Mutated fixtures: only CkptError may come out of a reader, each case in under 5 s.

Longer: `python tests/fuzz/run.py --minutes 30`, or `CKPT_FUZZ_MINUTES=30 pytest tests/fuzz -m heavy`.
"""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest
from fuzz.run import fuzz
from fuzz.targets import TARGETS, Workplace, read_pickle, run_case

from ckpttools.errors import CkptError

# what fuzzing found, made small; each must be read or refused with a CkptError
PICKLES = {
    "a dict is its own key": b"\x80\x02}q\x00h\x00Ns.",
    "calls of calls": b"\x80\x02N" + b")R" * 2000 + b".",
}


@pytest.mark.parametrize("name", PICKLES)
def test_what_was_found(name: str) -> None:
    with contextlib.suppress(CkptError):
        read_pickle(PICKLES[name])


@pytest.mark.parametrize("target", TARGETS)
def test_mutated(target: str, tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    for number in range(40 if target == "universal" else 125):  # of many files each
        _, wrong = run_case(target, number, place)
        assert wrong is None, f"{target}:{number} {wrong.file}: {wrong.problem}\n{wrong.trace}"


@pytest.mark.heavy
def test_mutated_for_long(tmp_path: Path) -> None:
    minutes = float(os.environ.get("CKPT_FUZZ_MINUTES", "5"))
    first = random.SystemRandom().randrange(10**9)
    cases, _, wrong = fuzz(Workplace(tmp_path), first, minutes * 60, list(TARGETS), None)
    assert cases.total() > 100
    assert {f"{w.target}:{w.number} {w.file}": w.problem for w in wrong} == {}
