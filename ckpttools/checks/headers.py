"""The header checks of every format: each file by itself, then all together. No tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ckpttools.checkpoint import Checkpoint
from ckpttools.checks.files import check_files, dangers_at
from ckpttools.checks.parts import check_parts
from ckpttools.containers.torch_file import TorchFile
from ckpttools.errors import CkptError, Unsupported
from ckpttools.findings import INFO, Finding, of_error
from ckpttools.formats import Source, read
from ckpttools.formats.dcp.checks import check_folder as dcp_findings
from ckpttools.formats.zero.checks import archive_roots, check_folder
from ckpttools.formats.zero.decode import Rank, read_model, read_rank
from ckpttools.formats.zero.join import ZeroFolder, assemble, check_complete
from ckpttools.formats.zero.names import find
from ckpttools.formats.zero.read import checkpoint
from ckpttools.formats.zero3.checks import check_folder as zero3_findings
from ckpttools.stores.links import within

T = TypeVar("T")


def check_headers(
    source: Source, *, in_parts: bool = False
) -> tuple[list[Finding], Checkpoint | None, list[TorchFile]]:
    """Findings, the checkpoint if it can be read at all, and its torch files.

    A layout whose weights cannot be put together raises Unsupported or, with `in_parts`, is checked file by
    file; what comes back for it is fit for checking and for nothing else.
    """
    if source.format == "zero":
        try:
            with within(source.root):
                return _zero_headers(source.target)
        except Unsupported as reason:
            if not in_parts:
                raise
            return check_parts(source.target, reason)
    if source.format == "zero3":
        try:
            with within(source.root):
                findings, put_together, files = zero3_findings(source.target)
        except Unsupported as reason:
            if not in_parts:
                raise
            return check_parts(source.target, reason)
        findings = [*check_files(files), *archive_roots(files), *findings]
        return [*findings, *(_notes(put_together) if put_together else ())], put_together, files
    if source.format == "dcp":
        with within(source.root):
            findings, read_anyway = dcp_findings(source.target)
        return [*findings, *(_notes(read_anyway) if read_anyway else ())], read_anyway, []
    try:
        found = read(source)
    except CkptError as error:
        dangerous = dangers_at(source.target)
        if error.exit_code != 1 and not dangerous:
            raise
        return [*dangerous, of_error(error)], None, []
    extra = found.template
    files = [f for f in (extra if isinstance(extra, tuple) else (extra,)) if isinstance(f, TorchFile)]
    return [*check_files(files), *_notes(found)], found, files


def _zero_headers(folder: Path) -> tuple[list[Finding], Checkpoint | None, list[TorchFile]]:
    findings: list[Finding] = []

    def attempt(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Unsupported as reason:  # another layout, which shows only inside a file
            if reason.id != "storage-compressed":
                raise
            findings.append(of_error(reason))
            return None
        except CkptError as error:  # also what may not be read: one file must not hide the others
            findings.append(of_error(error))
            return None

    try:
        files = find(folder)
    except CkptError as error:
        if error.exit_code != 1:
            raise
        return [of_error(error)], None, []
    model = attempt(lambda: read_model(files.model))
    ranks: list[Rank] = []
    for number, path in files.optim.items():
        rank = attempt(lambda path=path, number=number: read_rank(path, number))  # type: ignore[misc]
        if rank is not None:
            ranks.append(rank)
    torch_files = [model.file] if model is not None else []
    torch_files += [rank.file for rank in ranks]
    findings += check_files(torch_files)
    complete = None
    joined: ZeroFolder | None = None
    if model is not None and len(ranks) == len(files.optim):
        complete = attempt(lambda: check_complete(files, model, tuple(ranks)))
    findings += archive_roots(torch_files)
    if complete and model is not None:
        joined = attempt(lambda: assemble(files, model, tuple(ranks)))
    if joined is None:
        return findings, None, torch_files
    findings += check_folder(joined)
    found = attempt(lambda: checkpoint(joined))
    if found is not None:
        findings += _notes(found)
    return findings, found, torch_files


def _notes(found: Checkpoint) -> Iterator[Finding]:
    for note in found.notes:
        yield Finding(id="note", severity=INFO, file=str(found.path), where="", message=note)
