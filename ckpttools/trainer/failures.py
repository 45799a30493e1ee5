"""Errors that cross processes: from a rank to the launcher, which shows one clear message."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpttools.errors import CkptError, UsageError

FILE = "error.json"
SAID = "errors.txt"


def as_error(problem: BaseException, where: str | Path = "") -> CkptError:
    """A CkptError as it is; anything else as one that points at the log."""
    if isinstance(problem, CkptError):
        return problem
    lines = [line for line in str(problem).splitlines() if line.strip()]
    kind = UsageError if isinstance(problem, OSError) else CkptError  # no space, no permission: exit code 2
    return kind(
        "train-crash",
        f"{type(problem).__name__}: {lines[0] if lines else 'no message'}",
        where=where,
        why="training stopped; the checkpoints that were complete by then can be resumed from",
        hint="the log above has the traceback" if where else "run again with --full-log to see everything",
    )


def to_fields(error: CkptError) -> dict[str, Any]:
    """Plain data; the exception itself does not survive pickling, because its arguments have names."""
    return {name: getattr(error, name) for name in ("id", "message", "where", "why", "hint", "exit_code")}


def from_fields(fields: dict[str, Any]) -> CkptError:
    """The error that `to_fields` described."""
    kind = UsageError if fields["exit_code"] == UsageError.exit_code else CkptError
    texts = {name: fields[name] for name in ("where", "why", "hint")}
    return kind(fields["id"], fields["message"], **texts)


def write(folder: Path, error: CkptError) -> None:
    """Leave the error for the launcher; the first rank to fail is the one that knows the cause.

    It is there as a whole or not at all: torchrun ends this rank as soon as another one has left.
    """
    own = folder / f"{FILE}.{os.getpid()}"
    own.write_text(json.dumps(to_fields(error)), "utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(own, folder / FILE)


def say_once(folder: Path, text: str, say: Callable[[str], None]) -> None:
    """Show an error that several ranks of a node share once, whichever of them comes first.

    The others wait here until it is shown: the first rank that leaves makes torchrun end the rest.
    """
    with (folder / SAID).open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if text not in file.read():
            say(text)
            file.write(f"{text}\n")


def read(folder: Path) -> CkptError | None:
    """The error that a rank left, if one did."""
    try:
        return from_fields(json.loads((folder / FILE).read_text("utf-8")))
    except (OSError, ValueError):
        return None
