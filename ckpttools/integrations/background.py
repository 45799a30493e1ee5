"""python -m ckpttools.integrations.background CHECKPOINT RULES: verify, manifest, `last_verified`, prune.

At the lowest priority, one at a time for each folder. Prints one JSON document: {"problem": the fields of an
error, or null; "notes": what was done}. RULES is [keep_last, per_kind, keep_best] as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckpttools import runs
from ckpttools.errors import CkptError
from ckpttools.execute.small import locked, replace
from ckpttools.integrations.guard import LAST_VERIFIED, damage, drop_manifests
from ckpttools.operations.prune import carry_out, plan_of
from ckpttools.runs import extent
from ckpttools.runs.retain import Policy
from ckpttools.stores.files import exists, small_text

LOCK = ".ckpt-verifying"


def main(checkpoint: Path, keep_last: int | None, per_kind: bool, keep_best: str | None) -> dict[str, Any]:
    """Do all of it; what it says is for the guard that started it."""
    os.nice(19)
    folder = checkpoint.parent
    with locked(folder / LOCK):
        if not exists(checkpoint):
            return _said(None, f"{checkpoint.name} went before it was read")
        before = extent(checkpoint)
        problem = damage(checkpoint)
        if extent(checkpoint) != before:
            return _said(None, _again(checkpoint))
        if problem is not None:
            return _said(problem)
        command = ["verify", str(checkpoint), "--write-manifest", "--quiet", "--workers=1"]
        done = subprocess.run(
            [sys.executable, "-m", "ckpttools.cli", *command], capture_output=True, text=True
        )
        if extent(checkpoint) != before:
            drop_manifests(checkpoint, time.time_ns())  # of what was read before
            return _said(None, _again(checkpoint))
        if done.returncode != 0:
            return _said(None, f"{checkpoint.name} was not verified: {done.stderr.strip()}")
        _name(folder, checkpoint)
        notes = [f"{checkpoint} verified: every byte"]
        if keep_last is not None or keep_best is not None:
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
        named = folder / small_text(folder / LAST_VERIFIED, 4096)
        if extent(named)[0] > extent(checkpoint)[0]:
            return
    replace(folder / LAST_VERIFIED, checkpoint.name.encode())


def _said(problem: CkptError | None, *notes: str) -> dict[str, Any]:
    if problem is None:
        return {"problem": None, "notes": notes}
    fields = {name: getattr(problem, name) for name in ("id", "message", "where", "why", "hint")}
    return {"problem": fields, "notes": notes}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *json.loads(sys.argv[2]))))
