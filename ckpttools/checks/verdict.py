"""The verdict on a checkpoint: what its checks found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpttools.checkpoint import TrainState
from ckpttools.findings import ERROR, Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result for one checkpoint: `ok` unless something of severity error was found."""

    path: Path
    format: str | None
    state: TrainState
    findings: tuple[Finding, ...]
    nbytes_read: int = 0  # tensor bytes that were checked
    manifest: tuple[Path, bytes] | None = None  # its place and contents, where it was asked for

    @property
    def step(self) -> int | None:
        return self.state.step

    @property
    def epoch(self) -> int | float | None:
        return self.state.epoch

    @property
    def ok(self) -> bool:
        return not any(finding.severity == ERROR for finding in self.findings)
