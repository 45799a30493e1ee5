"""Every check on one checkpoint."""

from __future__ import annotations

from pathlib import Path

from ckpttools import checks
from ckpttools.checks import Verdict


def verify(path: str | Path, *, tag: str | None = None, quick: bool = False, workers: int = 0) -> Verdict:
    """Whether a checkpoint is whole: structure, checksums, completeness, and that its files belong together.

    Damage is in the verdict's findings. `quick` leaves the bytes of the tensors alone. Raises UsageError
    where there is nothing that can be checked.

    >>> verdict = verify("fixtures/trainer/z2_bf16_2")
    >>> verdict.ok, verdict.format, verdict.state.step
    (True, 'zero2', 3)
    """
    return checks.verify(Path(path), tag, quick=quick, workers=workers)
