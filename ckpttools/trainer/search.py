"""Which checkpoint a launch with --resume takes: the newest that verifies, and what was passed over.

A checkpoint that the machine lost in the middle of a save, or whose disk lies, must neither stop a job that
has an older good one nor be loaded: every byte is checked first, as `ckpt verify` does.
"""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from ckpttools import runs
from ckpttools.checks import verify
from ckpttools.errors import CkptError, UsageError, counted, escape
from ckpttools.findings import Finding, errors, of_error
from ckpttools.formats.tags import LATEST
from ckpttools.stores.files import is_file, local, small_text
from ckpttools.trainer import folders

SHOWN = 8  # names of checkpoints, before the rest is only counted


class Found(Struct, frozen=True, kw_only=True):
    """The checkpoint that was chosen, None where there is none, and the sentences that say why."""

    path: Path | None
    notes: tuple[str, ...]


def search(folder: Path) -> Found:
    """The newest good checkpoint of a run folder, or of all run folders of an experiment.

    Raises CkptError where there are checkpoints and all are damaged: starting anew would hide the loss.
    """
    found, behind = _ordered(folder)
    if not found:
        return Found(path=None, notes=(f"No checkpoint found under {folder}: starting from step 0",))
    notes = [f"Searched {folder}: {_listed(found, folder)}", *behind]
    for path in found:
        if not (damage := damaged(path)):
            newest = " of those that verify" if path != found[0] else ""
            notes.append(f"Auto resumed from the latest checkpoint{newest} {path}")
            return Found(path=path, notes=tuple(notes))
        notes.append(f"Passed over {path}: {_said(damage)}")
    raise CkptError(
        "none-verified",
        f"none of the {len(found)} checkpoints passes verify",
        where=folder,
        why="\n".join(notes[1 : SHOWN + 1]),
        hint=f"ckpt verify {found[0]}\nleave out --resume to start anew",
    )


def newest_first(folder: Path) -> list[Path]:
    """The trainer's checkpoints below a folder: what a resume takes, then the others, newest first. Damaged
    ones that are newer than that stand in front, for the search to pass over."""
    return _ordered(folder)[0]


def _ordered(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The same, and what is said of a pointer that is followed and does not name the furthest."""
    if not folder.is_dir():
        return [], ()
    entries = [(entry, path) for entry in runs.find(folder) if (path := folders.resumable(entry)) is not None]
    found = [path for _, path in entries]
    try:
        taken = local(runs.newest(folder).path)
    except CkptError:  # a pointer that leads nowhere, or nothing at all: what is there counts
        return list(dict.fromkeys(found)), ()
    taken = folders.tag_of(taken) or taken
    if taken not in found:
        named = [name for name in (folders.POINTER, LATEST) if taken.name == _text(taken.parent / name)]
        note = (
            f"Passed over {taken}, which {' and '.join(named)} names: it holds no checkpoint to resume from"
        )
        return list(dict.fromkeys(found)), (note,) if named and found else ()
    at = found.index(taken)
    one, newer = entries[at][0], entries[:at]
    lost = [path for entry, path in newer if entry.problem is not None]
    ahead = [(entry, path) for entry, path in newer if entry.problem is None and entry.at != one.at]
    if one.problem is not None:  # it is passed over itself
        ahead = []
    notes = (
        f"careful: {escape(path.name)} is further on ({entry.at or '?'}) than what the pointer names, "
        f"{escape(taken.name)} ({one.at or '?'}): what came in between is trained again"
        for entry, path in ahead[:1]
    )
    return list(dict.fromkeys((*lost, taken, *found))), tuple(notes)


def _text(pointer: Path) -> str | None:
    return Path(small_text(pointer, 4096).strip()).name if is_file(pointer) else None


def check(checkpoint: Path, *, weights_only: bool) -> None:
    """Raise CkptError where a checkpoint that somebody named is damaged in what will be loaded."""
    damage = damaged(checkpoint)
    if weights_only:
        damage = [finding for finding in damage if "_optim_states" not in Path(finding.file).name]
    if damage:
        first = damage[0]
        raise CkptError(
            first.id,
            first.message,
            where=checkpoint / first.file if first.file else checkpoint,
            why=f"{first.why}\nno rank was started" if first.why else "no rank was started",
            hint=f"ckpt verify {checkpoint}\n--resume without --resume-from takes the newest good checkpoint",
        )


def damaged(checkpoint: Path) -> list[Finding]:
    """The errors that verify finds. Raises UsageError where it cannot be read at all."""
    try:
        return errors(verify(checkpoint).findings)
    except UsageError:
        raise
    except CkptError as error:
        return [of_error(error)]


def _listed(found: list[Path], folder: Path) -> str:
    names = [str(path.relative_to(folder)) for path in found[:SHOWN]]
    more = f" and {len(found) - SHOWN} older" if len(found) > SHOWN else ""
    return f"{counted(len(found), 'checkpoint')}, newest first: {', '.join(names)}{more}"


def _said(damage: list[Finding]) -> str:
    first = damage[0]
    more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
    return f"{escape(Path(first.file).name)}: {escape(first.message, 300)} [{first.id}]{more}"
