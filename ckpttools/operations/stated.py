"""Digests that a manifest states: taken where its files are what they were when it was written.

A file is what it was if its size and its xxh3_128 are the stated ones, so each byte is read once, as without
a manifest; what is spared is putting tensors together from the files of ranks, and rounding masters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext

from ckpttools import manifest
from ckpttools.checkpoint import Checkpoint
from ckpttools.compare.content import content
from ckpttools.compare.digests import Digests, of_tensors
from ckpttools.errors import CkptError
from ckpttools.formats import Source
from ckpttools.location import Location
from ckpttools.operations.writing import Bar
from ckpttools.passes.run import run
from ckpttools.plan import reads
from ckpttools.stores.files import size_of
from ckpttools.tensors import TensorRef, spans


def stated(
    source: Source, checkpoint: Checkpoint, *, workers: int = 0, bar: Bar | None = None
) -> Digests | None:
    """The digests by the checkpoint's own manifest; None where it has none, or one that does not hold.

    To be called inside `within` its root.
    """
    files = files_of(checkpoint)
    try:
        for place in manifest.places(source.target):
            entries, held = manifest.load(place), manifest.content_in(place)
            if held is None or not all(
                path.parent == place.parent and path.name in entries for path in files
            ):
                continue
            if any(size_of(path) != entries[path.name].size for path in files):
                continue
            total = sum(entries[path.name].size for path in files)
            with bar(total, "digest") if bar is not None else nullcontext() as progress:
                found = run(
                    checks=checkpoint.checks,
                    hashes={path: {} for path in files},
                    workers=workers,
                    progress=progress,
                )
            if found.results or any(found.digests[path][1] != entries[path.name].digest for path in files):
                continue
            made = of_tensors(checkpoint, held.tensors, held.apart, len(checkpoint.checks))
            if made.state == held.state and _names(made.tensors) == _names(content(checkpoint).held):
                return made
    except CkptError:
        return None  # whatever is wrong with a manifest, ckpt verify says it
    return None


def described(contents: bytes, place: Location, checkpoint: Checkpoint, found: Digests) -> bytes:
    """A manifest for `place` with the digests of what its files hold; as it was if it lacks one of them."""
    if not all(path.parent == place.parent for path in files_of(checkpoint)):
        return contents
    return manifest.with_content(contents, found.state, found.apart, found.tensors)


def files_of(checkpoint: Checkpoint) -> frozenset[Location]:
    """The files that a digest is of: those with the tensors, and the pickles or headers that name them."""
    data = {id(path): path for path in _data(checkpoint)}  # to hash a path for each tensor takes longer
    return frozenset((*data.values(), *(role.path for role in checkpoint.files)))


def _data(checkpoint: Checkpoint) -> Iterator[Location]:
    for named in content(checkpoint).held.values():
        for ref in named.values():
            for chunk in ref.chunks if isinstance(ref, TensorRef) else ():
                yield from (span.path for read in reads(chunk) for span in spans(read))


def _names(held: Mapping[str, Mapping[str, object]]) -> dict[str, set[str]]:
    return {kind: set(named) for kind, named in held.items() if named}
