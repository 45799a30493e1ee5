"""Runs: which checkpoints lie in a folder, in which order they were made, and which one a resume takes.

find     every checkpoint below a folder, newest first, through the layouts of experiments
order    what newer means: one counter that all state, else the numbers in names, else time
choose   the newest that can be resumed from, why, and what contradicts it

There is no second answer to "which is the newest": `latest`, `resume-check`, `inspect`, `verify --newest`
and `ckpt train --resume` ask here.
"""

from __future__ import annotations

from ckpttools.runs.choose import Choice, newest, newest_verified
from ckpttools.runs.find import Entry, find

__all__ = ["Choice", "Entry", "find", "newest", "newest_verified"]
