"""What the callbacks share: headers at once, all bytes in the background, then what may go.

After a save the main process checks headers (milliseconds). A process of the lowest priority then reads every
byte, writes the manifest, names the checkpoint in `last_verified` and removes old ones by the rules of
`ckpt prune`. It is asked how it went at the next save, and waited for at the end.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from msgspec import Struct, field

from ckpttools import checks, manifest, runs
from ckpttools.checks import Verdict, refused
from ckpttools.errors import CkptError
from ckpttools.execute.removing import remove_file
from ckpttools.findings import errors
from ckpttools.siblings import MANIFEST
from ckpttools.stores.files import is_folder, local, stat, walk

log = logging.getLogger("ckpttools")


class Rules(Struct, frozen=True, kw_only=True):
    """`keep_last` and `keep_best` as in `ckpt prune`; neither: nothing is removed. On damage a run goes on
    with an error in the log ("log"), or stops ("raise")."""

    keep_last: int | None = None
    per_kind: bool = False
    keep_best: str | None = None
    every_byte: bool = True
    on_damage: Literal["log", "raise"] = "log"

    def arguments(self) -> list[str]:
        """As background.py reads them."""
        return [json.dumps([self.keep_last, self.per_kind, self.keep_best])]


class Guard(Struct, kw_only=True):
    """Of one run, on its main process. `seconds` is what the run itself waited for it, altogether."""

    rules: Rules
    seconds: float = 0.0
    _running: list[tuple[Path, subprocess.Popen[str]]] = field(default_factory=list)

    def saved(self, checkpoint: Path) -> None:
        """To be called when every rank has written its files. Raises CkptError where `on_damage` says so."""
        started = time.perf_counter()
        try:
            self.poll()
            drop_manifests(checkpoint, runs.extent(checkpoint)[0])
            problem = damage(checkpoint, quick=True)
            if problem is not None:
                self._tell(checkpoint, problem)
            elif self.rules.every_byte:
                self._read_all(checkpoint)
        finally:
            self.seconds += time.perf_counter() - started

    def _read_all(self, checkpoint: Path) -> None:
        command = [sys.executable, "-m", "ckpttools.integrations.background", str(checkpoint)]
        self._running.append(
            (
                checkpoint,
                subprocess.Popen([*command, *self.rules.arguments()], stdout=subprocess.PIPE, text=True),
            )
        )

    def poll(self, *, wait: bool = False) -> None:
        """Hear of what was read meanwhile. Raises CkptError where `on_damage` says so."""
        ended = [each for each in self._running if wait or each[1].poll() is not None]
        for checkpoint, process in ended:
            self._running.remove((checkpoint, process))
            out, _ = process.communicate()
            self._hear(checkpoint, out, process.returncode)

    def close(self) -> None:
        """Wait until all is read, at the end of a run."""
        self.poll(wait=True)

    def _hear(self, checkpoint: Path, text: str, code: int) -> None:
        try:
            heard = json.loads(text)
        except ValueError:
            log.warning("%s was not verified: its reader ended with code %d", checkpoint, code)
            return
        for note in heard["notes"]:
            log.info("%s", note)
        if heard["problem"] is not None:
            self._tell(checkpoint, CkptError(**heard["problem"]))

    def _tell(self, checkpoint: Path, problem: CkptError) -> None:
        log.error("%s is damaged: %s", checkpoint, problem)
        if self.rules.on_damage == "raise":
            raise problem


def damage(checkpoint: Path, *, quick: bool = False) -> CkptError | None:
    """What is wrong with a checkpoint; None also where that could not be found out."""
    return problem_of(checkpoint, read(checkpoint, quick=quick), quick=quick)


def read(checkpoint: Path, *, quick: bool = False, describe: bool = False) -> Verdict:
    """The verdict on it, also where it could not be read; `describe` it for a manifest."""
    try:
        return checks.verify(checkpoint, quick=quick, describe=describe, workers=int(describe))
    except CkptError as error:
        return refused(checkpoint, error)


def problem_of(checkpoint: Path, verdict: Verdict, *, quick: bool = False) -> CkptError | None:
    """The first damage of a verdict. A quick look is for what was saved just now: another reader may still
    write the manifest of what was before."""
    found = [each for each in errors(verdict.findings) if each.exit_code == 1]
    first = next((each for each in found if not (quick and each.id == "manifest-mismatch")), None)
    if first is None:
        return None
    where = checkpoint / first.file if first.file else checkpoint
    return CkptError(first.id, first.message, where=where, why=first.why, hint=f"ckpt verify {checkpoint}")


def drop_manifests(checkpoint: Path, than: int) -> None:
    """Remove manifests of a checkpoint that were written before `than`, in ns: of files that lay there under
    the same names, and were saved again since, by a resumed run or as `last.ckpt`."""
    inside = [path for path, entry in walk(checkpoint) if entry.name.endswith(MANIFEST)]
    for path in inside if is_folder(checkpoint) else [manifest.beside(checkpoint)]:
        with suppress(OSError):
            if stat(path).mtime_ns < than:
                remove_file(local(path))


def refuse_damaged(checkpoint: Path) -> None:
    """Raise CkptError where a resume would take a damaged checkpoint; every byte is read."""
    problem = damage(checkpoint)
    if problem is not None:
        problem.why = f"{problem.why}\nnothing was trained".lstrip()
        problem.hint = f"ckpt latest {checkpoint.parent} --verified names the newest good one"
        raise problem


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint of the folder's own run that verifies, None where there is none at all: what lies
    in folders below is of other runs. Raises CkptError where there are some and all are damaged.
    """
    if not is_folder(folder):
        return None
    found = runs.own(folder)
    if not found:
        for path in runs.paths(folder)[:1]:
            log.warning("%s itself holds no checkpoint; %s is of another run: not taken", folder, path)
        return None
    return local(runs.newest_verified(folder, checks.verify, [found]).path)
