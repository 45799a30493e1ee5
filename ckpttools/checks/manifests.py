"""A checkpoint against its manifest, and the manifest of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from ckpttools import manifest
from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.torch_file import TorchFile, labelled
from ckpttools.errors import CkptError, NotAsWritten, some
from ckpttools.findings import ERROR, INFO, Finding, of_error
from ckpttools.location import Location
from ckpttools.manifest import Entry
from ckpttools.plan import SourceCheck
from ckpttools.siblings import MANIFEST
from ckpttools.stores.files import is_folder, size_of
from ckpttools.tensors import ByteRange

if TYPE_CHECKING:
    from ckpttools.checks.contents import Passing
    from ckpttools.passes.hashes import Sinks
    from ckpttools.passes.run import Digest


class Stated(Struct, frozen=True):
    """What every manifest that is there says: its place and its entries; and what is wrong with manifests."""

    manifests: list[tuple[Location, dict[str, Entry]]]
    findings: list[Finding]

    def covers(self, path: Location) -> bool:
        """Whether a file is to be held against a manifest: of a folder's own files, all."""
        whole = any(place.name == MANIFEST for place, _ in self.manifests)
        return bool(self.manifests) and (whole or any(path.name in entries for _, entries in self.manifests))


def stated(target: Location) -> Stated:
    """Read every manifest that may say something about the checkpoint's files."""
    out = Stated([], [])
    try:
        for place in manifest.places(target):
            try:
                entries = _about(target, place, manifest.load(place))
            except CkptError as error:
                note = error.id == manifest.UNUSABLE
                out.findings.append(replace(of_error(error), severity=INFO) if note else of_error(error))
                continue
            if entries is not None:
                out.manifests.append((place, entries))
    except CkptError as error:
        out.findings.append(of_error(error))
    return out


def check_manifest(
    target: Location, own: Mapping[Location, str], said: Stated, digests: Mapping[Location, Digest]
) -> list[Finding]:
    """Hold the files against what was stated; sizes only where there are no digests."""
    findings = list(said.findings)
    try:
        now = {name: entry_of(path, digests) for path, name in own.items() if said.covers(path)}
    except CkptError as error:
        return [*findings, of_error(error)]
    for place, entries in said.manifests:
        findings += _changed(place, entries, now)
        if place.name == MANIFEST and is_folder(target):
            findings += _unlisted(place, entries, now)
    return findings


def entry_of(path: Location, digests: Mapping[Location, Digest]) -> Entry:
    """A file as it is now."""
    if path not in digests:
        return Entry(size=size_of(path), digest="")
    size, digest, tensors = digests[path]
    return Entry(size=size, digest=digest, tensors=tensors)


def _about(target: Location, place: Location, entries: dict[str, Entry]) -> dict[str, Entry] | None:
    """What a manifest says about the checkpoint's files; None where that is nothing."""
    if place.name != MANIFEST:  # of a single file, which may have been renamed together with it
        name = place.name.removesuffix(f".{MANIFEST}")
        return {name: next(iter(entries.values()))} if entries else None
    if is_folder(target):
        return entries
    return {target.name: entries[target.name]} if target.name in entries else None


def describe(
    own: Mapping[Location, str],
    found: Checkpoint | None,
    files: list[TorchFile],
    workers: int,
    crcs: Mapping[Location, int] | None = None,
    sinks: Sinks | None = None,
) -> dict[str, Entry]:
    """The digests of the files and of the tensors in them, from one pass, whose bytes `sinks` are given.

    `crcs` are the CRC-32s of files as they were written. Raises CkptError, and UsageError "write-failed"
    where what is read is not what was written.
    """
    digests = read_back(ranges_of([*own, *(crcs or {})], found, files), crcs or {}, workers, sinks)
    return {name: entry_of(path, digests) for path, name in own.items()}


def read_back(
    hashes: Mapping[Location, dict[str, tuple[int, int]]],
    crcs: Mapping[Location, int],
    workers: int,
    sinks: Sinks | None = None,
    passing: Passing | None = None,
) -> Mapping[Location, Digest]:
    """The digests of files and of ranges in them, from one pass that also compares the CRC-32s of `crcs`, and
    gives the bytes of these files to `sinks`; where these want none, `passing` reads them.

    Raises NotAsWritten.
    """
    from ckpttools.passes.run import run  # numpy
    from ckpttools.passes.tasks import BadChecksum

    wanted = [
        SourceCheck(ByteRange(path, 0, size_of(path)), crc, "what was written") for path, crc in crcs.items()
    ]
    if passing is None or sinks:
        passed = run((), wanted, hashes=hashes, sinks=sinks, workers=workers)
    else:
        passed = passing((), wanted, hashes=hashes, workers=workers, progress=None)
    places = [result.check.source.path for result in passed.results if isinstance(result, BadChecksum)]
    if places:
        raise NotAsWritten(places)
    return passed.digests


def ranges_of(
    own: Iterable[Location], found: Checkpoint | None, files: list[TorchFile]
) -> dict[Location, dict[str, tuple[int, int]]]:
    """The files to take digests of, with the ranges of the tensors in each."""
    tensors: dict[Location, dict[str, tuple[int, int]]] = {path: {} for path in own}
    if not tensors:
        return {}
    for path, name, start, nbytes in _tensor_ranges(found, files):
        if path in tensors:
            tensors[path].setdefault(name, (start, nbytes))
    return tensors


def _tensor_ranges(
    found: Checkpoint | None, files: list[TorchFile]
) -> Iterator[tuple[Location, str, int, int]]:
    """Tensors that lie in one piece, by their path into the file, or by name."""
    refs = [(label, view.ref) for file in files for label, view in labelled(file)]
    if not files and found is not None:
        refs = list(found.tensors.items())
    for name, ref in refs:
        if len(ref.chunks) == 1 and isinstance(chunk := ref.chunks[0], ByteRange):
            yield chunk.path, name, chunk.start, chunk.nbytes


def _changed(place: Location, stated: dict[str, Entry], now: dict[str, Entry]) -> Iterator[Finding]:
    for difference in manifest.differences(stated, now):
        tensors = difference.tensors
        what = f"; changed: {some(tensors)}" if tensors else ""
        yield Finding(
            id="manifest-mismatch",
            severity=ERROR,
            file=str(place.parent / difference.name),
            where=tensors[0] if tensors else "",
            message=f"the file {difference.problem} since the manifest was written{what}",
            hint=f"restore the file from a copy; if the change was meant, delete {place.name} and "
            "write it anew with ckpt verify --write-manifest",
        )


def _unlisted(place: Location, stated: dict[str, Entry], now: dict[str, Entry]) -> Iterator[Finding]:
    for name in now.keys() - stated.keys():
        yield Finding(
            id="manifest-unlisted",
            severity=INFO,
            file=str(place.parent / name),
            message="the file is not in the manifest: it was added later",
        )
