"""A terse console and a full log: what libraries print goes to the rank's log file, from C++ as well.

File descriptors 1 and 2 are redirected, because gloo, NCCL and compilers write to them directly.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


class Output:
    """Redirects this process's stdout and stderr; `say` reaches the console from rank 0 only."""

    def __init__(self, rank: int, full_log: bool) -> None:
        self.log: Path | None = None
        self._rank = rank
        self._full_log = full_log
        self._console = os.dup(1)
        # Until the run folder is known the text waits in a file without a name.
        self._early = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the redirection
        if not full_log:
            _redirect(self._early.fileno())

    def attach(self, log: Path) -> None:
        """From now on write to this file; what was printed before is moved there."""
        log.parent.mkdir(parents=True, exist_ok=True)
        _flush()
        self._early.seek(0)
        with log.open("ab") as file:
            file.write(self._early.read())
            file.flush()
            if self._full_log:
                # -i: Ctrl-C ends the ranks, and tee after them
                tee = subprocess.Popen(
                    ["tee", "-i", "-a", str(log)], stdin=subprocess.PIPE, stdout=self._console
                )
                assert tee.stdin
                _redirect(tee.stdin.fileno())
                tee.stdin.close()
            else:
                _redirect(file.fileno())
        self.log = log

    def say(self, text: str) -> None:
        """One message for the person who watches, and for the log."""
        if self._full_log and self._rank != 0:
            return  # the console shows every rank's output then, and rank 0 says it
        if self._rank == 0 and not self._full_log:
            self.show(text)
        print(text, flush=True)

    def show(self, text: str) -> None:
        """Write to the console whatever the rank; a console that went away does not stop training."""
        with contextlib.suppress(OSError):
            os.write(self._console, f"{text}\n".encode())


def _redirect(target: int) -> None:
    _flush()
    os.dup2(target, 1)
    os.dup2(target, 2)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
