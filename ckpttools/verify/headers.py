"""The header checks of every format: each file by itself, then all together. No tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ckpttools.callables import judge
from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import CkptError, Unsupported
from ckpttools.formats import Source, read
from ckpttools.formats.archive import SERIALIZATION_ID, belong_together, unexplained
from ckpttools.formats.files import entries, is_file, opened
from ckpttools.formats.safetensors import read_safetensors
from ckpttools.formats.torch_file import TorchFile, is_torch_file, read_torch_file
from ckpttools.formats.zero.names import find
from ckpttools.formats.zero.read import (
    Rank,
    ZeroFolder,
    assemble,
    check_complete,
    checkpoint,
    read_model,
    read_rank,
)
from ckpttools.plan import SourceCheck
from ckpttools.verify.findings import ERROR, INFO, Finding, of_error
from ckpttools.verify.zero import archive_roots, check_folder

T = TypeVar("T")
SIDE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".safetensors")


def check_beside(source: Source, known: list[TorchFile]) -> tuple[list[Finding], list[SourceCheck]]:
    """Files beside the weights that a resume needs: schedulers, random states, the Trainer's optimizer ...

    Returns what their headers show, and the checksums that the pass over the bytes is to verify.
    """
    findings: list[Finding] = []
    checks: list[SourceCheck] = []
    folders = dict.fromkeys(f for f in (source.target, source.root, source.root / "hf_model") if f.is_dir())
    seen = {file.path for file in known}
    for folder in folders:
        for entry in entries(folder):
            path = folder / entry.name
            if path in seen or not is_file(entry) or not entry.name.endswith(SIDE_SUFFIXES):
                continue
            try:
                if entry.name.endswith(".safetensors"):
                    read_safetensors(path)
                elif is_torch_file(path):
                    file = read_torch_file(path)
                    findings += _files([file])
                    checks += file.checks()
            except CkptError as error:
                findings.append(of_error(error))
    return findings, checks


def check_headers(source: Source) -> tuple[list[Finding], Checkpoint | None, list[TorchFile]]:
    """Findings, the checkpoint if it can be read at all, and its torch files."""
    if source.format == "zero":
        return _zero_headers(source.target)
    try:
        found = read(source)
    except CkptError as error:
        if error.exit_code != 1:
            raise
        return [of_error(error)], None, []
    extra = found.extra
    files = [f for f in (extra if isinstance(extra, tuple) else (extra,)) if isinstance(f, TorchFile)]
    return [*_files(files), *_notes(found)], found, files


def _zero_headers(folder: Path) -> tuple[list[Finding], Checkpoint | None, list[TorchFile]]:
    findings: list[Finding] = []

    def attempt(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Unsupported:
            raise
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
    findings += _files(torch_files)
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


def _files(files: list[TorchFile]) -> Iterator[Finding]:
    """What each torch file shows by itself."""
    for file in files:
        yield from _callables(file)
        yield from _structure(file)


def _structure(file: TorchFile) -> Iterator[Finding]:
    """Every byte of an archive that torch wrote is explained: headers, paddings, descriptors, directory."""
    if file.archive is None:
        return
    with opened(file.path) as opened_file:
        problems = unexplained(opened_file, file.archive)
        together = belong_together(opened_file, file.archive)
    if not together:
        yield Finding(
            id="records-edited",
            severity=ERROR,
            file=str(file.path),
            where=SERIALIZATION_ID,
            message="the records were not saved together: one was changed, and its checksum mended",
            hint="copy the file again from where it was saved; ask who edited it",
        )
    if problems is None:
        yield Finding(
            id="zip-other-writer",
            severity=INFO,
            file=str(file.path),
            where="",
            message="not written by torch.save itself: its headers are checked by the general rules only",
        )
    for problem in problems or ():
        yield Finding(
            id="zip-unexplained",
            severity=ERROR,
            file=str(file.path),
            where=problem,
            message="holds bytes that torch does not write there",
            hint="copy the file again from where it was saved, or use an older checkpoint",
        )


def _callables(file: TorchFile) -> Iterator[Finding]:
    """What loading the pickle with torch.load would call: unknown classes, and code that would run."""
    for judgement in judge(file.pickle.calls):
        if judgement.verdict == "dangerous":
            yield Finding(
                id="pickle-dangerous",
                severity=ERROR,
                file=str(file.path),
                where=judgement.name,
                message=f"DANGEROUS: {judgement.what}",
                hint="do not load this file with anything that unpickles; find out where it came from",
            )
        elif judgement.verdict == "unknown":
            yield Finding(
                id="class-unknown",
                severity=INFO,
                file=str(file.path),
                where=judgement.name,
                message="an unknown class, shown as data and never loaded",
            )


def _notes(found: Checkpoint) -> Iterator[Finding]:
    for note in found.notes:
        yield Finding(id="note", severity=INFO, file=str(found.path), where="", message=note)
