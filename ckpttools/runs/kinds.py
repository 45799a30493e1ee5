"""What kind of point a checkpoint is, by its name and what it says: step, epoch, best, final.

    iter_001500.pth, global_step500, step_30.pt, epoch=0-step=3.ckpt    step
    epoch_012.pth, checkpoint_epoch_4.pth                               epoch
    checkpoint-20, checkpoint-5.pth.tar                                 by the counter inside that it names
    best_model.pt, best_acc_epoch_3.pth                                 best
    last.ckpt, final_model.pt                                           final

A series is what one run writes again and again: its names differ in these numbers alone. A number of which
neither the name nor the file says what it counts may be a seed or a fold: that is no series.
"""

from __future__ import annotations

import re
from typing import Literal

from ckpttools.runs.find import Entry
from ckpttools.stores.files import is_folder

Kind = Literal["step", "epoch", "best", "final"]

_BEST = re.compile(r"(^|[^a-z])best([^a-z]|$)", re.IGNORECASE)
_FINAL = re.compile(r"(^|[^a-z])(final|last)([^a-z]|$)", re.IGNORECASE)
_STEP = re.compile(r"(?:iteration|iter|global_step|steps|step)[-_=]?\d+", re.IGNORECASE)
_EPOCH = re.compile(r"(?:epoch|ep)[-_=]?\d+", re.IGNORECASE)
_PLAIN = re.compile(r"(?:checkpoint|ckpt|model|snapshot)[-_](\d+)", re.IGNORECASE)
# Lightning writes values into names, too: epoch=3-step=99-val_loss=0.12
_VALUE = re.compile(r"[A-Za-z_/]+=-?\d+(\.\d+)?")


def kind(entry: Entry) -> Kind | None:
    """None where neither the name nor the counters tell."""
    name = entry.path.name
    if _BEST.search(name):
        return "best"
    if _FINAL.search(name):
        return "final"
    if _STEP.search(name):
        return "step"
    if _EPOCH.search(name):
        return "epoch"
    plain = _PLAIN.search(name)
    if plain is None:
        return None
    number, state = int(plain[1][:18]), entry.state
    if number in (state.step, state.iteration):
        return "step"
    if state.epoch is not None and state.step is None and state.iteration is None:
        # timm counts epochs alone; other loops save the number of the next one, or of the last
        return "epoch" if abs(state.epoch - number) <= 1 else None
    nothing_said = state.step is None and state.iteration is None
    return "step" if nothing_said and entry.resumes and is_folder(entry.path) else None


def series(entry: Entry) -> str | None:
    """What the names of its series share; None for one that is not written again and again."""
    name = entry.path.name
    if _BEST.search(name) or _FINAL.search(name):
        return None
    if entry.problem is None and kind(entry) is None:
        return None  # of a damaged one the others of its series tell
    left = name
    for pattern in (_VALUE, _STEP, _EPOCH, _PLAIN):
        left = pattern.sub("", left)
    return None if left == name else re.sub(r"[-_]+", "_", left)
