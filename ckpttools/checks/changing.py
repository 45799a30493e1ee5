"""Whether a checkpoint changed while it was read: then what was found holds for no state that it ever had.

A save may be going on, or a clean-up. Such a checkpoint is neither good nor damaged: it could not be checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ckpttools.checks.beside import TENSOR_FILES
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.findings import ERROR, Finding
from ckpttools.frameworks import POINTERS
from ckpttools.location import Location, Stat
from ckpttools.stores.files import entries, is_folder, is_link, stat

MAX_DEPTH = 4  # folders below a checkpoint
# rewritten by every save of a run, also where the checkpoint at hand is left alone
REWRITTEN = (*POINTERS, "checkpoint", "zero_to_fp32.py")

READ = (*TENSOR_FILES, ".json")  # of what lies beside a checkpoint: logs grow, and say nothing of it
# seconds: written so lately that a save may be going on; how often and how long each time it is waited for
YOUNG, PAUSES, PAUSE = 2.0, 10, 0.05

CHANGING = "checkpoint-changing"
Stamps = dict[Location, Stat | None]  # None for a folder


class Watch:
    """Looks at the files of a checkpoint before they are read, and again afterwards."""

    def __init__(self, path: Location) -> None:
        self._looks: list[tuple[Callable[[], Stamps], Stamps]] = []
        self._add(lambda: dict(_stamps(path, depth=0)))
        self._path = path

    def below(self, target: Location) -> None:
        """Watch also everything in the checkpoint's own folder."""
        if target != self._path or is_folder(target):
            self._add(lambda: dict(_stamps(target, depth=MAX_DEPTH)))

    def _add(self, look: Callable[[], Stamps]) -> None:
        self._looks.append((look, look()))

    def changed(self, *, pointers: bool) -> Location | None:
        """A file that appeared, vanished or was written to; of what lies beside a tag folder, only what is
        read, and pointers and other tags only where they are asked for.
        """
        for number, (look, before) in enumerate(self._looks):
            now = look()
            for path in sorted(before.keys() | now.keys(), key=str):
                if path in before and path in now and before[path] == now[path]:
                    continue
                is_folder = None in (before.get(path, 0), now.get(path, 0))
                other = is_folder or path.name in REWRITTEN
                if number or path == self._path or (pointers if other else path.name.endswith(READ)):
                    return path
        return None

    def _changed_soon(self) -> Location | None:
        """A file that changes in a moment, where one was written a moment ago."""
        _, before = self._looks[-1]
        stamps = (stamp for stamp in before.values() if stamp is not None)
        newest = max((stamp.mtime_ns for stamp in stamps), default=0)
        return in_a_moment(partial(self.changed, pointers=True), self._path, newest)

    def refuse(self, findings: tuple[Finding, ...]) -> None:
        """Raise UsageError where something changed; pointers and other tags count if they may explain an
        error.
        """
        bad = [finding for finding in findings if finding.severity == ERROR]
        path = self.changed(pointers=bool(bad))
        if path is None and any(finding.exit_code == 1 for finding in bad):
            path = self._changed_soon()
        if path is not None:
            raise changing(path)

    def change(self, error: CkptError | OSError) -> UsageError | None:
        """A change, where it may be the reason for the error."""
        path = self.changed(pointers=True)
        if path is None and isinstance(error, CkptError) and error.exit_code == 1:
            path = self._changed_soon()
        return changing(path) if path is not None else None

    def explain(self, error: CkptError | OSError) -> CkptError:
        """The error, unless a change is the reason for it."""
        if (change := self.change(error)) is not None:
            return change
        if isinstance(error, CkptError):
            return error
        return UsageError(
            "not-readable",
            f"cannot be read: {escape(error.strerror)}",
            where=str(error.filename or self._path),
            why="it was there when the folder was listed",
            hint="check permissions and the file system, then run it again",
        )


@contextmanager
def watched(*paths: Location) -> Iterator[tuple[Watch, ...]]:
    """Watch checkpoints while they are read for an answer about what they hold.

    Raises UsageError where one changed meanwhile, instead of what else was raised.
    """
    watches = tuple(Watch(path) for path in paths)
    try:
        yield watches
    except (CkptError, OSError) as error:
        for watch in watches:
            if (change := watch.change(error)) is not None:
                raise change from error
        raise
    for watch in watches:
        watch.refuse(())


def in_a_moment(look: Callable[[], Location | None], path: Location, written: int) -> Location | None:
    """What `look` finds to have changed, as long as what was written last (ns) is young: a save may be slow
    to go on. What lies in a store appears there whole.
    """
    for _ in range(PAUSES if isinstance(path, Path) else 0):
        if time.time() - written / 1e9 > YOUNG:
            return None
        time.sleep(PAUSE)
        if (found := look()) is not None:
            return found
    return None


def changing(path: Location) -> UsageError:
    return UsageError(
        CHANGING,
        "the checkpoint changed while it was read",
        where=path,
        why="it is neither good nor damaged: a save or a clean-up is going on",
        hint="run it again when that is done, or name an older checkpoint",
    )


def _stamps(path: Location, depth: int) -> Iterator[tuple[Location, Stat | None]]:
    """Of a file, or of all that a folder holds down to `depth` folders; nothing of what is not there."""
    try:
        found = stat(path)
        if found.kind != "folder":
            yield path, found
            return
        inside = entries(path)
    except (OSError, CkptError):
        return
    for entry in inside:
        place = path / entry.name
        if is_folder(entry):
            yield place, None
            if depth and not is_link(entry):
                yield from _stamps(place, depth - 1)
        else:
            yield from _stamps(place, 0)
