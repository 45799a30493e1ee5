"""Which checkpoints of a run stay: a policy over what is known of each, nothing touched.

A checkpoint may go only if all of this holds: it is one of a series (kinds.py), older than as many good ones
of its series as shall stay, of the same model as these, not the one that was written last, alone at its point
of its series, not saved together with one that stays, holds nothing that is somebody's own, and nothing pins,
names or needs it. A damaged one counts as nothing: it takes no place, and one that is newer than those that
stay, by its number or by its time, is left alone, for it may be written at this moment. What is not known
keeps a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence

from msgspec import Struct

from ckpttools.errors import UsageError, escape
from ckpttools.runs.find import COUNTERS, Entry
from ckpttools.runs.kinds import ahead, kind, measured, point, series, together
from ckpttools.stores.files import is_link

COPIED = 60 * 10**9  # ns; a copy of a run has the times of copying, which say nothing of the run
VAL = ("val_loss", "eval_loss", "val/loss", "validation_loss", "valid_loss")
# what is better when it is less; the direction of any other must be said
_LESS = ("loss", "ppl", "perplexity", "error", "err", "wer", "cer", "mae", "mse", "rmse")


class Policy(Struct, frozen=True, kw_only=True):
    """`best` is a metric, or METRIC:min, METRIC:max; "" the validation loss. `within` is in seconds."""

    last: int | None = None
    per_kind: bool = False
    best: str | None = None
    every: int | None = None
    within: float | None = None

    def __post_init__(self) -> None:
        if (self.last, self.best, self.every, self.within) == (None,) * 4:
            raise UsageError(
                "bad-usage",
                "nothing says what to keep",
                where="ckpt prune",
                why="a checkpoint that no rule keeps is removed",
                hint="add --keep-last N, --keep-best, --keep-every K or --keep-within 7d",
            )
        for name, value in (("last", self.last), ("every", self.every), ("within", self.within)):
            if value is not None and not value > 0:
                more = "a span such as 7d" if name == "within" else "1 or more"
                raise UsageError(
                    "bad-usage",
                    f"--keep-{name} {value} keeps nothing",
                    where=f"--keep-{name}",
                    why="no checkpoint would be kept by it",
                    hint=f"give {more}",
                )


class Decision(Struct, frozen=True, kw_only=True):
    """`reasons` are why it stays; without one it goes. `good` is what `decide` was told; None where that was
    not looked at, or cannot be told."""

    entry: Entry
    reasons: tuple[str, ...]
    good: bool | None = None

    @property
    def goes(self) -> bool:
        return not self.reasons


def decide(
    found: Sequence[Entry],
    policy: Policy,
    *,
    good: Callable[[Entry], bool | None],
    held: Callable[[Entry], Iterable[str]],
    now: float,
) -> list[Decision]:
    """What happens to the checkpoints of one run, given newest first.

    `good` verifies one, each at most once; `held` says what else keeps it. `now` is in seconds, as time.time.
    """
    known: dict[int, bool | None] = {}

    def is_good(at: int) -> bool | None:
        if at not in known:
            known[at] = good(found[at])
        return known[at]

    reasons: dict[int, list[str]] = {at: list(held(entry)) for at, entry in enumerate(found)}
    limits: dict[str, int] = {}  # series -> the last place that its newest good ones take
    for members in _groups(found, policy.per_kind).values():
        taken = _first(members, policy.last or 1, is_good)
        words = f"one of the last {policy.last}" if policy.last else "the newest good one"
        for at in taken:
            reasons[at].append(words)
        stem = series(found[members[0]]) or ""
        limit = taken[-1] if len(taken) == (policy.last or 1) else len(found)
        limits[stem] = max(limits.get(stem, 0), limit)
        _keep_best(found, members, policy, is_good, reasons)
        written = max(members, key=lambda at: (found[at].time, -at))
        before = max((found[at].time for at in members if at < written), default=math.inf)
        if found[written].time - before > COPIED and is_good(written):
            reasons[written].append("it was written last: the run went on from further back")
        for at in members:
            if at < limit and at not in taken:
                reasons[at].append(_unproven(known.get(at)) if taken else "none of its series is good")
            _keep_points(found[at], policy, reasons[at])
        _keep_alike(found, members, reasons)
    latest = max((entry.time for entry in found), default=0)
    for at, entry in enumerate(found):
        own = series(entry)
        if policy.within is not None and now - entry.time / 1e9 <= policy.within:
            reasons[at].append("younger than asked for")
        if is_link(entry.path):
            reasons[at].append("it is a link")
        elif own is None:
            reasons[at].append("it is none of a series")
        elif entry.problem is not None:
            if entry.problem.exit_code != 1:
                reasons[at].append(f"it could not be looked at: {entry.problem.message}")
            elif at < limits.get(own, len(found)):
                reasons[at].append(f"damaged, and nothing older stays for it: {entry.problem.message}")
            elif entry.time == latest:
                reasons[at].append(
                    f"damaged, and written last, so perhaps not to its end: {entry.problem.message}"
                )
        elif entry.model is None:
            reasons[at].append("its tensors do not look like a model's")
    _keep_together(found, reasons)
    for at in range(len(found)):  # what stays is looked at, so that a damaged one is told
        if reasons[at] and found[at].problem is None:
            is_good(at)
    return [
        Decision(entry=entry, reasons=tuple(dict.fromkeys(reasons[at])), good=known.get(at))
        for at, entry in enumerate(found)
    ]


def _groups(found: Sequence[Entry], per_kind: bool) -> dict[Hashable, list[int]]:
    """The places of those that can take each other's place: of one series and model, with as much in them."""
    groups: dict[Hashable, list[int]] = {}
    for at, entry in enumerate(found):
        stem = series(entry)
        if stem is not None and entry.problem is None and not is_link(entry.path):
            key = (stem, ahead(entry), entry.resumes, entry.model, kind(entry) if per_kind else None)
            groups.setdefault(key, []).append(at)
    return groups


def _first(members: Iterable[int], count: int, good: Callable[[int], bool | None]) -> list[int]:
    """The first `count` that are good."""
    taken: list[int] = []
    for at in members:
        if len(taken) == count:
            break
        if good(at):
            taken.append(at)
    return taken


def _unproven(good: bool | None) -> str:
    return "damaged: not counted, and left alone" if good is False else "whether it is good is not known"


def _keep_alike(found: Sequence[Entry], members: list[int], reasons: dict[int, list[str]]) -> None:
    """Two of one series at one point are perhaps of two runs, which differ in what looks like a measure."""
    points: dict[tuple[str, ...], list[int]] = {}
    for at in members:
        points.setdefault(point(found[at]), []).append(at)
    for alike in points.values():
        for at in alike if len(alike) > 1 else ():
            other = found[next(each for each in alike if each != at)].path.name
            reasons[at].append(
                f"{escape(other)} is at the same point: whether they are of one run is not known"
            )


def _keep_together(found: Sequence[Entry], reasons: dict[int, list[str]]) -> None:
    """What was saved together stays together: the files of ranks, a model and its optimizer."""
    saves: dict[Hashable, list[int]] = {}
    for at, entry in enumerate(found):
        if (save := together(entry)) is not None:
            saves.setdefault(save, []).append(at)
    for members in saves.values():
        staying = [found[at] for at in members if reasons[at]]
        if staying and len({series(found[at]) for at in members}) > 1:
            why = f"saved together with {escape(staying[0].path.name)}, which stays"
            for at in members:
                reasons[at] = reasons[at] or [why]


def _keep_points(entry: Entry, policy: Policy, reasons: list[str]) -> None:
    if policy.every is not None:
        counted = next(((c, v) for c in COUNTERS if (v := entry.count(c)) is not None), None)
        if counted is None:
            reasons.append("it states no step, so whether it is one of every is not known")
        elif counted[1] % policy.every == 0:
            reasons.append(f"{counted[0]} {counted[1]} is a multiple of {policy.every}")


def _keep_best(
    found: Sequence[Entry],
    members: list[int],
    policy: Policy,
    good: Callable[[int], bool | None],
    reasons: dict[int, list[str]],
) -> None:
    """The best by validation loss stays, always, and the one by the metric that was named; of several that
    state the same the oldest: a later one may repeat what was measured before it."""
    asked = [_metric(policy.best)] if policy.best else []
    for name, sign in (*((name, 1) for name in VAL), *asked):
        values = {at: v for at in members if math.isfinite(v := _value(found[at], name))}
        told = sorted(values, key=lambda at: (sign * values[at], -at))
        for at in _first(told, 1, good):
            reasons[at].append(f"the best by {escape(name)}: {values[at]:.6g}")


def _value(entry: Entry, name: str) -> float:
    """A metric as the checkpoint states it, or its name; NaN where neither does."""
    return entry.metrics.get(name, measured(entry).get(name, math.nan))


def _metric(text: str) -> tuple[str, int]:
    """A metric and its sign: 1 where less is better. Raises UsageError where that is not known."""
    name, colon, way = text.rpartition(":")
    if colon and way in ("min", "max"):
        return name, 1 if way == "min" else -1
    if any(text.lower().replace("/", "_").split("_")[-1] == word for word in _LESS):
        return text, 1
    raise UsageError(
        "bad-usage",
        f"whether less {escape(text)} is better is not known",
        where="--keep-best",
        why="the best would be a guess, and the others would be removed",
        hint=f"write --keep-best {escape(text)}:max or {escape(text)}:min",
    )


def best_of(found: Sequence[Entry]) -> Entry | None:
    """The one with the least validation loss, as its headers say, the oldest of equal ones; None where none
    states it. They are given newest first."""
    for name in VAL:
        told = [e for e in reversed(found) if (v := e.metrics.get(name)) is not None and math.isfinite(v)]
        if told:
            return min(told, key=lambda entry: entry.metrics[name])
    return None


def states_best(entry: Entry, policy: Policy) -> bool:
    """Whether it says how good it is by what the best is asked for."""
    names = {_metric(policy.best)[0]} if policy.best else set(VAL)
    return any(math.isfinite(_value(entry, name)) for name in names)


def require_best(found: Iterable[Entry], policy: Policy) -> None:
    """Raises UsageError where a best is asked for and nothing states it."""
    if policy.best is None:
        return
    found = list(found)
    stated = {name for entry in found for name in (*entry.metrics, *measured(entry))}
    if not any(states_best(entry, policy) for entry in found):
        asked = escape(policy.best) if policy.best else "a validation loss"
        raise UsageError(
            "best-unknown",
            f"no checkpoint states {asked}",
            why="which one is the best cannot be told, so it could be removed",
            hint=f"they state: {', '.join(map(escape, sorted(stated))) or 'nothing'}; leave --keep-best off",
        )
