"""Writing to object stores, by obstore: whole objects, large ones in parts. An object appears when all of it
is there; an upload that fails is aborted, so that no part of it stays behind.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from errno import EEXIST, ENOTSUP, ESTALE
from types import TracebackType
from typing import Any, Self

from ckpttools.errors import UsageError, escape
from ckpttools.location import Handle, Stat, Stored
from ckpttools.stores.remote import Bucket

PART = 8 * 1024 * 1024  # bytes; every store wants at least 5 MiB in all parts but the last
_MOST_PARTS = 9_000  # S3 takes 10,000 of one object
_AT_ONCE = 3  # parts of one object on their way
_WAIT = 0.2  # seconds
_TRIES = 5  # of several that put the same

Version = dict[str, Any]  # of an object, as the store tells it: e_tag, version


def bucket_of(place: Stored) -> Bucket:
    """Raises UsageError where nothing can be written."""
    store = place.store
    if isinstance(store, Bucket) and store.takes_objects:
        return store
    raise UsageError(
        "not-writable",
        "ckpt does not write there",
        where=place,
        why="a server of files by http takes none, and to the hub only huggingface_hub uploads",
        hint="name a folder of this machine, or a place in s3://, gs:// or az://",
    )


def version_of(place: Stored) -> Version | None:
    """Which object is there now; None for none. Raises OSError."""
    with suppress(FileNotFoundError):
        return _version((bucket := bucket_of(place)).ask(bucket.api.head, str(place.key)))
    return None


def get(place: Stored) -> tuple[bytes, Version]:
    """A small object and its version. Raises OSError."""
    got = bucket_of(place).get(str(place.key))
    return got.data, _version(got.meta)


def put(place: Stored, data: bytes, *, over: Version | None = None) -> Version:
    """A small object, where none is, or in place of the version `over`, in one request.

    Raises FileExistsError, or OSError ESTALE where there is another version. A store that knows no conditions
    is asked before.
    """
    bucket, key = bucket_of(place), str(place.key)
    mode = "create" if over is None else {k: v for k, v in over.items() if v is not None}
    try:
        done = bucket.ask(bucket.api.put, key, data, mode=mode)
    except OSError as error:
        if error.errno != ENOTSUP:
            raise
        if (there := version_of(place)) != over:
            raise FileExistsError(f"another object is there: {there}") from None
        done = bucket.ask(bucket.api.put, key, data)
    bucket.count(len(data))
    bucket.forget(key)
    return _version(done)


def put_over(place: Stored, data: bytes) -> Version:
    """A small object in place of whatever is there: several may put the same at the same time."""
    for _ in range(_TRIES):
        try:
            return put(place, data, over=version_of(place))
        except OSError as error:
            if error.errno not in (EEXIST, ESTALE):
                raise
    return put(place, data, over=version_of(place))


def delete(place: Stored) -> None:
    """Raises OSError; not where there is nothing."""
    bucket = bucket_of(place)
    with suppress(FileNotFoundError):
        bucket.ask(bucket.api.delete, str(place.key))
    bucket.forget(str(place.key))


def below(place: Stored) -> list[Stored]:
    """Every object below a folder. Raises OSError."""
    bucket = bucket_of(place)
    prefix = str(place.key).strip("/") + "/"
    found = _listed(bucket, prefix)
    return [
        Stored(bucket, type(place.key)("/", meta["path"])) for meta in found if meta["path"] + "/" != prefix
    ]


def _listed(bucket: Bucket, prefix: str, most: int | None = None) -> list[Any]:
    """What lies below a prefix, or the first of it. Raises OSError."""

    def pages(store: Any, key: str) -> list[Any]:  # the store is asked while its pages are taken
        below = f"{key}/" if key else None
        if most is None:
            return list(bucket.api.list(store, below).collect())
        return list(next(iter(bucket.api.list(store, below, chunk_size=most)), ()))

    found: list[Any] = bucket.ask(pages, prefix)
    return found


def is_taken(place: Stored) -> bool:
    """Whether there is an object, or one below. Raises OSError."""
    prefix = str(place.key).strip("/") + "/"
    bucket = bucket_of(place)
    found = _listed(bucket, prefix, most=2)
    return version_of(place) is not None or any(meta["path"] + "/" != prefix for meta in found)


def part_of(nbytes: int) -> int:
    """The length of the parts of an object."""
    return max(PART, -(-nbytes // _MOST_PARTS))


class StoreFailed(UsageError):
    """What was sent is good, and can be gone on with."""


@contextmanager
def store_errors(dst: Stored) -> Iterator[None]:
    """An `OSError` of the store as a `UsageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (EEXIST, ESTALE):
            message, hint = "another program wrote there meanwhile", "see what it was; then run this again"
        else:
            message = f"cannot write: {escape(error.strerror or type(error).__name__)}"
            hint = "check the store; the same command goes on: finished files are not sent again"
        raise StoreFailed(
            "write-failed",
            message,
            where=error.filename if isinstance(error.filename, str) else dst,
            why="what is there is not all of it, and no command takes it for a checkpoint",
            hint=hint,
        ) from None


class StoredShelf:
    """What a ledger needs (`shelves.Shelf`), below a key."""

    pause = 1.0

    def __init__(self, folder: Stored) -> None:
        self._folder = folder

    def make(self) -> None:
        """A folder is only what the keys say."""

    def remove(self) -> None:
        with suppress(OSError):
            for place in below(self._folder):
                delete(place)

    def names(self) -> set[str]:
        return {place.name for place in below(self._folder)}

    def get(self, name: str) -> bytes:
        return get(self._folder / name)[0]

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        if replace:
            put_over(self._folder / name, data)
            return
        with suppress(FileExistsError):
            put(self._folder / name, data)

    def delete(self, name: str) -> None:
        delete(self._folder / name)


class _Stopped(Exception):
    """The upload is to be aborted."""


class Upload:
    """One object of several parts. `write` each, then `finish`; leaving the context before aborts it.

    obstore takes the parts from an iterator, in a thread of its own: what makes them may read from a store.
    """

    def __init__(self, place: Stored, nbytes: int) -> None:
        self._bucket, self._key = bucket_of(place), str(place.key)
        self._parts: queue.Queue[bytes | type[_Stopped] | None] = queue.Queue(1)
        self._pool = ThreadPoolExecutor(1)
        self._done: Future[Any] = self._pool.submit(
            self._bucket.ask,
            self._bucket.api.put,
            self._key,
            self._taken(),
            use_multipart=True,
            chunk_size=part_of(nbytes),
            max_concurrency=_AT_ONCE,
        )
        self._is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            with suppress(Exception):
                self._give(_Stopped)
                self._done.result()
        self._pool.shutdown()

    def write(self, part: bytes) -> None:
        """Raises OSError where the store does not take it."""
        self._give(part)
        self._bucket.count(len(part), requests=1)

    def finish(self) -> Version:
        """The object is there. Raises OSError."""
        self._give(None)
        self._is_open = False
        version = _version(self._done.result())
        self._bucket.forget(self._key)
        return version

    def _give(self, part: bytes | type[_Stopped] | None) -> None:
        while True:
            if self._done.done():
                self._is_open = False
                self._done.result()  # raises what went wrong
                return
            with suppress(queue.Full):
                self._parts.put(part, timeout=_WAIT)
                return

    def _taken(self) -> Iterator[bytes]:
        while (part := self._parts.get()) is not None:
            if not isinstance(part, bytes):
                raise _Stopped
            yield part


class Without:
    """A store in which one key is not seen: what is unfinished, for whoever finishes it."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.name, self._bucket, self._key = bucket.name, bucket, key

    def at(self, place: Stored) -> Stored:
        return Stored(self, place.key)

    def stat(self, key: str) -> Stat:
        if key == self._key:
            raise FileNotFoundError(key)
        return self._bucket.stat(key)

    def list(self, key: str) -> Any:
        hidden = self._key.rpartition("/")
        return [e for e in self._bucket.list(key) if (key.rstrip("/"), e.name) != (hidden[0], hidden[2])]

    def open(self, key: str, *, known: bool = False) -> Handle:
        return self._bucket.open(key, known=known)

    def admit(self, key: str) -> None:
        """There are no links."""


def _version(found: Any) -> Version:
    return {"e_tag": found["e_tag"], "version": found["version"]}
