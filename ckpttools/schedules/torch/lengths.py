"""The constants of torch's schedulers on another clock: everything that counts steps.

A length that ends somewhere (T_max, total_iters, a milestone) is rescaled by where it ends, so that schedules
that follow one another still meet: SequentialLR's next child ends at `total' - warmup'`. A length that
repeats (step_size, T_0, a cycle) is rescaled by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from msgspec import Struct, field

from ckpttools.errors import some
from ckpttools.schedules.lengths import Steps, nearest
from ckpttools.schedules.program import State, damaged, rescaled, rounding
from ckpttools.schedules.torch.states import PLATEAU, UNKNOWN, Node


class Rescaling(Struct):
    """How to move lengths, and what had to be rounded."""

    steps: Steps
    keep_warmup: bool = False
    plateau: bool = False
    notes: list[str] = field(default_factory=list)

    def end(
        self, name: str, value: int | float, start: tuple[int, int], until: tuple[int, int] | None
    ) -> int | float:
        """A length that began at start = (old, new) counts; `until` is where the next schedule takes over."""
        old_start, new_start = start
        total = self.steps.old_total
        if value == total or not old_start:
            exact = self.steps.length(Fraction(value))
        elif until is not None and old_start + value == until[0]:
            exact = Fraction(until[1] - new_start)
        elif total is None or old_start + value == total:
            exact = self.steps.length(Fraction(old_start + value)) - new_start
        else:
            exact = self.steps.length(Fraction(value))
        found = rescaled(value, exact)
        self.notes += rounding(name, value, exact, found, "it ends {off} units {way}")
        return found

    def period(self, name: str, value: int) -> int:
        """A length that repeats; the error grows with every repetition."""
        exact = self.steps.length(value)
        found = max(1, nearest(exact))
        self.notes += rounding(name, value, exact, found, "the k-th repetition comes k x {off} units {way}")
        return found


def rescale(node: Node, to: Rescaling) -> None:
    """Changes the state of `node` and of all below it in place: constants only, no counters."""
    _rescale(node, to, (0, 0), None)


def _rescale(node: Node, to: Rescaling, start: tuple[int, int], until: tuple[int, int] | None) -> None:
    s, kind, steps = node.state, node.kind, to.steps
    match kind:
        case "SequentialLR":
            _sequential(node, to, start, until)
        case "ChainedScheduler":
            for child in node.children:
                _rescale(child, to, start, until)
        case "StepLR":
            s["step_size"] = to.period("step_size", s["step_size"])
        case "MultiStepLR":
            s["milestones"] = _milestones(s["milestones"], to, start)
        case "ConstantLR" | "LinearLR":
            if s["total_iters"] and not (to.keep_warmup and is_warmup(node)):
                s["total_iters"] = to.end(f"{kind}'s total_iters", s["total_iters"], start, until)
        case "PolynomialLR":
            s["total_iters"] = to.end("PolynomialLR's total_iters", s["total_iters"], start, until)
        case "CosineAnnealingLR":
            s["T_max"] = to.end("T_max", s["T_max"], start, until)
        case "ExponentialLR":
            s["gamma"] = powered(s["gamma"], 1 / steps.ratio)
        case "CosineAnnealingWarmRestarts":
            s["T_0"] = s["T_i"] = to.period("T_0", s["T_0"])
        case "OneCycleLR":
            _one_cycle(s, to, start, until)
        case "CyclicLR":
            _cyclic(s, to)
        case _ if kind == PLATEAU and to.plateau:
            for key in ("patience", "cooldown"):
                s[key] = rescaled(s[key], steps.length(s[key]), least=0)
            for key in ("cooldown_counter", "num_bad_epochs"):
                s[key] = rescaled(s[key], steps.length(s[key]), least=0)
        case _ if kind == UNKNOWN:
            left = [k for k, v in s.items() if type(v) is int and k not in ("last_epoch", "_step_count")]
            if left:
                to.notes.append(
                    f"a scheduler of an unknown class: {some(left)} may count steps and were left as they are"
                )


def is_warmup(node: Node) -> bool:
    """Whether a leaf raises the learning rate from a part of it to the whole."""
    s = node.state
    if node.kind == "LinearLR":
        return bool(s["end_factor"] > s["start_factor"])
    return node.kind == "ConstantLR" and s["factor"] < 1


def _sequential(node: Node, to: Rescaling, start: tuple[int, int], until: tuple[int, int] | None) -> None:
    old_stones: list[int] = node.state["_milestones"]
    stones: list[int] = []
    for i, stone in enumerate(old_stones):
        first = node.children[i]
        keep = to.keep_warmup and i == 0 and is_warmup(first)
        exact = Fraction(stone) if keep else to.steps.length(start[0] + stone) - start[1]
        found = max(1 if stone else 0, nearest(exact))
        to.notes += rounding(
            "SequentialLR's milestone", stone, exact, found, "the next schedule begins {off} units {way}"
        )
        stones.append(found)
    for old_stone, new_stone, previous in zip(old_stones[1:], stones[1:], stones, strict=False):
        if new_stone == previous:
            to.notes.append(
                f"SequentialLR's milestone {old_stone} falls on the one before it, {new_stone}: "
                "the schedule between them is never used"
            )
    node.state["_milestones"] = stones
    starts = [start] + [(start[0] + a, start[1] + b) for a, b in zip(old_stones, stones, strict=True)]
    for child, begin, end in zip(node.children, starts, [*starts[1:], until], strict=True):
        _rescale(child, to, begin, end)


def _milestones(old: dict[int, int], to: Rescaling, start: tuple[int, int]) -> dict[int, int]:
    out: dict[int, int] = type(old)()
    moved: dict[int, int] = {}
    for stone, times in old.items():
        exact = to.steps.length(start[0] + stone) - start[1]
        found = max(1 if stone else 0, nearest(exact))
        to.notes += rounding("milestone", stone, exact, found, "this drop comes {off} units {way}")
        if found in moved:
            to.notes.append(
                f"milestones {moved[found]} and {stone} fall together on {found}: both drops happen there"
            )
        moved[found] = stone
        out[found] = out.get(found, 0) + times
    return out


def powered(gamma: int | float, power: Fraction) -> int | float:
    """A factor per step for steps of another size; negative ones and zero have no such power."""
    if power == 1 or gamma <= 0:
        return gamma
    try:
        found: float = gamma ** float(power)
    except OverflowError as error:
        raise damaged(f"gamma {gamma} cannot be used for steps of another size") from error
    return found


def _one_cycle(s: State, to: Rescaling, start: tuple[int, int], until: tuple[int, int] | None) -> None:
    phases, old = s["_schedule_phases"], s["total_steps"]
    s["total_steps"] = new = int(to.end("total_steps", old, start, until))
    s["_schedule_phases"] = one_cycle_phases(phases, old, new)


def one_cycle_phases(phases: Sequence[State], old: int, new: int) -> list[State]:
    """The phases of a cycle of `new` steps: pct x total - 1, (2 x pct x total - 2,) total - 1."""
    part = pct_start(phases[0]["end_step"], old)
    ends = [float(part * new) - 1, float(2 * part * new) - 2, new - 1]
    if len(phases) == 2:
        del ends[1]
    return [{**phase, "end_step": end} for phase, end in zip(phases, ends, strict=True)]


def pct_start(end: int | float, total: int) -> float:
    """The share of a cycle that rises, as its constructor was given it: the simplest that gives `end`."""
    share = (end + 1) / total
    for limit in (10, 100, 1000, 10**4, 10**6):
        simple = float(Fraction(share).limit_denominator(limit))
        if float(simple * total) - 1 == end:
            return simple
    return share


def _cyclic(s: State, to: Rescaling) -> None:
    total, ratio = s["total_size"], s["step_ratio"]
    up = float(round(total * ratio)) if abs(total * ratio - round(total * ratio)) < 1e-6 else total * ratio
    sizes = []
    for name, size in (("step_size_up", up), ("step_size_down", total - up)):
        exact = to.steps.length(Fraction(size))
        found = float(max(1, nearest(exact))) if size else 0.0
        to.notes += rounding(name, f"{size:g}", exact, found, "every cycle comes {off} units more {way}")  # type: ignore[arg-type]
        sizes.append(found)
    s["total_size"] = sizes[0] + sizes[1]
    s["step_ratio"] = sizes[0] / s["total_size"]
    if s["scale_mode"] == "iterations" and s["mode"] == "exp_range":
        s["gamma"] = powered(s["gamma"], 1 / to.steps.ratio)
