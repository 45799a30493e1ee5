"""Object stores, by obstore (the `remote` extra): S3, Google, Azure, and single files by https; `hub` beside.

Every request costs tens of milliseconds, so a header is fetched in few and large ones: the first bytes of a
file with its size and ETag, its last bytes where it may be a zip, and whatever lies between in pieces of at
least `AHEAD`. When a second file of a kind is opened in a folder, the others' ends are fetched beside, 32
requests at once. What was fetched is kept, and holds for one ETag: an object that changes while it is read is
an error. Credentials are the store's own matter (environment, profile, role), and are in no message.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from errno import EIO, ENOENT, EOPNOTSUPP, ERANGE, ESTALE
from pathlib import PurePosixPath
from typing import Any

from ckpttools.errors import UsageError
from ckpttools.location import Entry, Listed, NotAFile, Stat, Stored
from ckpttools.siblings import MANIFEST, UNFINISHED
from ckpttools.stores import hub
from ckpttools.stores.clients import client, failed
from ckpttools.stores.fetched import Fetched, stat_of, tag_of

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "https", "http", hub.SCHEME)
_SAME = {"s3a": "s3", "azure": "az", "adl": "az"}  # two names of one place would be two places
HEAD = 256 * 1024  # of every file: most headers are shorter
TAIL = 64 * 1024  # of a zip: the directory of a few hundred records
AHEAD = 128 * 1024
GAP = 64 * 1024  # ranges that lie closer are one request
AT_ONCE = 32
FRESH = 2.0  # seconds that a listing, or an ETag, is believed
BLOCK = 4 * 1024 * 1024  # bytes of tensors that come in one request
BLOCKS = 32  # of them in memory
KEPT = 512 * 1024 * 1024  # bytes of headers, of all files of a store
RETRIES: dict[str, Any] = {}  # as obstore has them: ten, for up to three minutes
ZIPS = (".pt", ".pth", ".bin", ".ckpt", ".tar")
BEFORE = 4 * 1024  # in front of the end: a zip's last records stand before its directory


_NO_RANGE = (ERANGE, EOPNOTSUPP)  # of an empty object none can be asked for


class Bucket:
    """One bucket or host. `requests`, `nbytes` and `nbytes_sent` count what was asked for, came and went."""

    def __init__(self, url: str) -> None:
        """Raises UsageError where the extra is not installed or the address makes no sense."""
        self.name = url
        self.requests = self.nbytes = self.nbytes_sent = 0
        self.api, self._store = client(url, RETRIES)
        self._objects: OrderedDict[str, Fetched] = OrderedDict()
        self._listed: dict[str, tuple[float, dict[str, Stat]]] = {}
        self._seen: dict[str, tuple[float, Stat | None]] = {}  # where no listing says it
        self._lists = True  # not a server of single files
        self._opened: dict[tuple[str, str], int] = {}  # folder and suffix -> how many files of it
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._blocks: OrderedDict[tuple[str, str | None, int], Future[bytes]] = OrderedDict()

    @property
    def takes_objects(self) -> bool:
        """Whether ckpt writes there."""
        return not self.name.startswith(("http", f"{hub.SCHEME}:"))

    def stat(self, key: str) -> Stat:
        if (inside := self._inside(str(PurePosixPath(key).parent))) is not None:
            if (known := inside.get(_name(key))) is not None:
                return known
            raise FileNotFoundError(ENOENT, "there is no such key", key)
        at, found = self._seen.get(key, (-FRESH, None))
        if time.monotonic() - at >= FRESH:
            found = self._look(key)
            self._seen[key] = (time.monotonic(), found)
        if found is None:
            raise FileNotFoundError(ENOENT, "there is no such key", key)
        return found

    def _look(self, key: str) -> Stat | None:
        """Ask what is there; None for nothing."""
        if not key.strip("/"):
            self.list(key)
            return Stat("folder", 0, 0, key)
        path = PurePosixPath(key)
        if str(path.parent) in self._objects:
            return None  # below a file
        if not path.suffix and not self.name.startswith("http"):  # a folder, most likely
            return self._folder(key) or self._file(key)
        is_small = path.name.endswith((UNFINISHED, MANIFEST))  # never a folder
        return self._file(key) or (None if is_small or not self._lists else self._folder(key))

    def _folder(self, key: str) -> Stat | None:
        with suppress(FileNotFoundError):
            self.list(key)
            return Stat("folder", 0, 0, key)
        return None

    def _file(self, key: str) -> Stat | None:
        """What is asked for before it is opened is fetched at once: its first bytes say as much."""
        with suppress(FileNotFoundError):
            try:
                if key not in self._objects and PurePosixPath(key).suffix in (*ZIPS, ".safetensors"):
                    self._begin(key)
                    return self._seen[key][1]
            except OSError as error:
                if error.errno not in _NO_RANGE:
                    raise
            return stat_of(self.ask(self.api.head, key))
        return None

    def list(self, key: str) -> Iterable[Entry]:
        inside = self._inside(key) or self._list(key)
        return [Listed(name, found.kind == "folder") for name, found in inside.items()]

    def _inside(self, key: str) -> dict[str, Stat] | None:
        """What a folder held a moment ago; None where nobody looked."""
        at, inside = self._listed.get(key, (-FRESH, None))
        return inside if time.monotonic() - at < FRESH else None

    def _list(self, key: str) -> dict[str, Stat]:
        try:
            found = self.ask(self.api.list_with_delimiter, key)
        except FileNotFoundError:
            raise
        except OSError:
            if not self.name.startswith("http"):
                raise
            self._lists = False
            raise FileNotFoundError(ENOENT, "a server of files has no listings", key) from None
        own = key.strip("/")  # some tools write an empty object for a folder
        inside = {_name(path): Stat("folder", 0, 0, path) for path in found["common_prefixes"]}
        inside |= {_name(meta["path"]): stat_of(meta) for meta in found["objects"] if meta["path"] != own}
        if not inside:
            raise FileNotFoundError(ENOENT, "there is no such key", key)
        self._listed[key] = (time.monotonic(), inside)
        return inside

    def open(self, key: str, *, known: bool = False) -> RemoteFile:
        object = self._object(key)
        if not known:
            self._beside(PurePosixPath(key))
        return RemoteFile(self, key, object)

    def admit(self, key: str) -> None:
        """There are no links."""

    def _object(self, key: str) -> Fetched:
        """The object as it is now, with its first bytes."""
        found, now = self._objects.get(key), time.monotonic()
        if found is not None and now - found.at < FRESH:
            return found
        known = (self._inside(str(PurePosixPath(key).parent)) or {}).get(_name(key))
        if found is not None:
            meta = known or self.stat(key)
            if (meta.size, meta.tag) == (found.size, tag_of(found.etag)):
                found.at = now
                return found
        if known is not None and known.kind == "folder":
            raise NotAFile
        if known is not None and not known.size:
            return self._keep(key, Fetched(0, None, now))
        try:
            return self._begin(key, known)
        except FileNotFoundError:
            self.list(key)
            raise NotAFile from None
        except OSError as error:
            if error.errno not in _NO_RANGE or self.stat(key).size:
                raise
            return self._keep(key, Fetched(0, None, now))

    def _begin(self, key: str, known: Stat | None = None) -> Fetched:
        """The first bytes; of what may be a zip, where its size is known, the last ones beside."""
        last = None
        if known is not None and known.size > HEAD and PurePosixPath(key).suffix in ZIPS:
            last = self._pool.submit(self._get, key, max(known.size - TAIL, 0), known.size, None)
        got = self._get(key, 0, HEAD, None)
        now = time.monotonic()
        object = Fetched(got.meta["size"], got.meta["e_tag"], now)
        self._seen[key] = (now, stat_of(got.meta))
        object.add(0, got.data)
        if last is not None:
            with suppress(OSError):  # said when it is read
                end = last.result()
                same = (end.meta["size"], end.meta["e_tag"]) == (object.size, object.etag)
                if same and object.etag is not None:
                    object.add(end.range[0], end.data)
        return self._keep(key, object)

    def _keep(self, key: str, object: Fetched) -> Fetched:
        with self._lock:
            self._objects[key] = object
            self._objects.move_to_end(key)
            kept = sum(len(data) for each in self._objects.values() for _, data in each.parts)
            while kept > KEPT and len(self._objects) > 1:
                kept -= sum(len(data) for _, data in self._objects.popitem(last=False)[1].parts)
        return object

    def _beside(self, path: PurePosixPath) -> None:
        """Fetch the ends of the files of one kind in a folder, when the second of them is opened."""
        kind = (str(path.parent), path.suffix)
        self._opened[kind] = self._opened.get(kind, 0) + 1
        inside = self._inside(kind[0]) or {}
        if self._opened[kind] != 2 or not path.suffix:
            return
        names = [
            name for name, found in inside.items() if found.kind == "file" and name.endswith(path.suffix)
        ]

        def fetch(key: str) -> None:
            try:
                RemoteFile(self, key, self._object(key)).ends()
            except OSError:
                return  # said when it is opened

        with ThreadPoolExecutor(AT_ONCE // 2 if path.suffix in ZIPS else AT_ONCE) as pool:
            list(pool.map(fetch, (str(path.parent / name) for name in names)))

    def _get(self, key: str, start: int, end: int, etag: str | None) -> hub.Got:
        options: dict[str, object] = {"range": (start, end)}
        if etag is not None:
            options["if_match"] = etag
        got = self.get(key, options=options)
        with self._lock:
            self.nbytes += got.range[1] - got.range[0]
        return got

    def get(self, key: str, **more: object) -> hub.Got:
        """An object or a range of it, all of which has come. Raises OSError."""

        def take(store: Any, key: str) -> hub.Got:
            got = self.api.get(store, key, **more)
            return hub.Got(bytes(got.bytes()), got.range, got.meta)

        found: hub.Got = self.ask(take, key)
        return found

    def fetch(self, key: str, object: Fetched, start: int, end: int) -> bytes:
        """Bytes of this version. Raises OSError, ESTALE where it is another one now."""
        got = self._get(key, start, end, object.etag)
        if object.etag is None and got.meta["size"] != object.size:
            raise OSError(ESTALE, "the object changed while it was read")
        return got.data

    def block(self, key: str, object: Fetched, number: int) -> bytes:
        """`BLOCK` bytes of an object; the next ones are on their way when it returns."""
        with self._lock:
            for each in (number, number + 1):
                start, name = each * BLOCK, (key, object.etag, each)
                if start < object.size and name not in self._blocks:
                    end = min(start + BLOCK, object.size)
                    self._blocks[name] = self._pool.submit(self.fetch, key, object, start, end)
            while len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
            found = self._blocks[key, object.etag, number]
            self._blocks.move_to_end((key, object.etag, number))
        try:
            return found.result()
        except OSError:
            self._blocks.pop((key, object.etag, number), None)
            raise

    def forget(self, key: str) -> None:
        """An object is written or deleted: what is known of it, and every listing, holds no longer."""
        with self._lock:
            self._objects.pop(key, None)
            self._listed.clear()
            self._seen.clear()

    def count(self, nbytes: int, requests: int = 0) -> None:
        """Of what is sent."""
        with self._lock:
            self.nbytes_sent += nbytes
            self.requests += requests

    def ask(self, call: Any, key: str, *args: object, **more: object) -> Any:
        """One of obstore's functions (`api`). Raises OSError, with no word of what the store said."""
        with self._lock:
            self.requests += 1
        try:
            return call(self._store, key.strip("/"), *args, **more)
        except FileNotFoundError:
            raise FileNotFoundError(ENOENT, "there is no such key", key) from None
        except Exception as error:  # its text may quote what was sent
            raise failed(error, f"{self.name}{key}") from None


class RemoteFile:
    """An object opened for reading at offsets."""

    far = True

    def __init__(self, bucket: Bucket, key: str, object: Fetched) -> None:
        self._bucket, self._key, self._object, self.size = bucket, key, object, object.size

    def read(self, start: int, nbytes: int) -> bytes:
        nbytes = max(min(nbytes, self.size - start), 0)
        found = self._object.find(start, nbytes) if nbytes else b""
        if found is None:
            end = min(max(start + nbytes, start + AHEAD), self.size)
            low = max(min(start - BEFORE, self.size - TAIL), 0) if end == self.size else start
            self._fetch(low, end)
            found = self._object.find(start, nbytes)
        if found is None:
            raise OSError(EIO, "the store sent fewer bytes than were asked for")
        return found

    def readinto(self, view: memoryview, start: int) -> int:
        nbytes = max(min(len(view), self.size - start), 0)
        data = self._object.find(start, nbytes)
        if data is None and nbytes >= AHEAD:  # of tensors: as far as one block goes
            number, at = divmod(start, BLOCK)
            data = self._bucket.block(self._key, self._object, number)[at : at + nbytes]
        elif data is None:
            data = self.read(start, nbytes)
        view[: len(data)] = data
        return len(data)

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch what is going to be read, (start, nbytes), neighbours in one request, the others beside."""
        if joined := self._joined(ranges):
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda part: self._fetch(*part), joined))

    def reads(self, ranges: Iterable[tuple[int, int]]) -> int:
        return len(self._joined(ranges))

    def _joined(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """What of these ranges is not there: (start, end), neighbours as one."""
        joined: list[tuple[int, int]] = []
        for start, nbytes in sorted(ranges):
            end = min(start + nbytes, self.size)
            if end <= start or self._object.find(start, end - start) is not None:
                continue
            if joined and start - joined[-1][1] <= GAP:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return joined

    def ends(self) -> None:
        """The last bytes, too, where the file may be a zip."""
        if PurePosixPath(self._key).suffix in ZIPS and self.size > HEAD:
            self.prefetch([(max(self.size - TAIL, 0), TAIL)])

    def _fetch(self, start: int, end: int) -> None:
        self._object.add(start, self._bucket.fetch(self._key, self._object, start, end))

    def close(self) -> None:
        """There is nothing to close."""


def _name(path: str) -> str:
    return PurePosixPath(path).name


_buckets: dict[str, Bucket] = {}


def place(scheme: str, text: str) -> Stored:
    """What an address such as s3://bucket/run/step_20 means. Raises UsageError."""
    address = text.partition("://")[2]
    host, _, key = address.partition("/")
    if scheme == hub.SCHEME:
        host, key = hub.split(address)
    scheme = _SAME.get(scheme, scheme)
    named_by_at = scheme in (hub.SCHEME, "abfs", "abfss")  # a revision, an account
    if not host or ("@" in host and (not named_by_at or ":" in host)) or "?" in address:
        raise UsageError(
            "store-unknown",
            "the address names no bucket, or holds a password or a signature",
            where=f"{scheme}://",
            why="an address is shown in messages and kept by shells: it names the place alone",
            hint="write it as s3://BUCKET/PATH; credentials belong into the environment",
        )
    if ".." in key.split("/"):
        raise UsageError(
            "store-unknown",
            "a key has no ..",
            where=text,
            why="a store has no folders to go up from: the object would have those two dots in its name",
            hint="write the whole path below the bucket",
        )
    url = f"{scheme}://{host}"
    if url not in _buckets:
        _buckets[url] = Bucket(url)
    return Stored(_buckets[url], PurePosixPath("/", key))


def used() -> tuple[int, int, int]:
    """Requests made so far, bytes that came and bytes that were sent; a part that is sent is a request."""
    found = list(_buckets.values())
    return sum(b.requests for b in found), sum(b.nbytes for b in found), sum(b.nbytes_sent for b in found)
