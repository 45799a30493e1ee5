"""The same faults, given to torch.load, DeepSpeed's zero_to_fp32 and ds_to_universal, beside `ckpt verify`.

    python tests/faults/peers.py [--per-fault 10] [--universal 1] [--only LEVEL_OR_NAME ...] [--json FILE]

A tool has noticed a fault if it fails, whatever it says. Each run is a process of its own with a time
limit, since a damaged pickle may do anything. `ckpt verify` has no manifest here. ds_to_universal takes
longer and gets fewer faults.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from faults.all import FAULTS  # noqa: E402
from faults.core import ZERO, Base, Copy, judge, plan, verdict_of  # noqa: E402

LIMIT_S = 8  # a hang counts as noticed: nobody takes it for success
LEVELS = ("file", "zip", "model field", "rank field", "values", "folder")
Tool = Callable[[Copy], object]


def torch_load(copy: Copy) -> None:
    """Every file by its name, as a resume would."""
    for path in copy.files:
        torch.load(path, map_location="cpu", weights_only=False)


def zero_to_fp32(copy: Copy) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = copy.folder.parent
    has_latest = any(copy.base.path.rglob("latest"))
    tag = None if has_latest else copy.folder.name
    get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)


def ds_to_universal(copy: Copy) -> None:
    from deepspeed.checkpoint import ds_to_universal

    out = copy.top.parent / "universal"
    args = argparse.Namespace(
        input_folder=str(copy.folder),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    ds_to_universal.main(args)


TOOLS: dict[str, Tool] = {"torch.load": torch_load, "zero_to_fp32": zero_to_fp32}


def fails(tool: Tool, copy: Copy) -> bool:
    """Whether a tool fails on a copy, in a process of its own."""

    def work() -> None:
        os.setsid()  # so that a tool's own processes end with it
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        tool(copy)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode != 0


@functools.cache
def works(name: str, tool: Tool, base: Base) -> bool:
    """Whether a tool can handle the good checkpoint: else its failure says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return not fails(tool, Copy(base, Path(folder)))


def noticed(name: str, count: int, universal: int, folder: Path) -> dict[str, list[int]]:
    """Tool -> faults noticed and faults given, for one fault on ZeRO folders that the tool can handle."""
    counts: dict[str, list[int]] = {tool: [0, 0] for tool in ("ckpt verify", *TOOLS, "ds_to_universal")}
    ((_, turns),) = plan([name], count)
    done = idle = 0
    for base, number in turns:
        if done == count or idle > 200:
            break
        if base.kind != ZERO:
            continue
        work = folder / str(number)
        work.mkdir()
        copy = Copy(base, work)
        expected = FAULTS[name][2](copy, Random(f"{name} {base.name} {number}"))
        if expected is None:
            idle += 1
        else:
            done += 1
            tools = dict(TOOLS)
            if done <= universal:
                tools["ds_to_universal"] = ds_to_universal
            counts["ckpt verify"][0] += judge(verdict_of(copy.path)[0], expected)[0]
            counts["ckpt verify"][1] += 1
            for tool, run in tools.items():
                if works(tool, run, base):
                    counts[tool][0] += fails(run, copy)
                    counts[tool][1] += 1
        shutil.rmtree(work, ignore_errors=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--per-fault", type=int, default=10)
    parser.add_argument("--universal", type=int, default=1, help="of these, how many for ds_to_universal")
    parser.add_argument("--only", nargs="*", help="levels or names of faults")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import deepspeed.checkpoint.ds_to_universal
    import deepspeed.utils.zero_to_fp32  # noqa: F401  loaded once, before the processes fork

    chosen = [
        name
        for name, (kinds, level, _) in FAULTS.items()
        if ZERO in kinds and (level in args.only or name in args.only if args.only else level in LEVELS)
    ]
    rows: dict[str, dict[str, list[int]]] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name in chosen:
            place = Path(folder) / name
            place.mkdir()
            rows[name] = noticed(name, args.per_fault, args.universal, place)
            _show(name, rows[name])
    total = {
        tool: [sum(row[tool][i] for row in rows.values()) for i in (0, 1)]
        for tool in ("ckpt verify", *TOOLS, "ds_to_universal")
    }
    _show("all", total)
    if args.json:
        args.json.write_text(json.dumps({**rows, "all": total}, indent=1))


def _show(name: str, row: dict[str, list[int]]) -> None:
    cells = "  ".join(f"{tool} {found:>4}/{given:<4}" for tool, (found, given) in row.items())
    print(f"{name:44} {cells}", flush=True)


if __name__ == "__main__":
    main()
