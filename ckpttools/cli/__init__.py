"""`ckpt`: each command parses its options, makes one library call, renders the result and exits.

Commands live in one module each and are imported only when they run, so that `ckpt --help` stays fast.
Exit codes: 0 done or clean, 1 the checkpoint has a problem, 2 could not run.
"""

from __future__ import annotations

from ckpttools.cli.app import main

__all__ = ["main"]
