"""What kind of point a checkpoint is, by its name and what it says: step, epoch, best, final.

    iter_001500.pth, global_step500, step_30.pt, epoch=0-step=3.ckpt    step
    epoch_012.pth, checkpoint_epoch_4.pth                               epoch
    checkpoint-20, checkpoint-5.pth.tar                                 by the counter inside that it names
    best_model.pt, best_acc_epoch_3.pth                                 best
    last.ckpt, final_model.pt                                           final

A series is what one run writes again and again: its names differ in these numbers, and in what was measured,
alone. Any other number may be a seed, a fold or a setting (fold=1-epoch=3.ckpt, lr=0.01-step=9.ckpt): another
one makes another series, and a name of which nothing says what its number counts (rep_1.pt) is of none.
"""

from __future__ import annotations

import re
from typing import Literal

from ckpttools.runs.find import Entry
from ckpttools.stores.files import is_folder

Kind = Literal["step", "epoch", "best", "final"]

_BEST = re.compile(r"(^|[^a-z])best([^a-z]|$)", re.IGNORECASE)
_FINAL = re.compile(r"(^|[^a-z])(final|last)([^a-z]|$)", re.IGNORECASE)
_STEP = re.compile(r"(?:iteration|(?<![a-z])iter|(?<![a-z])(?:global)?steps?)[-_=]?\d+", re.IGNORECASE)
_EPOCH = re.compile(r"(?:epoch|(?<![a-z])ep)[-_=]?\d+", re.IGNORECASE)
_PLAIN = re.compile(r"(?:checkpoint|ckpt|model|snapshot)[-_](\d+)", re.IGNORECASE)
# Lightning writes what was measured into names, too: epoch=3-step=99-val_loss=0.12
_MEASURED = re.compile(
    r"[a-z_/.]*(?<![a-z])(?:loss|acc|accuracy|err|error|f1|auc|auroc|m?iou|m?ap|ppl|perplexity|bleu|[wc]er|psnr"
    r"|ssim|dice|r?mse|mae|score|reward|metric)=-?\d+(?:\.\d+)?(?:e[-+]?\d+)?",
    re.IGNORECASE,
)


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
    left = _EPOCH.sub("", _STEP.sub("", name))
    left = _PLAIN.sub("", name) if left == name else left
    return None if left == name else re.sub(r"[-_]+", "_", _MEASURED.sub("", left))


def ahead(entry: Entry) -> int:
    """How far the number in a name is ahead of the epoch that is stated: the same throughout a series. It is
    0 where the name says what it counts, or nothing is stated."""
    name, epoch = entry.path.name, entry.state.epoch
    plain = _PLAIN.search(name)
    says = plain is None or _STEP.search(name) or _EPOCH.search(name) or kind(entry) != "epoch"
    return 0 if says or plain is None or epoch is None else int(plain[1][:18]) - int(epoch)
