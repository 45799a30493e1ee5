"""Runs: which checkpoints lie in a folder, in which order they were made, and which one a resume takes.

find     every checkpoint below a folder, newest first, through the layouts of experiments
order    what newer means: one counter that all state, else the numbers in names, else time
choose   the newest that can be resumed from, why, and what contradicts it
kinds    step, epoch, best, final; what is one of a series
pins     the small file that keeps a checkpoint
needs    what else names a checkpoint, or needs it
retain   which ones stay: a policy, and what overrules it

There is no second answer to "which is the newest": `latest`, `resume-check`, `inspect`, `verify --newest`
and `ckpt train --resume` ask here.
"""

from __future__ import annotations

from ckpttools.runs.choose import Choice, choice, newest, newest_verified, nothing
from ckpttools.runs.find import Entry, extent, find, grouped, holds_others, own, paths, runs

__all__ = [
    "Choice",
    "Entry",
    "choice",
    "extent",
    "find",
    "grouped",
    "holds_others",
    "newest",
    "newest_verified",
    "nothing",
    "own",
    "paths",
    "runs",
]
