"""The header checks of every format: each file by itself, then all together. No tensor is read."""

from __future__ import annotations

from ckpttools.errors import Unsupported
from ckpttools.findings import INFO, Finding
from ckpttools.formats import Checked, Source
from ckpttools.formats.parts import check_parts
from ckpttools.stores.links import within


def check_headers(source: Source, *, in_parts: bool = False) -> Checked:
    """What the format finds, and what a reader should know.

    A layout whose weights cannot be put together raises Unsupported or, with `in_parts`, is checked file by
    file; what comes back for it is fit for checking and for nothing else.
    """
    with within(source.root):
        try:
            checked = source.format.check(source)
        except Unsupported as reason:
            if not in_parts or not source.format.tagged:
                raise
            return check_parts(source.target, reason)
    if (found := checked.checkpoint) is not None:
        checked.findings.extend(
            Finding(id="note", severity=INFO, file=str(found.path), where="", message=note)
            for note in found.notes
        )
    return checked
