"""One entry of a log."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct


class Record(Struct, frozen=True, kw_only=True):
    """Values by name at one count of the run. `samples` are those seen, `time` is in seconds since 1970: None
    where the log does not say."""

    count: float
    values: Mapping[str, float]
    samples: float | None = None
    time: float | None = None
