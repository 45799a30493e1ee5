"""What each command costs now against an older tree, by turns in one run.

    git archive REV ckpttools | tar -x -C OLD
    python tests/benchmarks/against.py OLD [NAME ...] [--repeat 9] [--folder DIR]

OLD holds another `ckpttools/`. CPU seconds of the process and its children, user and system, in the median;
the ratio is the median over the rounds of new by old, in which what else the machine does cancels out as far
as it can. Memory is the largest peak of resident bytes. Inputs are the fixtures, and a ZeRO-2 checkpoint of
150 MB and one of 64 ranks (sparse, 100 GB) that are made once in DIR.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
from pathlib import Path

import deepspeed_checkpoint
import synthetic
from measure import Cost, measure

ROOT = Path(__file__).resolve().parents[2]
ZERO = ROOT / "fixtures/trainer/z2_bf16_2"
SINGLE = ROOT / "fixtures/monolithic/full/epoch_2_step_40.pt"
PER_PARAMETER = deepspeed_checkpoint.BYTES_PER_PARAMETER


def commands(folder: Path) -> dict[str, list[str | Path]]:
    """Those that both trees have; OUT is removed after each run."""
    large, many, out = folder / "zero2-150MB", folder / "sparse-100GB", folder / "out"
    if not large.exists():
        synthetic.write_random(large, int(150e6 / PER_PARAMETER))
    if not many.exists():
        synthetic.write_sparse(many, int(100e9 / PER_PARAMETER), ranks=64)
    return {
        "help": ["--help"],
        "inspect": ["inspect", ZERO],
        "inspect one file": ["inspect", SINGLE],
        "inspect 64 ranks": ["inspect", many],
        "latest": ["latest", ZERO],
        "resume-check": ["resume-check", ZERO, "--world-size", "2"],
        "verify --quick": ["verify", ZERO, "--quick"],
        "verify": ["verify", ZERO],
        "verify 150 MB": ["verify", large, "-q"],
        "extract": ["extract", ZERO, out, "-q"],
        "extract 150 MB": ["extract", large, out, "-q"],
        "reshard": ["reshard", ZERO, out, "--world-size", "4", "-q"],
        "reshard 150 MB": ["reshard", large, out, "--world-size", "4", "-q"],
        "rebase-schedule": ["rebase-schedule", ZERO, out, "--new-bs", "4", "-q"],
    }


def run(tree: Path, command: list[str | Path], out: Path) -> Cost:
    environment = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1"}
    cost = measure([sys.executable, "-m", "ckpttools.cli", *command], environment)
    for path in (out, out.with_name(f"{out.name}.ckpt-manifest.json")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return cost


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("old", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ckpt-benchmarks"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    known = commands(folder)
    print(f"{'':18} {'old cpu s':>9} {'new':>7} {'ratio':>6}   {'old MB':>7} {'new':>5} {'ratio':>6}   load")
    os.chdir(ROOT / "tests")  # where neither tree lies
    for name in options.names or known:
        costs: dict[Path, list[Cost]] = {options.old.resolve(): [], ROOT: []}
        for number in range(options.repeat + 1):
            for tree in random.sample(list(costs), 2):
                cost = run(tree, known[name], folder / "out")
                if number:  # the first round compiles the modules and warms the cache
                    costs[tree].append(cost)
        old, new = costs.values()
        by_cpu = statistics.median(b.cpu / a.cpu for a, b in zip(old, new, strict=True))
        cpu = [statistics.median(cost.cpu for cost in each) for each in (old, new)]
        rss = [max(cost.rss for cost in each) / 1e6 for each in (old, new)]
        print(
            f"{name:18} {cpu[0]:9.3f} {cpu[1]:7.3f} {by_cpu:6.2f}   {rss[0]:7.1f} {rss[1]:5.1f} "
            f"{rss[1] / rss[0]:6.2f}   {os.getloadavg()[0]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
