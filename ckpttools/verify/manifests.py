"""A checkpoint against its manifest, and the manifest of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckpttools import manifest
from ckpttools.checkpoint import Checkpoint
from ckpttools.errors import CkptError
from ckpttools.formats.files import MANIFEST
from ckpttools.formats.torch_file import TorchFile, labelled
from ckpttools.manifest import Entry
from ckpttools.tensors import ByteRange
from ckpttools.verify.findings import ERROR, INFO, Finding, of_error


def check_manifest(
    target: Path, found: Checkpoint | None, files: list[TorchFile], *, quick: bool, workers: int
) -> list[Finding]:
    """Compare with the manifest, if there is one; sizes only where `quick`."""
    place = manifest.place(target)
    if not place.is_file():
        return []
    try:
        stated = manifest.load(place)
        own = manifest.own_files(target)
        if not target.is_dir():
            stated = {name: entry for name, entry in stated.items() if name == target.name}
        if quick:
            now = {path.name: Entry(size=path.stat().st_size, digest="") for path in own}
        else:
            now = describe(own, found, files, workers)
    except CkptError as error:
        return [of_error(error)]
    return [*_changed(place, stated, now), *_unlisted(place, stated, now)]


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
            hint=f"restore the file from a copy; if the change was meant, delete {MANIFEST} and "
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
