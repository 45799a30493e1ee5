"""What kind of point a checkpoint is, by its name and what it says: step, epoch, best, final.

    iter_001500.pth, global_step500, step_30.pt, epoch=0-step=3.ckpt    step
    epoch_012.pth, checkpoint_epoch_4.pth                               epoch
    checkpoint-20, checkpoint-5.pth.tar                                 by the counter inside that it names
    best_model.pt, best_acc_epoch_3.pth                                 best
    last.ckpt, final_model.pt                                           final

A series is what one run writes again and again: its names differ in these numbers, and in what was measured,
alone. Any other number may be a seed, a fold or a setting (fold=1-epoch=3.ckpt, lr=0.01-step=9.ckpt), and so
may all but the last of several steps or epochs (warmup_steps=100-step=9): another one makes another series,
and a name of which nothing says what its number counts (rep_1.pt) is of none.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Literal

from ckpttools.runs.find import Entry
from ckpttools.stores.files import is_folder

Kind = Literal["step", "epoch", "best", "final"]

_BEST = re.compile(r"(^|[^a-z])best([^a-z]|$)", re.IGNORECASE)
_FINAL = re.compile(r"(^|[^a-z])(final|last)([^a-z]|$)", re.IGNORECASE)
_ITER = re.compile(r"(?:iteration|(?<![a-z])iter)[-_=]?\d+", re.IGNORECASE)
_STEP = re.compile(r"(?<![a-z])(?:global)?steps?[-_=]?\d+", re.IGNORECASE)
_EPOCH = re.compile(r"(?:epoch|(?<![a-z])ep)[-_=]?\d+", re.IGNORECASE)
_PLAIN = re.compile(r"(?:checkpoint|ckpt|model|snapshot)[-_](\d+)", re.IGNORECASE)
# before a number of steps or epochs that is a setting
_SETTING = re.compile(
    r"(?<![a-z])(?:warm_?up|accum[a-z]*|grad[a-z]*|max|min|total|num|n|decay|pre_?train(?:ed|ing)?|freeze|frozen"
    r"|unfreeze|start|from|init|every|per|hold|cycle)[-_]?",
    re.IGNORECASE,
)
# a file of several that are saved together, by its rank or by what it holds
_ROLE = re.compile(
    r"(?<![a-z])(?:(?:rank|shard|part|[dtpm]p)[-_=]?\d+|(?:net)?[gd]|generator|discriminator|model|net|weights"
    r"|optim(?:izer)?|sched(?:uler)?|ema|state|unet|vae|encoder|decoder)(?![a-z])",
    re.IGNORECASE,
)
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
    if _last(_ITER, name) or _last(_STEP, name):
        return "step"
    if _last(_EPOCH, name):
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
    found = counts(name)
    return re.sub(r"[-_]+", "_", _MEASURED.sub("", _without(name, found))) if found else None


def together(entry: Entry) -> Hashable | None:
    """What the files of one save share, each of another series: model_step_9.pt and optimizer_step_9.pt, the
    files of ranks. None where `series` is."""
    own = series(entry)
    return None if own is None else (_ROLE.sub("", own), *point(entry))


def point(entry: Entry) -> tuple[str, ...]:
    """What the name counts: ("epoch3", "step99")."""
    name = entry.path.name.lower()
    said = (re.sub(r"[-_=]", "", name[slice(*each)]) for each in counts(name))
    return tuple(re.sub(r"(?<!\d)0+(?=\d)", "", each) for each in said)


def is_counted(name: str) -> bool:
    """Whether a name is one of those that a run gives to its checkpoints, by what it counts."""
    return bool(counts(name))


def counts(name: str) -> tuple[tuple[int, int], ...]:
    """Where in a name its own counters are: the last step, and the last epoch, that are no settings."""
    found = tuple(sorted(filter(None, (_last(pattern, name) for pattern in (_ITER, _STEP, _EPOCH)))))
    plain = None if found else _last(_PLAIN, name)
    return found if plain is None else (plain,)


def _last(pattern: re.Pattern[str], name: str) -> tuple[int, int] | None:
    spans = [match.span() for match in pattern.finditer(name)]
    spans = [(at, end) for at, end in spans if not any(m.end() == at for m in _SETTING.finditer(name, 0, at))]
    return spans[-1] if spans else None


def _without(name: str, spans: Iterable[tuple[int, int]]) -> str:
    for at, end in sorted(spans, reverse=True):
        name = name[:at] + name[end:]
    return name


def measured(entry: Entry) -> dict[str, float]:
    """What was measured, as its name says: Lightning's epoch=3-val_loss=0.12.ckpt."""
    said = (match[0].rpartition("=") for match in _MEASURED.finditer(entry.path.name))
    return {name.strip("-_"): float(value) for name, _, value in said}


def ahead(entry: Entry) -> int:
    """How far the number in a name is ahead of the epoch that is stated: the same throughout a series. It is
    0 where the name says what it counts, or nothing is stated."""
    name, epoch = entry.path.name, entry.state.epoch
    plain = _PLAIN.search(name)
    says = plain is None or plain.span() not in counts(name) or kind(entry) != "epoch"
    return 0 if says or plain is None or epoch is None else int(plain[1][:18]) - int(epoch)
