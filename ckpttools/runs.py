"""Run folders: which checkpoints are in them, and which one a resume would take.

Frameworks leave a pointer beside the checkpoints: `last_checkpoint` (MMEngine and `ckpt train`: a path or a
name) and `latest` (DeepSpeed: a tag). A pointer may be stale after a copy: its last path component is then
looked for beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from ckpttools.checks.findings import ERROR, Verdict
from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.formats import locate, read
from ckpttools.formats.locate import checkpoints
from ckpttools.stores.files import entries, small_text

POINTERS = ("last_checkpoint", "latest")
# copies that ckpt makes beside a checkpoint: not points that a run came by
COPY = re.compile(r".*\.(ws\d+|weights)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A checkpoint of a run. `step` and `epoch` are None where it does not say, or is not `readable`."""

    path: Path
    step: int | None
    epoch: int | float | None
    readable: bool

    @property
    def order(self) -> tuple[bool, int, list[int], float]:
        """Newest last: by the step inside, the numbers in the name, time; unreadable ones after all others.

        A damaged checkpoint hides its step: it is tried first, so that it is named rather than forgotten.
        """
        numbers = [int(n) for n in re.findall(r"\d+", self.path.name)[:4]]
        step = self.step if self.step is not None else -1
        return (not self.readable, step, numbers, self.path.stat().st_mtime)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The checkpoint that was chosen, why, and which newer ones were passed over and why."""

    path: Path
    why: str
    passed_over: tuple[tuple[Path, str], ...] = ()


def candidates(folder: Path) -> list[Candidate]:
    """Every checkpoint directly in a run folder, newest last."""
    found = [path for path in checkpoints(folder) if not COPY.fullmatch(path.name)]
    return sorted(map(_candidate, found), key=lambda candidate: candidate.order)


def _candidate(path: Path) -> Candidate:
    try:
        state = read(locate(path)).train_state
    except CkptError:
        return Candidate(path=path, step=None, epoch=None, readable=False)
    step = state.step if state.step is not None else state.iteration
    return Candidate(path=path, step=step, epoch=state.epoch, readable=True)


def latest(folder: Path) -> Choice:
    """What auto-resume would take. Raises CkptError where a pointer leads nowhere or nothing is there."""
    names = {entry.name for entry in entries(folder)}
    for name in POINTERS:
        if name in names:
            return _pointed(folder, name)
    found = candidates(folder)
    if not found:
        raise nothing(folder)
    newest = next((candidate for candidate in reversed(found) if candidate.readable), found[-1])
    step = f"step {newest.step}" if newest.step is not None else "its name"
    return Choice(path=newest.path, why=f"no pointer file; the newest of {len(found)} by {step}")


def latest_verified(folder: Path, verify: Callable[[Path], Verdict]) -> Choice:
    """The newest checkpoint that passes `verify`, and what is wrong with the newer ones."""
    found = candidates(folder)
    if not found:
        raise nothing(folder)
    passed: list[tuple[Path, str]] = []
    for candidate in reversed(found):
        problem = _problem(candidate.path, verify)
        if problem is None:
            at = f" (step {candidate.step})" if candidate.step is not None else ""
            return Choice(
                path=candidate.path,
                why=f"the newest of {len(found)} that passes every check{at}",
                passed_over=tuple(passed),
            )
        passed.append((candidate.path, problem))
    raise CkptError(
        "none-verified",
        f"none of the {len(found)} checkpoints passes verify",
        where=folder,
        why="\n".join(f"{path.name}: {problem}" for path, problem in passed[:10]),
        hint="ckpt verify each of them, and mend the one with the least damage",
    )


def _problem(path: Path, verify: Callable[[Path], Verdict]) -> str | None:
    try:
        verdict = verify(path)
    except CkptError as error:
        return f"{error.message} [{error.id}]"
    bad = [finding for finding in verdict.findings if finding.severity == ERROR]
    return f"{bad[0].message} [{bad[0].id}]" if bad else None


def nothing(folder: Path) -> CkptError:
    return UsageError(
        "no-checkpoints",
        "the folder holds no checkpoints",
        where=folder,
        why="neither a pointer file nor anything that looks like a checkpoint is directly in it",
        hint="name the run's own folder, where its checkpoints lie",
    )


def _pointed(folder: Path, name: str) -> Choice:
    text = small_text(folder / name, 4096).strip()
    for path, how in _readings(folder, text):
        if path.exists():
            return Choice(path=path, why=f"{name} names {escape(text)}{how}")
    raise CkptError(
        "pointer-dangling",
        f"{name} names {escape(text)}, which is not there",
        where=folder / name,
        why="a resume from this folder would fail, or start anew",
        hint="ckpt latest --verified takes the newest good one",
    )


def _readings(folder: Path, text: str) -> Iterator[tuple[Path, str]]:
    """What a pointer's text can mean: a name beside it, or a path whose last part lies beside it."""
    base = PurePath(text).name
    if base and base not in (".", "..") and base.isprintable():
        moved = "" if base == text else ", found beside the pointer"
        yield folder / base, moved
