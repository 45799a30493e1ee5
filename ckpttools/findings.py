"""What a check finds: the same parts as an error has, and how bad it is."""

from __future__ import annotations

from collections.abc import Iterable

from ckpttools.errors import CkptError, Problem, UsageError

ERROR, WARNING, INFO = "error", "warning", "info"


class Finding(Problem, frozen=True, kw_only=True):
    """A problem that was found, and how bad it is. `where` is a tensor, rank, record or field within `file`.

    An error means that the checkpoint must not be relied on; a warning that a person should look; an
    information never makes a checkpoint bad. `ckpt explain ID` tells more.
    """

    severity: str
    file: str
    exit_code: int = 1  # 2: an error that says nothing about the checkpoint, such as no permission

    @property
    def text(self) -> str:
        """The message, with the reason why it matters."""
        return f"{self.message} ({self.why})" if self.why else self.message


def of_error(error: CkptError) -> Finding:
    """An error that a reader raised, as a finding."""
    return Finding(
        id=error.id,
        severity=ERROR,
        file=error.where,
        message=error.message,
        why=error.why,
        hint=error.hint,
        exit_code=error.exit_code,
    )


def raised(finding: Finding) -> CkptError:
    """The other way round, for a command that goes no further."""
    kind = CkptError if finding.exit_code == CkptError.exit_code else UsageError
    return kind(
        finding.id,
        finding.message,
        where=finding.file,
        why=finding.why or (f"at {finding.where}" if finding.where else ""),
        hint=finding.hint,
    )


def errors(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == ERROR]
