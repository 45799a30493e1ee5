"""Fuzzes the readers for some minutes and prints a table.

    python tests/fuzz/run.py --minutes 30            # new cases every time
    python tests/fuzz/run.py --first 0 --minutes 5   # the same cases again
    python tests/fuzz/run.py --case zero:1234        # one case, with its traceback

Exit code 1 if anything went wrong. Bad cases are kept in `--keep` (by default the folder of the run).
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.targets import TARGETS, Workplace, Wrong, run_case  # type: ignore[import-not-found]

MEMORY = 4 << 30
HANG_SECONDS = 60


class Hang(BaseException):
    """A case did not come back."""


def _hang(*_: object) -> None:
    raise Hang


def fuzz(
    place: Workplace, first: int, seconds: float, targets: list[str], keep: Path | None
) -> tuple[Counter[str], dict[str, float], list[Wrong]]:
    """Cases of all targets by turns until the time is over."""
    cases: Counter[str] = Counter()
    slowest: dict[str, float] = dict.fromkeys(targets, 0.0)
    wrong: list[Wrong] = []
    known: set[str] = set()
    until = time.monotonic() + seconds
    number = first
    signal.signal(signal.SIGALRM, _hang)
    while time.monotonic() < until:
        for target in targets:
            signal.alarm(HANG_SECONDS)
            took, bad = run_case(target, number, place)
            signal.alarm(0)
            cases[target] += 1
            slowest[target] = max(slowest[target], took)
            if bad is not None:
                wrong.append(bad)
                kind = bad.trace.strip().splitlines()[-3] if bad.trace else bad.problem
                if kind not in known:
                    known.add(kind)
                    print(
                        f"{bad.target}:{bad.number} {bad.file}: {bad.problem}\n{bad.trace[-3000:]}",
                        flush=True,
                    )
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        (keep / f"{bad.target}-{bad.number}").write_bytes(bad.data)
        number += 1
    return cases, slowest, wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--target", action="append", choices=list(TARGETS), dest="targets")
    parser.add_argument("--case", help="TARGET:NUMBER")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    targets: list[str] = args.targets or list(TARGETS)
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        if args.case:
            target, number = args.case.split(":")
            took, bad = run_case(target, int(number), place)
            print(f"{took:.3f} s\n{bad.trace or bad.problem}" if bad else f"{took:.3f} s, nothing wrong")
            return int(bad is not None)
        print(f"cases from number {args.first}", flush=True)
        cases, slowest, wrong = fuzz(place, args.first, args.minutes * 60, targets, args.keep)
    print(f"{'target':12} {'cases':>9} {'wrong':>6} {'slowest':>9}")
    counts = Counter(bad.target for bad in wrong)
    for target in targets:
        print(f"{target:12} {cases[target]:9} {counts[target]:6} {slowest[target]:8.2f}s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{'all':12} {cases.total():9} {len(wrong):6} {max(slowest.values()):8.2f}s  peak {peak} MiB")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
