"""`ckpt`: each command parses its options, makes one library call, renders the result and exits.

Commands live in one module each and are imported only when they run, so that `ckpt --help` stays fast.
Exit codes: 0 done or clean, 1 the checkpoint has a problem, 2 could not run.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console scripts `ckpt` and `ckpttools`; Ctrl-C while the program loads ends it."""
    try:
        from ckpttools.cli import app
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing was begun\n")
        sys.exit(130)
    app.main(argv)
