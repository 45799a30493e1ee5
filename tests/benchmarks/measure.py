"""What a command costs: wall time, CPU seconds of it and its children, peak memory.

    python tests/benchmarks/measure.py COMMAND ...

A child's ru_maxrss begins with what its parent held when it was forked. `measure` therefore starts this
module as a small process of its own, which starts the command.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

POLL = 0.02


class Cost(NamedTuple):
    """Seconds and bytes. `rss` is the largest process's peak, mapped files included, exact. `anonymous` is
    the peak of the whole process tree without mapped files, sampled every 20 ms."""

    wall: float
    cpu: float
    rss: int
    anonymous: int
    code: int


def measure(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command, its output discarded but for the errors of one that fails."""
    launcher = [sys.executable, "-I", "-S", __file__, *map(str, command)]
    done = subprocess.run(
        launcher, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=True
    )
    cost = Cost(**json.loads(done.stdout.splitlines()[-1]))
    if cost.code:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {cost.code}:\n{done.stderr[-2000:]}")
    return cost


def _launch(command: list[str]) -> Cost:
    started = time.monotonic()
    pid = os.posix_spawnp(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    anonymous = 0
    end = os.pidfd_open(pid)  # waited for in the kernel: short commands are timed exactly
    poll = select.poll()
    poll.register(end, select.POLLIN)
    while not poll.poll(POLL * 1000):
        anonymous = max(anonymous, sum(map(_anonymous, _tree(pid))))
    wall = time.monotonic() - started
    _, status, usage = os.wait4(pid, 0)
    return Cost(
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        rss=usage.ru_maxrss * 1024,
        anonymous=anonymous,
        code=os.waitstatus_to_exitcode(status),
    )


def _tree(pid: int) -> list[int]:
    """A process and all that came from it."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def _anonymous(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def file_system(folder: Path) -> str:
    """What a folder lies on: `ext4 on /dev/vda1`."""
    found = "?"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        at = mount.split()[4].replace("\\040", " ")
        if folder.is_relative_to(at):  # the last one that holds it lies on top
            kind, device = rest.split()[:2]
            found = f"{kind} on {device}"
    return found


if __name__ == "__main__":
    print(json.dumps(_launch(sys.argv[1:])._asdict()))
