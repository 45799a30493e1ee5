"""The constants of MMEngine's schedulers on another clock: everything that counts iterations.

`begin` and `end` are points of the run; what a scheduler counts inside them starts at its own begin.
Relations that the constructors make hold again: total_iters == end - begin - 1, T_max == end - begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from msgspec import Struct, field

from ckpttools.schedules.lengths import Steps, nearest
from ckpttools.schedules.mmengine.steps import NEVER, UNKNOWN
from ckpttools.schedules.program import State, damaged, rescaled, rounding
from ckpttools.schedules.torch.lengths import one_cycle_phases, powered


class Rescaling(Struct):
    """How to move lengths, and what had to be rounded."""

    steps: Steps
    keep_warmup: bool
    notes: list[str] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)

    def keep(self, state: State, kind: str) -> None:
        """A warmup that a user gave in iterations keeps its end, and what follows it begins there."""
        rises = kind == "Linear" and state["end_factor"] > state["start_factor"]
        if (
            self.keep_warmup
            and (rises or (kind == "Constant" and state["factor"] < 1))
            and state["end"] < NEVER
        ):
            self.kept[state["end"]] = state["end"]
            self.kept[state["begin"]] = state["begin"]

    def point(self, name: str, value: int) -> int:
        """A count at which something begins or ends."""
        if value in self.kept:
            return self.kept[value]
        exact = self.steps.length(value)
        found = nearest(exact)
        self.notes += rounding(name, value, exact, found, "it comes {off} iterations {way}")
        return found

    def span(self, name: str, value: int | float, begin: tuple[int, int]) -> int | float:
        """A length that starts where its scheduler begins."""
        if value == self.steps.old_total:
            exact = self.steps.length(Fraction(value))
        else:
            exact = self.steps.length(begin[0] + Fraction(value)) - begin[1]
        found = rescaled(value, exact)
        self.notes += rounding(name, value, exact, found, "it ends {off} iterations {way}")
        return found

    def rescale(self, s: State, kind: str, given: Mapping[str, Any]) -> None:
        """The constants in place; `given` are lengths that the configuration defines by epochs."""
        old_begin, old_end = s["begin"], s["end"]
        begin = given.get("begin", None)
        s["begin"] = begin = self.point("begin", old_begin) if begin is None else begin
        if old_end < NEVER:
            end = given.get("end")
            s["end"] = max(begin + 1, self.point("end", old_end) if end is None else end)
        width, at = s["end"] - begin, (old_begin, begin)
        old_width = old_end - old_begin
        if kind == "Linear" and width == 1 < old_width:
            self.notes.append(
                "a LinearLR is left with one iteration, in which MMEngine sets its first factor and nothing "
                f"more: the rate stays at {s['start_factor']:g} of what it should be"
            )
        match kind:
            case "Constant" | "Linear" | "Poly":
                if s["total_iters"] == old_width - 1:
                    s["total_iters"] = width - 1
                else:
                    s["total_iters"] = self.span("total_iters", s["total_iters"], at)
            case "CosineAnnealing":
                if "T_max" in given:
                    s["T_max"] = given["T_max"]
                else:
                    s["T_max"] = width if s["T_max"] == old_width else self.span("T_max", s["T_max"], at)
            case "OneCycle":
                old = s["total_steps"]
                if "total_steps" in given:
                    s["total_steps"] = given["total_steps"]
                else:
                    s["total_steps"] = width if old == old_width else self.span("total_steps", old, at)
                s["_schedule_phases"] = one_cycle_phases(s["_schedule_phases"], old, s["total_steps"])
            case "Exponential":
                s["gamma"] = powered(s["gamma"], 1 / self.steps.ratio)
            case "Step":
                s["step_size"] = given.get("step_size") or self._period(s["step_size"])
            case "MultiStep":
                s["milestones"] = self._milestones(s["milestones"], at, given.get("milestones"))
            case "CosineRestart":
                self._periods(s, at, given.get("periods"))
        if kind == UNKNOWN:
            self.notes.append("a scheduler of an unknown class: its own lengths were left as they are")

    def _period(self, value: int | float) -> int | float:
        exact = self.steps.length(Fraction(value))
        found = rescaled(value, exact)
        self.notes += rounding(
            "step_size", value, exact, found, "the k-th drop comes k x {off} iterations {way}"
        )
        return found

    def _milestones(self, old: dict[Any, int], at: tuple[int, int], given: Any) -> dict[Any, int]:
        out: dict[Any, int] = type(old)()
        if given is not None:
            for stone in given:
                out[stone] = out.get(stone, 0) + 1
            return out
        for stone, times in old.items():
            found = self.span("milestone", stone, at) if stone else stone
            if found in out:
                self.notes.append(f"two milestones fall together on {found}: both drops happen there")
            out[found] = out.get(found, 0) + times
        return out

    def _periods(self, s: State, at: tuple[int, int], given: Any) -> None:
        if given is None:
            ends = [self.span("the end of a period", end, at) for end in s["cumulative_periods"]]
            given = [b - a for a, b in zip([0, *ends], ends, strict=False)]
        if min(given) <= 0:
            raise damaged("a period of CosineRestart would have no iteration")
        s["periods"] = type(s["periods"])(given)
        s["cumulative_periods"] = [sum(given[: i + 1]) for i in range(len(given))]
