"""Whether a destination in a store is, contains or lies in what is read, by whatever name that is addressed.

`az://C` and `abfs://C@ACCOUNT` may be one container, and what a server hands out as
`https://HOST/BUCKET/KEY` may be `s3://BUCKET/KEY`. The store itself tells: an object of the same length and
ETag under the same key is the same one.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from ckpttools.execute import preflight, sending
from ckpttools.location import Location, Stored
from ckpttools.stores.files import stat

_AZURE = ("az", "abfs", "abfss")


def refuse_source(dst: Stored, files: Iterable[Location], source: Location | None) -> None:
    """`files` are those that are read, `source` is what was named. Raises UsageError, OSError."""
    found = sorted(file for file in files if isinstance(file, Stored))
    roots = [*found, *([source] if isinstance(source, Stored) else [])]
    dropped: dict[str, int | None] = {dst.store.name: 0}
    for file in found:
        if file.store.name not in dropped:
            dropped[file.store.name] = _dropped(file, dst)
    for root in roots:
        n = dropped.get(root.store.name)
        if n is not None and _meet(root.parts[1 + n :], dst.parts[1:]):
            raise preflight.in_source(dst, root)


def _meet(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    n = min(len(one), len(other))
    return one[:n] == other[:n]


def _dropped(file: Stored, dst: Stored) -> int | None:
    """How many folders in front of a key name the bucket of `dst`; None where the file lies elsewhere."""
    scheme, other = (store.name.partition(":")[0] for store in (file.store, dst.store))
    most = len(file.parts) - 1 if scheme.startswith("http") else 1
    if scheme not in ("http", "https") and not (scheme in _AZURE and other in _AZURE):
        return None
    was = stat(file)
    for n in range(most):
        there = Stored(dst.store, type(dst.key)("/", *file.parts[1 + n :]))
        sending.bucket_of(dst).forget(str(there.key))
        with suppress(FileNotFoundError):
            now = stat(there)
            if now.size == was.size and (now.tag == was.tag or None in (now.tag, was.tag)):
                return n
    return None
