"""The verdict on a checkpoint: what its checks found."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from ckpttools.errors import CkptError
from ckpttools.findings import ERROR, WARNING, Finding, of_error
from ckpttools.location import Location
from ckpttools.training import Training


class Delivered(Exception):
    """What this process has found is with another one, which says the verdict."""


class Verdict(Struct, frozen=True, kw_only=True):
    """The result for one checkpoint: `ok` unless something of severity error was found."""

    path: Location
    format: str | None
    state: Training
    findings: tuple[Finding, ...]
    nbytes_read: int = 0  # tensor bytes that were checked
    manifest: tuple[Location, bytes] | None = None  # its place and contents, where it was asked for
    lacks: tuple[str, ...] = ()  # of optimizer and scheduler, what a training checkpoint does not hold

    @property
    def step(self) -> int | None:
        return self.state.step

    @property
    def epoch(self) -> int | float | None:
        return self.state.epoch

    @property
    def ok(self) -> bool:
        return not any(finding.severity == ERROR for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 where it is good, 1 where something is wrong with it, 2 where that could not be found out."""
        return min((f.exit_code for f in self.findings if f.severity == ERROR), default=0)

    @property
    def words(self) -> str:
        """The verdict in words, the same wherever it is shown."""
        errors = sum(finding.severity == ERROR for finding in self.findings)
        warnings = sum(finding.severity == WARNING for finding in self.findings)
        if self.exit_code == 2:
            return "could not be checked"
        if errors:
            return f"BAD: {errors} error{'s' * (errors > 1)}"
        return f"good, with {warnings} warning{'s' * (warnings > 1)}" if warnings else "good"


def refused(path: Location, error: CkptError, also: Iterable[Finding] = ()) -> Verdict:
    """The verdict on what could not be checked at all, or is damaged beyond reading."""
    return Verdict(path=path, format=None, state=Training(), findings=(*also, of_error(error)))
