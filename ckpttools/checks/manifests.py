"""A checkpoint against its manifest, and the manifest of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckpttools import manifest
from ckpttools.checkpoint import Checkpoint
from ckpttools.containers.torch_file import TorchFile, labelled
from ckpttools.errors import CkptError
from ckpttools.findings import ERROR, INFO, Finding, of_error
from ckpttools.manifest import Entry
from ckpttools.siblings import MANIFEST
from ckpttools.stores.files import size_of
from ckpttools.tensors import ByteRange


def check_manifest(
    target: Path, found: Checkpoint | None, files: list[TorchFile], *, quick: bool, workers: int
) -> list[Finding]:
    """Compare with every manifest that is there; sizes only where `quick`."""
    findings: list[Finding] = []
    stated: list[tuple[Path, dict[str, Entry]]] = []
    try:
        for place in manifest.places(target):
            try:
                entries = _about(target, place, manifest.load(place))
            except CkptError as error:
                findings.append(of_error(error))
                continue
            if entries is not None:
                stated.append((place, entries))
        whole = any(place.name == MANIFEST for place, _ in stated)
        named = {name for _, entries in stated for name in entries}
        own = [path for path in manifest.own_files(target) if whole or path.name in named] if stated else []
        if quick:
            now = {path.name: Entry(size=size_of(path), digest="") for path in own}
        else:
            now = describe(own, found, files, workers)
    except CkptError as error:
        return [*findings, of_error(error)]
    for place, entries in stated:
        findings += _changed(place, entries, now)
        if place.name == MANIFEST and target.is_dir():
            findings += _unlisted(place, entries, now)
    return findings


def _about(target: Path, place: Path, entries: dict[str, Entry]) -> dict[str, Entry] | None:
    """What a manifest says about the checkpoint's files; None where that is nothing."""
    if place.name != MANIFEST:  # of a single file, which may have been renamed together with it
        name = place.name.removesuffix(f".{MANIFEST}")
        return {name: next(iter(entries.values()))} if entries else None
    if target.is_dir():
        return entries
    return {target.name: entries[target.name]} if target.name in entries else None


def describe(
    own: list[Path], found: Checkpoint | None, files: list[TorchFile], workers: int
) -> dict[str, Entry]:
    """The digests of the files and of the tensors in them."""
    tensors: dict[Path, dict[str, tuple[int, int]]] = {path: {} for path in own}
    for path, name, start, nbytes in _tensor_ranges(found, files):
        if path in tensors:
            tensors[path].setdefault(name, (start, nbytes))
    return manifest.describe(own, tensors, workers=workers)


def _tensor_ranges(found: Checkpoint | None, files: list[TorchFile]) -> Iterator[tuple[Path, str, int, int]]:
    """Tensors that lie in one piece, by their path into the file, or by name."""
    refs = [(label, view.ref) for file in files for label, view in labelled(file)]
    if not files and found is not None:
        refs = list(found.tensors.items())
    for name, ref in refs:
        if len(ref.chunks) == 1 and isinstance(chunk := ref.chunks[0], ByteRange):
            yield chunk.path, name, chunk.start, chunk.nbytes


def _changed(place: Path, stated: dict[str, Entry], now: dict[str, Entry]) -> Iterator[Finding]:
    for difference in manifest.differences(stated, now):
        tensors = difference.tensors
        what = f"; changed: {', '.join(tensors[:8])}" if tensors else ""
        more = f" and {len(tensors) - 8} more tensors" if len(tensors) > 8 else ""
        yield Finding(
            id="manifest-mismatch",
            severity=ERROR,
            file=str(place.parent / difference.name),
            where=tensors[0] if tensors else "",
            message=f"the file {difference.problem} since the manifest was written{what}{more}",
            hint=f"restore the file from a copy; if the change was meant, delete {place.name} and "
            "write it anew with ckpt verify --write-manifest",
        )


def _unlisted(place: Path, stated: dict[str, Entry], now: dict[str, Entry]) -> Iterator[Finding]:
    for name in now.keys() - stated.keys():
        yield Finding(
            id="manifest-unlisted",
            severity=INFO,
            file=str(place.parent / name),
            where="",
            message="the file is not in the manifest: it was added later",
        )
