"""What a page is made of: sections with text, charts, tables and findings, as plain data."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ckpttools.charts import Chart
from ckpttools.explain import EXPLANATIONS
from ckpttools.findings import Finding

# a text, a number, a state with its class, or a bar in percent
Cell = str | int | float | None | dict[str, object]


class Figure(Struct, frozen=True, kw_only=True):
    chart: Chart
    caption: str


class Table(Struct, frozen=True, kw_only=True):
    """The first cell of a row is its heading; `numbers` are the columns that hold figures."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: frozenset[int] = frozenset()
    folded: bool = False


class Told(Struct, frozen=True, kw_only=True):
    """A finding and what it means."""

    id: str
    severity: str
    message: str
    where: str
    meaning: str
    mend: str


class Section(Struct, frozen=True, kw_only=True):
    id: str
    title: str
    text: tuple[str, ...] = ()
    charts: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    findings: tuple[Told, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.charts or self.tables or self.findings)


class Gathered(Struct, frozen=True, kw_only=True):
    """A page's content. `how` says how much was read; `damaged` counts checkpoints."""

    title: str
    how: str
    sections: Sequence[Section]
    damaged: int = 0


def state(name: str, text: str) -> dict[str, object]:
    """A cell that stands out: "good", "damaged", "pinned", "pruned"; the text says it too."""
    return {"state": name, "text": text}


def told(finding: Finding, of: str) -> Told:
    """A finding with its explanation; `of` is the checkpoint."""
    known = EXPLANATIONS.get(finding.id)
    where = " ".join(part for part in (of, finding.file, finding.where) if part)
    return Told(
        id=finding.id,
        severity=finding.severity,
        message=finding.text,
        where=where,
        meaning=known.meaning if known else "",
        mend=known.mend if known else finding.hint,
    )
