"""Faults: good checkpoints made bad in one named way each, and what a verification must say about it.

A fault is a function of a `Copy` of a good checkpoint, which it may change, and a random generator. It
returns what the verification must name, or None where it does not apply to this checkpoint. The same
fault, checkpoint and number always give the same damage.
"""

from __future__ import annotations

import functools
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from support import FIXTURES, ZERO3_SAMPLES, ZERO_FIXTURES, name_of

from ckpttools import formats, manifest
from ckpttools.checks import verify
from ckpttools.errors import CkptError
from ckpttools.findings import ERROR, INFO, WARNING, Finding
from ckpttools.formats.zero import names
from ckpttools.siblings import MANIFEST

T = TypeVar("T")
ZERO, PT, HF = "zero", "pt", "hf"
ZERO3, DCP, UNIVERSAL = "zero3", "dcp", "universal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What some finding must name: one of `files` and one of `parts` (tensors, records, ranks, fields).

    With `severity` WARNING a warning is enough: the state is odd, and may be meant. `needs_manifest`: the
    files themselves cannot show the damage, the manifest must.
    """

    files: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    severity: str = ERROR
    needs_manifest: bool = False


def names_file(*paths: Path | str, parts: Iterable[str] = (), warning: bool = False) -> Expectation:
    """A finding that names one of these files, and one of the parts if there are any."""
    return Expectation(
        files=tuple(Path(path).name for path in paths),
        parts=tuple(parts),
        severity=WARNING if warning else ERROR,
    )


def only_by_manifest(*paths: Path | str) -> Expectation:
    """Nothing in the files can tell: no checksum, or one that was made anew, and no second copy."""
    return Expectation(files=tuple(Path(path).name for path in paths), needs_manifest=True)


@dataclass(frozen=True, slots=True)
class Base:
    """A good checkpoint of the fixtures. `path` is what is verified."""

    path: Path
    kind: str

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def version(self) -> str:
        """The DeepSpeed version of a sample, else the framework's folder."""
        return self.name.partition("/")[0]


def has_checksums(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(info.CRC for info in archive.infolist())


class Copy:
    """A copy of a base that a fault may change. `path` is what is verified, `top` all that belongs to it."""

    def __init__(self, base: Base, folder: Path) -> None:
        self.base, self.kind = base, base.kind
        if base.path.is_dir():
            self.path = self.top = folder / base.path.name
            shutil.copytree(base.path, self.path)
        else:
            self.top = folder / "files"
            self.top.mkdir(parents=True)
            self.path = self.top / base.path.name
            shutil.copyfile(base.path, self.path)
        source = formats.locate(self.path)
        self.folder = source.target if source.target.is_dir() else source.target.parent
        self.place = manifest.place(source.target)
        self.ranks: list[Path] = []
        if self.kind == ZERO:
            found = names.find(source.target)
            self.model, self.ranks = found.model, list(found.optim.values())
            self.files = [self.model, *self.ranks]
        elif self.kind == PT:
            self.files = [self.path]
        elif self.kind in (ZERO3, DCP, UNIVERSAL):
            ends = (".pt", ".distcp", ".metadata")
            self.files = sorted(p for p in self.folder.rglob("*") if p.name.endswith(ends))
        else:
            self.files = [role.path for role in formats.read(source).files if role.role == "weights"]

    @property
    def zips(self) -> list[Path]:
        """One archive each."""
        found = [path for path in self.files if path.suffix != ".distcp"]
        return [path for path in found if path.read_bytes()[:4] == b"PK\x03\x04"]

    @property
    def checked(self) -> list[Path]:
        """Torch zips with checksums."""
        return [path for path in self.zips if has_checksums(path)] + self.items

    @property
    def items(self) -> list[Path]:
        """Files of a distributed checkpoint: one torch zip after another, each with checksums."""
        return [path for path in self.files if path.suffix == ".distcp"]

    @property
    def legacy(self) -> list[Path]:
        return [path for path in self.files if path.read_bytes()[:2] == b"\x80\x02"]

    @property
    def safetensors(self) -> list[Path]:
        return [path for path in self.files if path.suffix == ".safetensors"]

    def torch_files(self) -> list[Path]:
        return [path for path in self.files if path.suffix not in (".safetensors", ".distcp", "")]


Fault = Callable[[Copy, Random], Expectation | None]
FAULTS: dict[str, tuple[frozenset[str], str, Fault]] = {}  # name -> (kinds of checkpoint, level, fault)


def fault(level: str, *kinds: str) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        name = function.__name__
        assert name not in FAULTS, name
        FAULTS[name] = (frozenset(kinds or (ZERO, PT, HF)), level, function)
        return function

    return register


def pick(rng: Random, values: Iterable[T]) -> T | None:
    found = list(values)
    return rng.choice(found) if found else None


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def edited(path: Path, edit: Callable[[Any], object]) -> None:
    """Change the value of a torch file in place and save it again, in its own serialization.

    The archive keeps the name it had, as if the program that saved it had been wrong.
    """
    value = load(path)
    edit(value)
    legacy = path.read_bytes()[:2] == b"\x80\x02"
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)


# --- good checkpoints ---------------------------------------------------------------------------------


@functools.cache
def bases() -> tuple[Base, ...]:
    hf = [p for p in sorted((FIXTURES / "hf").iterdir()) if p.is_dir()]
    hf += sorted((FIXTURES / "hf-trainer/plain").iterdir())
    hf += [FIXTURES / "accelerate/plain", FIXTURES / "hf/single/model.safetensors"]
    pt = [p for p in sorted((FIXTURES / "monolithic").rglob("*")) if p.is_file()]
    pt += [p for p in sorted((FIXTURES / "torch-writers").rglob("*")) if p.is_file()]
    pt += sorted((FIXTURES / "lightning/file").iterdir())
    return (
        *(Base(path, ZERO) for path in ZERO_FIXTURES),
        *(Base(path, PT) for path in pt),
        *(Base(path, HF) for path in hf),
        *(Base(path, ZERO3) for path in ZERO3_SAMPLES),
        *(Base(p, DCP) for p in sorted((FIXTURES / "dcp").iterdir()) if p.name != "truth"),
        *(Base(path, UNIVERSAL) for path in sorted((FIXTURES / "universal").iterdir())),
    )


# --- running ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one fault was answered. `refused`: the verification could not run (exit code 2)."""

    fault: str
    base: str
    number: int
    expected: Expectation
    detected: bool
    located: bool
    by_manifest: bool  # only the manifest told
    refused: bool
    said: str

    @property
    def good(self) -> bool:
        return self.detected and self.located


TRIED: list[Outcome] = []  # by the tests of this run, for the table that conftest.py shows


def verdict_of(path: Path) -> tuple[tuple[Finding, ...], bool]:
    """The findings; an error that stops the verification counts as one. Anything else is a bug."""
    try:
        return verify(path, workers=1).findings, False
    except CkptError as error:
        message = " ".join([error.message, error.why or "", error.hint or ""])
        return (Finding(id=error.id, severity=ERROR, file=str(error.where), where="", message=message),), True


@functools.cache
def _manifest(base: Base) -> bytes:
    """Made from the good files; it names no places, so it fits every copy."""
    described = verify(base.path, quick=True, describe=True).manifest
    assert described is not None
    return described[1]


def run_one(name: str, base: Base, number: int, folder: Path) -> Outcome | None:
    """Damage a copy and verify it. None where the fault does not apply."""
    folder.mkdir(parents=True)
    try:
        copy = Copy(base, folder)
        place = copy.place
        expected = FAULTS[name][2](copy, Random(f"{name} {base.name} {number}"))
        if expected is None:
            return None
        findings, refused = _survives(copy.path)
        detected, located = judge(findings, expected)
        by_manifest = False
        if expected.needs_manifest and not (detected and located):
            place.write_bytes(_manifest(base))
            findings, refused = _survives(copy.path)
            detected, located = judge(findings, expected)
            by_manifest = detected
        return Outcome(
            fault=name,
            base=base.name,
            number=number,
            expected=expected,
            detected=detected,
            located=located,
            by_manifest=by_manifest,
            refused=refused,
            said=" | ".join(_shown(f) for f in findings if f.severity != INFO) or "nothing",
        )
    finally:
        for parent, _, _ in os.walk(folder):
            Path(parent).chmod(0o755)
        shutil.rmtree(folder)


def _survives(path: Path) -> tuple[tuple[Finding, ...], bool]:
    try:
        return verdict_of(path)
    except Exception as error:  # a crash of the verification is a fault of ours: nothing was found
        crash = Finding(id="crash", severity=WARNING, file="", where="", message=repr(error))
        return (crash,), False


def judge(findings: Sequence[Finding], expected: Expectation) -> tuple[bool, bool]:
    """Whether something serious enough was found, and whether one such finding names the place."""
    enough = (ERROR,) if expected.severity == ERROR else (ERROR, WARNING)
    serious = [f for f in findings if f.severity in enough and f.id != "crash"]
    return bool(serious), any(_names(f, expected) for f in serious)


def _names(finding: Finding, expected: Expectation) -> bool:
    file = Path(finding.file)  # the folder counts: universal checkpoints call all their files alike
    words = " ".join([finding.where, finding.message, finding.why, finding.hint, file.parent.name])
    name = file.name
    in_file = not expected.files or any(each == name or each in words for each in expected.files)
    return in_file and (not expected.parts or any(part in words for part in expected.parts))


def _shown(f: Finding) -> str:
    return f"{f.severity}[{f.id}] {Path(f.file).name}: {f.where}: {f.text}"


def plan(names: Iterable[str], per_fault: int, seed: int = 0) -> Iterator[tuple[str, list[tuple[Base, int]]]]:
    """For each fault, checkpoints to try it on, of every kind and version in turn."""
    for name in names:
        kinds = FAULTS[name][0]
        rng = Random(f"{seed} {name}")
        pools: dict[str, list[Base]] = {}
        for base in bases():
            if base.kind in kinds:
                pools.setdefault(base.version, []).append(base)
        for pool in pools.values():
            rng.shuffle(pool)
        order = list(pools)
        rng.shuffle(order)
        turns: list[tuple[Base, int]] = []
        for number in range(per_fault * 4 + 400):
            pool = pools[order[number % len(order)]]
            turns.append((pool[number // len(order) % len(pool)], number))
        yield name, turns


def sweep(names: Iterable[str], per_fault: int, folder: Path, seed: int = 0) -> list[Outcome]:
    """Each fault `per_fault` times, on as many different checkpoints as it applies to."""
    outcomes: list[Outcome] = []
    for name, turns in plan(names, per_fault, seed):
        done = idle = 0
        for base, number in turns:
            if done == per_fault or idle > per_fault * 30 + 200:
                break
            outcome = run_one(name, base, number, folder / name / str(number))
            if outcome is None:
                idle += 1
                continue
            outcomes.append(outcome)
            done += 1
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts per fault: tried, detected, located, and how many only the manifest showed."""
    rows = [f"{'fault':44} {'level':12} {'n':>5} {'found':>5} {'located':>7} {'manifest':>8} {'exit 2':>6}"]
    for name in dict.fromkeys(o.fault for o in outcomes):
        mine = [o for o in outcomes if o.fault == name]
        counts = [len(mine)]
        for field in ("detected", "good", "by_manifest", "refused"):
            counts.append(sum(getattr(o, field) for o in mine))
        mark = "" if counts[2] == counts[0] else "   <-- missed"
        rows.append("{:44} {:12} {:5} {:5} {:7} {:8} {:6}{}".format(name, FAULTS[name][1], *counts, mark))
    good = sum(o.good for o in outcomes)
    detected = sum(o.detected for o in outcomes)
    rows.append(f"{len(outcomes)} faults, {detected} detected, {good} located")
    return "\n".join(rows)


__all__ = [
    "DCP",
    "FAULTS",
    "HF",
    "MANIFEST",
    "PT",
    "TRIED",
    "UNIVERSAL",
    "ZERO",
    "ZERO3",
    "Base",
    "Copy",
    "Expectation",
    "Outcome",
    "bases",
    "edited",
    "fault",
    "has_checksums",
    "load",
    "names_file",
    "only_by_manifest",
    "pick",
    "plan",
    "run_one",
    "sweep",
    "table",
    "verdict_of",
]
