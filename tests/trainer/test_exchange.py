"""The folder that launcher and ranks share does not outlive a launcher that is killed for long."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

HOLD = (
    "import sys, subprocess\n"
    "from ckpttools.trainer.exchange import exchange\n"
    "with exchange() as (folder, held):\n"
    "    wait = [sys.executable, '-c', 'input()']\n"
    "    child = subprocess.Popen(wait, pass_fds=(held,)) if sys.argv[1:] else None\n"
    "    print(folder, flush=True)\n"
    "    input()\n"
)


def start(tmp_path: Path, *options: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *options],
        env={"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("options", [(), ("ranks that go on",)])
def test_the_next_launch_clears_up_after_a_killed_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    (killed, left), (alive, used) = start(tmp_path, *options), start(tmp_path)
    foreign = tmp_path / "ckpt-train-mine"  # nobody of ours has made it
    foreign.mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert left.is_dir()
    again, own = start(tmp_path)
    assert used.is_dir() and own.is_dir() and foreign.is_dir()
    assert left.is_dir() is bool(options)  # its ranks still hold it
    for process in (alive, again):
        process.communicate("\n")
        assert process.returncode == 0
    assert killed.stdin
    killed.stdin.close()
    killed.stdout.close() if killed.stdout else None
    assert not used.exists() and not own.exists()
