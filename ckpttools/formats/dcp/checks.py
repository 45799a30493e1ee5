"""Is a distributed checkpoint whole? It has no checksums of its own: structure, sizes, and the zips inside.

Everything that can be wrong is looked for, item by item; the first problem does not stop it. torch itself
looks at none of it: a tensor with a hole and an item of another shape are loaded without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeVar

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.archive import END, belong_together, is_zip, read_record, unexplained
from ckpttools.containers.nodes import decode
from ckpttools.containers.pickles.judge import Judgement, judge
from ckpttools.containers.torch_file import TorchFile, read_opened
from ckpttools.errors import CkptError, Unsupported, escape
from ckpttools.findings import ERROR, INFO, WARNING, Finding, of_error
from ckpttools.formats.dcp import megatron
from ckpttools.formats.dcp.items import (
    SMALL,
    Alike,
    Data,
    Wanted,
    foresee,
    read_piece,
    refuse_compressed,
)
from ckpttools.formats.dcp.metadata import Item, Metadata, read_metadata
from ckpttools.formats.dcp.names import NAME, SUFFIX, has_shards, parts
from ckpttools.formats.dcp.pieces import check_pieces
from ckpttools.formats.dcp.read import Part, checkpoint, no_metadata, object_lost, part
from ckpttools.formats.dcp.shards import read_shards
from ckpttools.formats.files import DANGEROUS
from ckpttools.location import Location
from ckpttools.stores.files import File, entries, exists, is_file, opened, stat
from ckpttools.tensors import DType
from ckpttools.tree import Value

T = TypeVar("T")
KINDS = 1000  # of pieces, whose bytes around the data are kept
SHOWN = 20  # findings of one kind and file, before the rest is only counted
AGAIN = "copy .metadata and all data files again, from one save"


def check_folder(path: Location) -> tuple[list[Finding], Checkpoint | None]:
    """Findings, and the checkpoint where it can be put together."""
    found = _Findings()
    folders = parts(path)
    if not folders and has_shards(path):
        shards = found.attempt(lambda: read_shards(path), path)
        return found.shown(), shards
    if not folders:
        found.of(no_metadata(path))
    for each in megatron.check(path):
        found.put(each)
    whole = [_Part(folder, found).check() for folder in folders]
    if not whole or not all(whole):
        return found.shown(), None
    made = found.attempt(lambda: checkpoint(path, tuple(each for each in whole if each)))
    return found.shown(), made


class _Findings:
    def __init__(self) -> None:
        self.by_kind: dict[tuple[str, str], list[Finding]] = {}

    def add(
        self, id: str, severity: str, file: Location, where: str, message: str, hint: str = AGAIN
    ) -> None:
        finding = Finding(
            id=id, severity=severity, file=str(file), where=escape(where), message=message, hint=hint
        )
        self.put(finding)

    def put(self, finding: Finding) -> None:
        same = self.by_kind.setdefault((finding.id, finding.file), [])
        if finding not in same[:SHOWN]:
            same.append(finding)

    def of(self, error: CkptError) -> None:
        self.put(of_error(error))

    def attempt(self, action: Callable[[], T], where: Location | None = None) -> T | None:
        try:
            return action()
        except CkptError as error:
            error.where = error.where or str(where or "")
            self.of(error)
            return None

    def shown(self) -> list[Finding]:
        out: list[Finding] = []
        for (id, file), same in self.by_kind.items():
            out += same[:SHOWN]
            if len(same) > SHOWN:
                more = f"and {len(same) - SHOWN} more like it"
                out.append(Finding(id=id, severity=same[0].severity, file=file, where="", message=more))
        return out


class _Part:
    """One folder with a `.metadata`."""

    def __init__(self, folder: Location, found: _Findings) -> None:
        self.folder, self.found = folder, found
        self.whole = True
        self.known: dict[bytes, Value] = {}
        self.alike: dict[tuple[DType, tuple[int, ...], int], Alike | None] = {}

    def check(self) -> Part | None:
        if not exists(self.folder / NAME):
            self.found.of(no_metadata(self.folder))
            return None
        metadata = self.found.attempt(lambda: read_metadata(self.folder), self.folder / NAME)
        if metadata is None:
            return None
        self.callables(metadata.judgements, self.folder / NAME, "")
        self.keys(metadata)
        data = self.items(metadata)
        return part(self.folder, metadata, data) if self.whole else None

    def bad(self, id: str, file: Location, where: str, message: str, hint: str = AGAIN) -> None:
        self.whole = False
        self.found.add(id, ERROR, file, where, message, hint)

    def keys(self, metadata: Metadata) -> None:
        """The metadata against itself."""
        path = self.folder / NAME
        for key, tensor in metadata.tensors.items():
            try:
                check_pieces(key, tensor)
            except CkptError as error:
                self.bad(error.id, path, key, error.message, error.hint)
        for key, item in metadata.objects.items():
            if item is None:
                self.bad("entry-missing", path, key, object_lost(self.folder, key).message)
        if metadata.stray:
            message = f"{len(metadata.stray)} entries of storage_data belong to no key of the state"
            self.found.add("entry-stray", WARNING, path, "storage_data", message)
        lacking = [k for k in (*metadata.tensors, *metadata.objects) if k not in (metadata.paths or {})]
        if lacking and metadata.paths is not None:
            message = f"the path of {len(lacking)} keys is not given, the first '{escape(lacking[0])}'"
            self.found.add("planner-incomplete", WARNING, path, "planner_data", message)

    def items(self, metadata: Metadata) -> dict[Item, Data | Value]:
        """Every item of every file, read in full but for the elements."""
        there = {
            entry.name: stat(self.folder / entry.name).size
            for entry in entries(self.folder)
            if is_file(entry)
        }
        by_file: dict[str, dict[object, Wanted]] = {}
        for each in _wanted(metadata):  # tied weights may share an item, if it is what both are said to be
            by_file.setdefault(each.item.file, {}).setdefault((each.item, each.dtype, each.shape), each)
        # a rank that has nothing to save leaves an empty file (filesystem.py: write_data)
        for name in sorted(n for n in there if n.endswith(SUFFIX) and n not in by_file and there[n]):
            message = f"{NAME} does not name this file: it is left over from another save"
            self.found.add(
                "shard-extra", ERROR, self.folder / name, NAME, message, "move it out of the folder"
            )
        data: dict[Item, Data | Value] = {}
        for name, wanted_ones in sorted(by_file.items()):
            path, size = self.folder / name, there.get(name)
            needed = max(_end(each) for each in wanted_ones.values())
            if size is None:
                self.bad(
                    "shard-missing",
                    path,
                    NAME,
                    f"needs {needed} bytes of it, and it is missing",
                    "copy the file from the node that wrote it",
                )
                continue
            if size < needed:
                self.bad("file-truncated", path, NAME, f"needs {needed} bytes of it, it has {size}")
            whole = [each for each in wanted_ones.values() if _end(each) <= size]
            opened_all = self.found.attempt(lambda p=path, w=whole: self.file(p, w), path)  # type: ignore[misc]
            self.whole = self.whole and opened_all is not None
            data.update(opened_all or {})
        return data

    def file(self, path: Location, wanted: list[Wanted]) -> dict[Item, Data | Value]:
        data: dict[Item, Data | Value] = {}
        with opened(path) as file:
            foresee(file, wanted)
            self.places(file, {each.item for each in wanted})
            for each in wanted:
                at = each.item.start
                try:
                    refuse_compressed(path, each)
                    data[each.item] = self.item(file.window(at, each.item.nbytes), each)
                except Unsupported:
                    raise
                except CkptError as error:
                    self.bad(error.id, path, each.key, f"at byte {at}: {error.message}", error.hint)
        return data

    def places(self, file: File, items: set[Item]) -> None:
        """Items lie one after another: no two share bytes, and no byte belongs to none."""
        spans = sorted((item.start, item.start + item.nbytes) for item in items)
        edges = [(0, 0), *spans, (file.size, file.size)]
        for (_, end), (start, _) in pairwise(edges):
            if start < end:
                self.bad("entries-overlap", file.path, NAME, f"two items share bytes {start} to {end}")
            elif start > end and _is_item(file, end, start):
                message = f"bytes {end} to {start} hold an item that no entry names"
                self.found.add("item-unnamed", INFO, file.path, NAME, message, hint="")
            elif start > end:
                self.bad("bytes-unexplained", file.path, NAME, f"bytes {end} to {start} belong to no item")

    def item(self, window: File, wanted: Wanted) -> Data | Value:
        if wanted.dtype is not None:
            if not all(wanted.shape):
                self.archive(window, read_opened(window), wanted)
                return None
            kind = (wanted.dtype, wanted.shape, window.size)
            alike = self.alike.get(kind)
            if alike is not None and (known := alike.data(window, wanted)) is not None:
                return known
            file, data = read_piece(window, wanted)
            self.archive(window, file, wanted)
            if alike is None and len(self.alike) < KINDS:
                self.alike[kind] = Alike.of(window, file, data)
            return data
        raw = window.read(0, window.size) if window.size <= SMALL else b""
        if raw in self.known:
            return self.known[raw]
        file = read_opened(window)
        self.archive(window, file, wanted)
        self.callables(judge(file.pickle), window.path, wanted.key)
        value = decode(file, file.value)
        if raw and not file.storages:
            self.known[raw] = value
        return value

    def archive(self, window: File, file: TorchFile, wanted: Wanted) -> None:
        """Every byte but the elements: what torch writes there, with its checksums."""
        if file.archive is None:
            return
        for record in file.archive.records.values():
            if not record.name.startswith("data/") or not file.storages:
                read_record(window, record, 1 << 28)
        problems = unexplained(window, file.archive)
        if problems is not None and not belong_together(window, file.archive):
            raise CkptError(
                "records-edited",
                "the records were not saved together: one was changed, and its checksum mended",
                why="the checksums hold for what was put in, not for what was saved",
                hint=f"{AGAIN}; ask who edited it",
            )
        if problems:
            raise CkptError(
                "zip-unexplained",
                f"{problems[0]} holds bytes that torch does not write there",
                why="torch accounts for every byte: these were changed, or written by something else",
            )
        if not file.has_checksums and any(r.nbytes for r in file.archive.records.values()):
            self.found.add(
                "storage-unchecked", INFO, window.path, wanted.key, "saved without checksums", hint=""
            )

    def callables(self, judgements: tuple[Judgement, ...], path: Location, key: str) -> None:
        """What torch would call: it loads .metadata and every object with the plain unpickler."""
        for judgement in judgements:
            if judgement.verdict == "dangerous":
                hint = "do not load this with anything that unpickles; find out where it came from"
                message = f"DANGEROUS: {judgement.what}" + (f", in '{escape(key)}'" if key else "")
                self.found.add(DANGEROUS, ERROR, path, judgement.name, message, hint)
            elif judgement.verdict == "unknown":
                message = "an unknown class, shown as data and never loaded"
                self.found.add("class-unknown", INFO, path, judgement.name, message, hint="")


def _wanted(metadata: Metadata) -> Iterator[Wanted]:
    for key, tensor in metadata.tensors.items():
        for piece in tensor.pieces:
            if piece.item is not None:
                yield Wanted(key, piece.item, tensor.dtype, piece.shape)
    for key, item in metadata.objects.items():
        if item is not None:
            yield Wanted(key, item)


def _end(wanted: Wanted) -> int:
    return wanted.item.start + wanted.item.nbytes


def _is_item(file: File, start: int, end: int) -> bool:
    """Whether bytes begin and end like a zip: ranks of older versions wrote empty parts that another one's
    entry replaced.
    """
    if end - start < END.size:
        return False
    return is_zip(file.read(start, 4)) and file.read(end - END.size, 4) == b"PK\x05\x06"
