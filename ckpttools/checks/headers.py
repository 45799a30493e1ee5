"""The header checks of every format: each file by itself, then all together. No tensor is read."""

from __future__ import annotations

from ckpttools.errors import CkptError, Unsupported
from ckpttools.findings import INFO, Finding, of_error
from ckpttools.formats import Checked, Source
from ckpttools.formats.files import DANGEROUS, Headers, dangers_at, headers
from ckpttools.formats.unjoined import check_parts
from ckpttools.stores.links import within


def check_headers(source: Source, *, in_parts: bool = False, wanted: Headers = "each") -> Checked:
    """What the format finds, and what a reader should know.

    A layout whose weights cannot be put together raises Unsupported or, with `in_parts`, is checked file by
    file; what comes back for it is fit for checking and for nothing else.
    """
    with within(source.root), headers(wanted):
        try:
            checked = source.format.check(source)
        except CkptError as error:
            if in_parts and source.format.tagged and isinstance(error, Unsupported):
                return check_parts(source.target, error)
            dangers = dangers_at(source.target)
            if error.exit_code != 1 and not dangers:
                raise
            return Checked([*dangers, of_error(error)], None, [])
        if checked.checkpoint is None:  # what could not be read was not judged, and may still be loaded
            said = {finding.file for finding in checked.findings if finding.id == DANGEROUS}
            checked.findings[:0] = [each for each in dangers_at(source.target) if each.file not in said]
    if (found := checked.checkpoint) is not None:
        checked.findings.extend(
            Finding(id="note", severity=INFO, file=str(found.path), where="", message=note)
            for note in found.notes
        )
    return checked
