"""Schedules whose learning rate is a formula of the counter: DeepSpeed's, transformers', timm's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from msgspec import Struct

from ckpttools.schedules.program import State, computing

# writes what the library writes into the groups when the counter is `count`
Formula = Callable[[Sequence[State], int], None]
# writes the counter (and the last learning rates) into the states
Mark = Callable[[Sequence[State], Sequence[State], int], None]


class ClosedMachine(Struct):
    """A formula in motion. `count` is the number of steps made."""

    states: list[State]
    groups: list[State]
    count: int
    formula: Formula
    mark: Mark

    @classmethod
    def at(
        cls, states: Sequence[State], groups: Sequence[State], count: int, formula: Formula, mark: Mark
    ) -> ClosedMachine:
        """A copy after `count` steps of a run from scratch."""
        made = cls.loaded(states, groups, count, formula, mark)
        with computing():
            made.formula(made.groups, count)
            made.mark(made.states, made.groups, count)
        return made

    @classmethod
    def loaded(
        cls, states: Sequence[State], groups: Sequence[State], count: int, formula: Formula, mark: Mark
    ) -> ClosedMachine:
        """A copy as the state and the groups are."""
        return cls(copy.deepcopy(list(states)), copy.deepcopy(list(groups)), count, formula, mark)

    def step(self) -> None:
        """One unit more."""
        self.count += 1
        self.formula(self.groups, self.count)
        self.mark(self.states, self.groups, self.count)
