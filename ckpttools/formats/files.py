"""What the files of a checkpoint show by themselves: what loading a torch file would call, and whether every
byte of it is explained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypeVar

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.archive import SERIALIZATION_ID, around, belong_together, unexplained
from ckpttools.containers.pickles.judge import judge
from ckpttools.containers.torch_file import TorchFile, dangers_in
from ckpttools.errors import CkptError, Unsupported, some
from ckpttools.findings import ERROR, INFO, WARNING, Finding, of_error
from ckpttools.formats.format import Checked, Source
from ckpttools.location import Location, Stored
from ckpttools.stores.files import entries, is_file, is_folder, opened

T = TypeVar("T")
DANGEROUS = "pickle-dangerous"
DEPTH = 3  # folders in a checkpoint's folder that are looked into
# of files that nobody unpickles
DATA = (
    ".safetensors",
    ".distcp",
    ".json",
    ".jsonl",
    ".txt",
    ".md",
    ".log",
    ".py",
    ".yaml",
    ".model",
    ".jinja",
)
HEAD_NBYTES = 1 << 16  # of each storage, to see whether anything was written there


# Whether headers that lie between the storages are read, where that takes more than a few reads: "each" of
# them; "few", but said where they are not; "none" of a store's, where nothing behind them is going to be read
Headers = Literal["each", "few", "none"]
_headers: ContextVar[Headers] = ContextVar("headers", default="each")
FEW = 2  # reads


@contextmanager
def headers(wanted: Headers) -> Iterator[None]:
    """Of files that are checked meanwhile, in this context."""
    token = _headers.set(wanted)
    try:
        yield
    finally:
        _headers.reset(token)


class Attempts:
    """Findings, and the errors of readers among them: one file must not hide the others."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def __call__(self, action: Callable[[], T]) -> T | None:
        """What the action returns. Raises Unsupported for another layout, which shows only inside a file."""
        try:
            return action()
        except CkptError as error:  # also what may not be read
            if isinstance(error, Unsupported) and error.id != "storage-compressed":
                raise
            self.findings.append(of_error(error))
            return None


def check_read(found: Checkpoint) -> Checked:
    """The checks of a format that has none beside those of its torch files."""
    kept = found.template if isinstance(found.template, tuple) else (found.template,)
    files = [file for file in kept if isinstance(file, TorchFile)]
    return Checked(list(check_files(files)), found, files)


def check_files(files: list[TorchFile]) -> Iterator[Finding]:
    """What each torch file shows by itself."""
    return (finding for file in files for finding in check_file(file))


def check_file(file: TorchFile) -> Iterator[Finding]:
    yield from _callables(file)
    yield from _structure(file)


def _structure(file: TorchFile) -> Iterator[Finding]:
    """Every byte of an archive that torch wrote is explained: headers, paddings, descriptors, directory."""
    archive = file.archive
    if archive is None:
        return
    deflated = [r.name for r in archive.records.values() if r.method and r.name.startswith("data/")]
    if deflated:
        yield Finding(
            id="storage-deflated",
            severity=WARNING,
            file=str(file.path),
            where=deflated[0],
            message=f"{len(deflated)} storages are compressed: torch.load reads them, but takes the "
            "compressed bytes for values, without a word, with mmap=True",
            hint="load it without mmap and save it again; transformers loads .bin files with mmap",
        )
    if file.stray:
        several = f"{len(file.stray)} storages belong" if len(file.stray) > 1 else "a storage belongs"
        yield Finding(
            id="storage-stray",
            severity=WARNING,
            file=str(file.path),
            where=file.stray[0],
            message=f"{several} to no tensor: torch loads the file and leaves them out",
            hint="torch.save writes none: find out what put the file together",
        )
    if (wanted := _headers.get()) == "none" and isinstance(file.path, Stored):
        return
    reserved = [record for record in archive.records.values() if archive.is_reserved(record)]
    with opened(file.path) as opened_file:
        apart = opened_file.reads(around(archive)) if wanted == "few" and opened_file.far else 0
        problems = unexplained(opened_file, archive) if apart <= FEW else []
        together = belong_together(opened_file, archive)
        filled = any(any(opened_file.read(r.start, min(r.nbytes, HEAD_NBYTES))) for r in reserved)
    if problems is not None and not together:
        yield Finding(
            id="records-edited",
            severity=ERROR,
            file=str(file.path),
            where=SERIALIZATION_ID,
            message="the records were not saved together: one was changed, and its checksum mended"
            + (f"; {reserved[0].name} has lost its own" if reserved else ""),
            hint="copy the file again from where it was saved; ask who edited it",
        )
    elif reserved:
        yield _reserved(file, len(reserved), reserved[0].name, filled=filled)
    if apart > FEW:
        yield Finding(
            id="headers-apart",
            severity=INFO,
            file=str(file.path),
            message="the headers between its tensors lie apart in the store and were not read (--quick)",
        )
    if problems is None:
        yield Finding(
            id="zip-other-writer",
            severity=INFO,
            file=str(file.path),
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


def _reserved(file: TorchFile, count: int, first: str, *, filled: bool) -> Finding:
    """Storages saved under skip_data: torch leaves room for them, and no checksum covers what fills it."""
    return Finding(
        id="storage-unchecked" if filled else "storage-unfilled",
        severity=INFO if filled else WARNING,
        file=str(file.path),
        where=first,
        message=f"no checksum of {count} storage{'s' if count > 1 else ''}: saved under skip_data, "
        + ("and filled in later" if filled else "and never filled in: zeros"),
        hint="" if filled else "fill them in, or save the file again without skip_data",
    )


def archive_roots(files: Sequence[TorchFile]) -> Iterator[Finding]:
    """torch.save writes the file's stem into the archive: a renamed rank file still carries its old name."""
    stems = {file.path.stem for file in files}
    for file in files:
        if file.root not in (None, "archive", file.path.stem):
            yield Finding(
                id="file-renamed",
                severity=ERROR if file.root in stems else INFO,
                file=str(file.path),
                where="archive root",
                message=f"the file was saved under the name {file.root}.pt",
                hint="rename it back, or copy the files again from where they were saved",
            )


def dangerous(path: Location, where: str, what: str) -> Finding:
    return Finding(
        id=DANGEROUS,
        severity=ERROR,
        file=str(path),
        where=where,
        message=f"DANGEROUS: {what}",
        hint="do not load this file with anything that unpickles; find out where it came from",
    )


def beside_of(source: Source) -> Iterator[Location]:
    """The files in a checkpoint's folders that may hold a pickle."""
    for folder in folders_of(source):
        for entry in entries(folder):
            if is_file(entry) and not entry.name.endswith(DATA):
                yield folder / entry.name


def folders_of(source: Source) -> list[Location]:
    """The folder of a checkpoint, the one that wraps it, and what a bundle has in it; [] of a single file."""
    root = source.root
    every = dict.fromkeys((source.target, root, root / "hf_model", root / "hf_config"))
    return [folder for folder in every if is_folder(folder)]


def dangers_at(path: Location) -> list[Finding]:
    """What loading the file or a file below the folder at `path` would run, for one that cannot be read."""
    return [dangerous(each, "", what) for each, what in dangers_in(path, DEPTH)]


def _callables(file: TorchFile) -> Iterator[Finding]:
    """What loading the pickle with torch.load would do: unknown classes, and code that would run."""
    judgements = list(judge(file.pickle))
    for judgement in judgements:
        if judgement.verdict == "dangerous":
            yield dangerous(file.path, judgement.name, judgement.what)
    unknown = list(dict.fromkeys(j.name for j in judgements if j.verdict == "unknown"))
    if unknown:
        several = f"{len(unknown)} unknown classes ({some(unknown)})"
        yield Finding(
            id="class-unknown",
            severity=INFO,
            file=str(file.path),
            where=unknown[0],
            message=f"{several if len(unknown) > 1 else 'an unknown class'}, shown as data and never loaded",
        )
