"""Every fault is found, and its place is named; good checkpoints are left alone.

By default one of each fault, some clean checkpoints and some single bits; with `-m heavy` thousands of
faults, all clean checkpoints, every single bit. A table of the faults follows the tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from faults.all import FAULTS
from faults.clean import VARIATIONS, clean, made
from faults.core import (
    DCP,
    HF,
    PT,
    TRIED,
    UNIVERSAL,
    ZERO,
    ZERO3,
    Base,
    Outcome,
    bases,
    sweep,
    table,
    verdict_of,
)

from ckpttools.findings import ERROR, INFO

SEED = 20
QUICK, HEAVY = 1, 12  # of each fault
QUICK_ZIP = 4  # where the place within the file matters most
QUICK_CLEAN, QUICK_BITS = 120, 400


def report(missed: list[Outcome]) -> str:
    """What to read when a fault is missed; fault, checkpoint and number make it again."""
    return "\n".join(
        f"{o.fault} on {o.base}, number {o.number}: detected {o.detected}, located {o.located}\n"
        f"    expected {o.expected.severity} naming {o.expected.files} {o.expected.parts}\n    said {o.said}"
        for o in missed
    )


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_located(name: str, tmp_path: Path) -> None:
    count = QUICK_ZIP if FAULTS[name][1] == "zip" else QUICK
    found = sweep([name], count, tmp_path, SEED)
    TRIED.extend(found)
    assert len(found) == count, "the fault applies to too few checkpoints"
    assert all(o.good for o in found), report([o for o in found if not o.good])


@pytest.mark.heavy
def test_thousands_of_faults_are_found_and_located(tmp_path: Path) -> None:
    found = sweep(FAULTS, HEAVY, tmp_path, SEED + 1)
    TRIED.extend(found)
    assert len(found) >= 2000
    assert {o.fault for o in found} == set(FAULTS)
    used = {o.base for o in found}
    assert {base.kind for base in bases() if base.name in used} == {ZERO, PT, HF, ZERO3, DCP, UNIVERSAL}
    versions = {base.version for base in bases() if base.version.startswith("deepspeed-")}
    assert len(versions) >= 4 and all(any(name.startswith(v) for name in used) for v in versions)
    missed = [o for o in found if not o.good]
    assert not missed, f"{table(found)}\n{report(missed)}"


def test_faults_are_the_same_every_time(tmp_path: Path) -> None:
    names = sorted(FAULTS)[::40]
    once, again = (sweep(names, 1, tmp_path / str(i), SEED) for i in (1, 2))
    assert [(o.fault, o.base, o.expected) for o in once] == [(o.fault, o.base, o.expected) for o in again]


def serious(path: Path) -> list[str]:
    return [
        f"{f.severity}[{f.id}] {f.file} {f.where}: {f.text}"
        for f in verdict_of(path)[0]
        if f.severity != INFO
    ]


def checked(cases: list[tuple[str, Base]], folder: Path) -> Counter[str]:
    """Make and verify clean checkpoints; nothing above information may be found."""
    counts: Counter[str] = Counter()
    alarms = []
    for i, (name, base) in enumerate(cases):
        path = made(name, base, folder / str(i))
        if path is None:
            continue
        counts[name] += 1
        alarms += [f"{name} {base.name}: {finding}" for finding in serious(path)]
    assert not alarms, "\n".join(alarms)
    return counts


def test_good_checkpoints_are_left_alone(tmp_path: Path) -> None:
    found = [case for case in clean() if case[0] == "as_it_is"]
    varied = [case for case in clean() if case[0] != "as_it_is"]
    counts = checked(found + Random(SEED).sample(varied, QUICK_CLEAN), tmp_path)
    assert counts.total() >= 200


@pytest.mark.heavy
@pytest.mark.parametrize("name", VARIATIONS)
def test_all_good_checkpoints_are_left_alone(name: str, tmp_path: Path) -> None:
    assert checked([case for case in clean() if case[0] == name], tmp_path).total() >= 5


# --- single bits --------------------------------------------------------------------------------------


def smallest_zip() -> Base:
    found = [b for b in bases() if b.kind == PT and b.path.read_bytes()[:2] == b"PK"]
    return min((b for b in found if "no_checksums" not in b.name), key=lambda b: b.path.stat().st_size)


def missed_bits(path: Path, bits: Iterator[int]) -> list[str]:
    """Flip one bit at a time; returns those that nobody noticed, or not as damage of this file."""
    good = path.read_bytes()
    missed = []
    for bit in bits:
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        findings = [f for f in verdict_of(path)[0] if f.severity == ERROR]
        if not any(Path(f.file).name == path.name for f in findings):
            missed.append(f"bit {bit % 8} of byte {bit // 8}: {[f.id for f in findings]}")
    path.write_bytes(good)
    return missed


def test_some_single_bits_of_a_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(smallest_zip().path.read_bytes())
    nbits = 8 * path.stat().st_size
    assert not missed_bits(path, iter(Random(SEED).sample(range(nbits), QUICK_BITS)))


@pytest.mark.heavy
def test_every_single_bit_of_a_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(smallest_zip().path.read_bytes())
    missed = missed_bits(path, iter(range(8 * path.stat().st_size)))
    assert not missed, f"{len(missed)} bits: {missed[:40]}"
