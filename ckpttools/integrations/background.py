"""python -m ckpttools.integrations.background CHECKPOINT RULES: verify, manifest, `last_verified`, prune.

At the lowest priority, one at a time for each folder. Prints one JSON document: {"problem": the fields of an
error, or null; "notes": what was done}. RULES is [keep_last, per_kind, keep_best] as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckpttools import runs
from ckpttools.errors import CkptError
from ckpttools.execute.small import locked, replace
from ckpttools.findings import errors
from ckpttools.integrations.guard import drop_manifests, problem_of, read
from ckpttools.runs import extent
from ckpttools.runs.retain import Policy
from ckpttools.siblings import VERIFIED
from ckpttools.stores.files import exists, local, small_text

LOCK = ".ckpt-verifying"


def main(checkpoint: Path, keep_last: int | None, per_kind: bool, keep_best: str | None) -> dict[str, Any]:
    """Do all of it; what it says is for the guard that started it."""
    os.nice(19)
    folder = checkpoint.parent
    with locked(folder / LOCK):
        if not exists(checkpoint):
            return _said(None, f"{checkpoint.name} went before it was read")
        before = extent(checkpoint)
        verdict = read(checkpoint, describe=True)
        if extent(checkpoint) != before:
            return _said(None, _again(checkpoint))
        problem = problem_of(checkpoint, verdict)
        if problem is not None:
            return _said(problem)
        if not verdict.ok or verdict.manifest is None:
            why = next((each.text for each in errors(verdict.findings)), "its layout has no manifest")
            return _said(None, f"{checkpoint.name} was not verified: {why}")
        place, contents = verdict.manifest
        replace(local(place), contents, unseen=True)
        if extent(checkpoint) != before:
            drop_manifests(checkpoint, time.time_ns())  # of what was read before
            return _said(None, _again(checkpoint))
        _name(folder, checkpoint)
        notes = [f"{checkpoint} verified: every byte"]
        if keep_last is not None or keep_best is not None:
            from ckpttools.operations.prune import carry_out, plan_of  # the start is most of the time

            try:
                policy = Policy(last=keep_last, per_kind=per_kind, best=keep_best)
                plan = plan_of(folder, policy, found=[runs.own(folder)])  # those below are other runs
                carry_out(plan)
                notes += [f"removed {entry.path}" for entry in plan.removed]
            except CkptError as error:
                notes.append(f"nothing more was removed: {error}")
        return _said(None, *notes)


def _again(checkpoint: Path) -> str:
    return f"{checkpoint.name} was saved again while it was read; the next reader takes it"


def _name(folder: Path, checkpoint: Path) -> None:
    """Only forward: of two that wait for the lock the later one may get it first."""
    with suppress(OSError, CkptError):
        named = folder / small_text(folder / VERIFIED, 4096)
        if extent(named)[0] > extent(checkpoint)[0]:
            return
    replace(folder / VERIFIED, checkpoint.name.encode())


def _said(problem: CkptError | None, *notes: str) -> dict[str, Any]:
    if problem is None:
        return {"problem": None, "notes": notes}
    fields = {name: getattr(problem, name) for name in ("id", "message", "where", "why", "hint")}
    return {"problem": fields, "notes": notes}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *json.loads(sys.argv[2]))))
