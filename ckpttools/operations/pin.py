"""Pinning a checkpoint, so that no clean-up removes it."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from pathlib import Path

from ckpttools.errors import CkptError, Unsupported, UsageError, escape
from ckpttools.formats import locate
from ckpttools.runs import pins
from ckpttools.runs.pins import Pin


def pin(path: str | Path, reason: str | None = None) -> Pin:
    """Write a small file beside a checkpoint that says who keeps it, when and why; an older pin is replaced.

    Raises UsageError where there is no checkpoint.

    >>> import shutil
    >>> copy = shutil.copytree("fixtures/hf-trainer/plain", out / "run")
    >>> pin(copy / "checkpoint-2", "the paper's").reason
    "the paper's"
    >>> unpin(copy / "checkpoint-2").reason
    "the paper's"
    """
    from ckpttools.execute.small import replace

    path = Path(path)
    try:
        locate(path)
    except Unsupported:
        pass  # a layout that is recognised and not read
    except UsageError:
        raise
    except CkptError:
        pass  # a damaged one may be worth keeping, too
    made = Pin(path=path, who=_who(), when=datetime.now(UTC).isoformat(timespec="seconds"), reason=reason)
    try:
        replace(pins.place(path), pins.dump(made))
    except UsageError as error:
        raise UsageError(
            error.id,
            f"the pin cannot be written: {error.message}",
            where=error.where,
            why="a pin is a small file beside the checkpoint; without it a clean-up may take the checkpoint",
            hint="ask who may write there" if error.id == "no-permission" else error.hint,
        ) from None
    return made


def unpin(path: str | Path) -> Pin:
    """Remove the pin on a checkpoint; returns what it said. Raises UsageError where there is none.

    >>> import shutil
    >>> copy = shutil.copytree("fixtures/hf-trainer/plain", out / "other")
    >>> pin(copy / "checkpoint-4").reason, unpin(copy / "checkpoint-4").reason
    (None, None)
    """
    from ckpttools.execute.removing import remove_file

    path = Path(path)
    found = pins.of(path)
    if found is None:
        raise UsageError(
            "not-pinned",
            "the checkpoint is not pinned",
            where=path,
            why="no pin lies beside it, so there is nothing to take back",
            hint="ckpt ls shows what is pinned",
        )
    try:
        remove_file(pins.place(path))
    except OSError as error:
        raise UsageError(
            "no-permission",
            f"the pin cannot be removed: {escape(error.strerror)}",
            where=pins.place(path),
            why="until then no clean-up takes the checkpoint",
            hint="ask the owner of its folder, or run it as the user who pinned it",
        ) from None
    return found


def _who() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        return None
