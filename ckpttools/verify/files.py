"""What one torch file shows by itself: what loading it would call, and whether every byte is explained."""

from __future__ import annotations

from collections.abc import Iterator

from ckpttools.callables import judge
from ckpttools.formats.archive import SERIALIZATION_ID, belong_together, unexplained
from ckpttools.formats.files import opened
from ckpttools.formats.torch_file import TorchFile
from ckpttools.verify.findings import ERROR, INFO, Finding


def check_files(files: list[TorchFile]) -> Iterator[Finding]:
    """What each torch file shows by itself."""
    return (finding for file in files for finding in check_file(file))


def check_file(file: TorchFile) -> Iterator[Finding]:
    yield from _callables(file)
    yield from _structure(file)


def _structure(file: TorchFile) -> Iterator[Finding]:
    """Every byte of an archive that torch wrote is explained: headers, paddings, descriptors, directory."""
    if file.archive is None:
        return
    with opened(file.path) as opened_file:
        problems = unexplained(opened_file, file.archive)
        together = belong_together(opened_file, file.archive)
    if problems is not None and not together:
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
