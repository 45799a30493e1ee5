"""Train at one batch size, rebase, resume at another; beside it the run that had the other from the start.

`resume` does this for many cases with as few processes as it can: one launch of a framework's script (see
jobs.py) trains everything that starts from scratch, `ckpt rebase-schedule` rewrites what was saved, and a
second launch resumes each checkpoint twice: rebased, and as it was saved.

Three things are then compared, unit by unit from the first resumed one:

    truth       the run from scratch at the new batch size, from the same place in the data on
    rebased     must be equal to it: learning rate, momentum, number of units left, and the samples where
                the framework itself finds its place in the data
    stale       the checkpoint as it was saved: must differ, or the comparison would prove nothing
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest
from commands import run
from jobs import Job, dump

HERE = Path(__file__).parent
Records = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    micro: int
    accumulation: int = 1
    ranks: int = 1

    @property
    def total(self) -> int:
        return self.micro * self.accumulation * self.ranks

    def __str__(self) -> str:
        return f"{self.micro}x{self.ranks}x{self.accumulation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Save at count `at` under `old`, go on under `new`."""

    schedule: str
    at: int
    old: Batch
    new: Batch
    size: int = 50
    epochs: int = 4

    @property
    def name(self) -> str:
        return f"{self.schedule}-{self.old}-{self.new}-of{self.size}-at{self.at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """How a framework is launched and counts, and where its checkpoints lie.

    `place(folder, case)` is the path of the checkpoint: what the command is given and what is resumed.
    `finds` says whether a resumed run finds its place within an epoch; `again`, whether it makes all of the
    epoch's units again, counting on, where it does not. `settings(saved, report)` is what
    the new run's own configuration says, from the old one and the command's report (see jobs.Job.settings).
    """

    script: str
    unit: Literal["micro", "update"] = "update"
    remainder: Literal["flush", "running"] = "flush"
    place: Callable[[Path, Case], Path]
    finds: bool = True
    again: bool = False
    launcher: Literal["python", "torchrun"] = "python"
    python: str = sys.executable
    options: tuple[str, ...] = ()
    settings: Callable[[Path, Mapping[str, Any]], dict[str, Any]] = lambda saved, report: {}
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run as its script recorded it."""

    error: str | None
    records: Records


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What became of a case; `at` is where the run at the new batch size is at the same place in the data."""

    case: Case
    at: int
    truth: Run
    rebased: Run
    stale: Run
    report: dict[str, Any]  # what the command printed
    refused: str | None  # its error

    @property
    def rest(self) -> Records:
        return [r for r in self.truth.records if r["at"] >= self.at]


def units(case: Case, batch: Batch, framework: Framework) -> Fraction:
    """Units of the framework's counter in an epoch."""
    batches = math.ceil(math.ceil(case.size / batch.ranks) / batch.micro)
    if framework.unit == "micro":
        return Fraction(batches)
    exact = Fraction(batches, batch.accumulation)
    return exact if framework.remainder == "running" else Fraction(math.ceil(exact))


def same_place(case: Case, framework: Framework) -> int:
    """The count at which the new run has seen as much of the running epoch as the old one, rounded down."""
    of_old, of_new = units(case, case.old, framework), units(case, case.new, framework)
    epochs = math.floor(case.at / of_old)

    def samples(batch: Batch) -> int:
        return batch.micro * batch.ranks if framework.unit == "micro" else batch.total

    seen = min((case.at - epochs * of_old) * samples(case.old), Fraction(case.size))
    return math.floor(epochs * of_new + min(of_new, seen / samples(case.new)))


# --- running ------------------------------------------------------------------------------------------


def launch(
    framework: Framework, jobs: Sequence[Job], folder: Path, name: str, environment: Mapping[str, str]
) -> None:
    """One process group for each number of ranks among the jobs."""
    for ranks in sorted({job.ranks for job in jobs}):
        path = dump([j for j in jobs if j.ranks == ranks], folder / f"{name}.{ranks}.json")
        command = [framework.python]
        if framework.launcher == "torchrun":
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*command, str(HERE / f"{framework.script}.py"), str(path)],
            env={**environment, **framework.environment},
            capture_output=True,
            text=True,
            timeout=3000,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def read(path: Path) -> Run:
    if not path.exists():
        return Run(error="not run", records=[])
    return Run(**json.loads(path.read_text()))


def job(case: Case, batch: Batch, out: Path, **more: Any) -> Job:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix("").mkdir(exist_ok=True)
    return Job(
        out=str(out),
        folder=str(out.with_suffix("")),
        schedule=case.schedule,
        size=case.size,
        epochs=case.epochs,
        micro=batch.micro,
        accumulation=batch.accumulation,
        ranks=batch.ranks,
        **more,
    )


def rebase(
    framework: Framework, case: Case, source: Path, destination: Path
) -> tuple[dict[str, Any], str | None]:
    """`ckpt rebase-schedule`: what it says that it did, or its error."""
    done = run("rebase-schedule", source, destination, *arguments(framework, case), "--json")
    if done.code:
        return {}, f"exit code {done.code}: {done.out[-2000:]}{done.err[-4000:]}"
    return json.loads(done.out), None


def arguments(framework: Framework, case: Case) -> list[str]:
    """The two batches, and what the checkpoints of most frameworks do not tell: the size of the data."""
    old, new = case.old, case.new
    out = [f"--old-bs={old.micro}", f"--new-bs={new.micro}", f"--dataset-size={case.size}"]
    out += [f"--old-accum={old.accumulation}", f"--new-accum={new.accumulation}"]
    out += [f"--old-gpus={old.ranks}", f"--new-gpus={new.ranks}"]
    return [*out, *framework.options]


def resume(
    framework: Framework, cases: Iterable[Case], folder: Path, environment: Mapping[str, str]
) -> dict[Case, Resumed]:
    """Every case, from scratch to resumed."""
    cases = list(dict.fromkeys(cases))
    scratch: dict[tuple[Any, ...], Path] = {}
    saves: dict[tuple[Any, ...], dict[int, str]] = defaultdict(dict)

    def key(case: Case, batch: Batch) -> tuple[Any, ...]:
        return case.schedule, case.size, case.epochs, batch

    def out(case: Case, batch: Batch) -> Path:
        return scratch.setdefault(key(case, batch), folder / f"scratch{len(scratch)}.json")

    first: dict[tuple[Any, ...], tuple[Case, Batch]] = {}
    for case in cases:
        place = framework.place(out(case, case.old).with_suffix(""), case)
        saves[key(case, case.old)][case.at] = str(place)
        for batch in (case.old, case.new):
            first.setdefault(key(case, batch), (case, batch))
    jobs = [job(case, batch, out(case, batch), saves=saves[k]) for k, (case, batch) in first.items()]
    launch(framework, jobs, folder, "scratch", environment)

    again: list[Job] = []
    reports: dict[Case, tuple[dict[str, Any], str | None]] = {}
    for number, case in enumerate(cases):
        place = framework.place(out(case, case.old).with_suffix(""), case)
        here = folder / f"case{number}"
        (here / "rebased").mkdir(parents=True)
        rebased = here / "rebased" / place.name
        reports[case] = rebase(framework, case, place, rebased)
        if case.old.ranks != case.new.ranks and framework.script == "train_deepspeed":
            place = reshard(place, case.new.ranks, here / "stale" / place.name)
            if rebased.exists():
                rebased = reshard(rebased, case.new.ranks, here / "resharded" / place.name)
        settings = framework.settings(place, reports[case][0])
        for path, name, new in ((rebased, "rebased", settings), (place, "stale", {})):
            if path.exists():
                again.append(job(case, case.new, here / f"{name}.run.json", resume=str(path), settings=new))
    launch(framework, again, folder, "resumed", environment)
    return {
        case: Resumed(
            case=case,
            at=same_place(case, framework),
            truth=read(out(case, case.new)),
            rebased=read(folder / f"case{number}/rebased.run.json"),
            stale=read(folder / f"case{number}/stale.run.json"),
            report=reports[case][0],
            refused=reports[case][1],
        )
        for number, case in enumerate(cases)
    }


Groups = Callable[[str], dict[Case, Resumed]]


def groups_of(
    frameworks: Mapping[str, Framework],
    groups: Mapping[str, Sequence[Case]],
    folder: Path,
    environment: Mapping[str, str],
) -> Groups:
    """The cases of a framework by its name, run when first asked for; prints them (pytest -s shows it)."""

    @functools.cache
    def of(name: str) -> dict[Case, Resumed]:
        (folder / name).mkdir()
        found = resume(frameworks[name], groups[name], folder / name, environment)
        print(f"\n{name}, resumed without rebase:\n{table(map(without, found.values()))}")
        return found

    return of


def named(groups: Mapping[str, Sequence[Case]]) -> list[Any]:
    """(framework, case) for pytest's parametrize."""
    return [
        pytest.param(name, case, id=f"{name}-{case.name}") for name, cases in groups.items() for case in cases
    ]


def schedules_of(groups: Mapping[str, Sequence[Case]]) -> list[tuple[str, str]]:
    """Each framework with each of its schedules."""
    return list(dict.fromkeys((name, case.schedule) for name, cases in groups.items() for case in cases))


def reshard(source: Path, ranks: int, destination: Path) -> Path:
    destination.parent.mkdir(exist_ok=True)
    done = run("reshard", source, destination, f"--world-size={ranks}")
    assert done.code == 0, done.out + done.err
    return destination


# --- comparing ----------------------------------------------------------------------------------------


def check(found: Resumed, framework: Framework, *, first_within: float = 0.0, lr_moves: bool = True) -> None:
    """The rebased run goes on as the run from scratch; the one that was not rebased does not.

    `first_within` is how far the first learning rate may be off where the schedule's own function is not
    in the checkpoint. Without `lr_moves` nothing of the schedule is left that depends on the counter: then
    the control is the counter itself.
    """
    rest = found.rest
    assert found.refused is None, found.refused
    assert found.truth.error is None, found.truth.error
    assert found.rebased.error is None, found.rebased.error
    records = found.rebased.records
    assert records, "the resumed run made no update"
    assert records[0]["at"] == found.at, f"resumed at {records[0]['at']}, the same place is {found.at}"
    repeated = 0
    if framework.again:
        repeated = int(found.at % units(found.case, found.case.new, framework))
    assert len(records) == len(rest) + repeated, f"{len(records)} units left, {len(rest)} from scratch"
    if first_within:
        distances = [abs(a - b) for a, b in zip(records[0]["lr"], rest[0]["lr"], strict=True)]
        assert max(distances) <= first_within, f"first lr {records[0]['lr']} against {rest[0]['lr']}"
        records, rest = records[1:], rest[1:]
    for name in ("at", "lr", "momentum", *(["ids"] if framework.finds else [])):
        pairs = [(r["at"], a[name], r[name]) for a, r in zip(records, rest, strict=False)]
        off = [pair for pair in pairs if pair[1] != pair[2]]
        assert not off, f"{name}: {len(off)} of {len(rest)} differ, (count, ours, scratch): {off[:3]}"
    # the control: as it was saved, the checkpoint goes on otherwise
    stale = found.stale
    control = ("lr", "momentum") if lr_moves else ("at",)
    assert stale.error or any([r[k] for r in stale.records] != [r[k] for r in found.rest] for k in control), (
        "without rebase the run is the same: this case shows nothing"
    )


def check_all(found: Mapping[Case, Resumed], schedule: str, one: Callable[[Case], None]) -> None:
    """`one` for each case of a schedule; all that fail are named."""
    cases = [case for case in found if case.schedule == schedule]
    assert cases
    failed = []
    for case in cases:
        try:
            one(case)
        except AssertionError as problem:
            failed.append(f"{case.name}: {str(problem).splitlines()[0][:300]}")
    assert not failed, f"{len(failed)} of {len(cases)} cases:\n" + "\n".join(failed)


def without(found: Resumed) -> dict[str, Any]:
    """How wrong the run is that was resumed without rebase: its first learning rate, and the updates left."""
    rest, stale = found.rest, found.stale
    row: dict[str, Any] = {"case": found.case.name, "left": len(rest), "left without": len(stale.records)}
    if stale.records and rest:
        right, used = rest[0]["lr"][0], stale.records[0]["lr"][0]
        row |= {"first lr": right, "first lr without": used}
        row["off"] = f"{(used / right - 1) * 100:+.1f} %" if right else "-"
    row["error"] = stale.error or ""
    return row


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    from ckpttools.cli import render

    found = [dict(row) for row in rows]
    shown = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in found]
    return render.table(shown, tuple(found[0]) if found else ())
