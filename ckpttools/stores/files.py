"""What is at a place, and what it holds: every look and every read of ckpttools, checked.

A place is a `Location`: a path of this machine, or a key in another store.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from errno import EBADF, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR
from pathlib import Path, PurePath

from ckpttools.errors import CkptError, UsageError, escape
from ckpttools.location import Entry, Handle, Location, NotAFile, Stat, Store, Stored
from ckpttools.stores.disk import DISK
from ckpttools.stores.inflated import Deflated, Inflated
from ckpttools.stores.once import kept
from ckpttools.tensors import ByteRange

LFS_MAGIC = b"version https://git-lfs"
MAX_ENTRIES = 100_000
OFTEN = 8  # ways to one folder
GAP, MOST = 1 << 13, 4 << 20  # of reads that take several ranges at once
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


class File:
    """A regular file opened for reading at offsets, or a window of one: a file within the file.

    `base` is where it begins in the file at `path`; all other offsets count from there.
    """

    __slots__ = ("_handle", "_held", "base", "path", "size")

    def __init__(self, path: Location, handle: Handle, size: int, base: int = 0) -> None:
        self.path, self._handle, self.size, self.base = path, handle, size, base
        self._held: list[tuple[int, bytes]] = []

    def window(self, start: int, nbytes: int) -> File:
        """The file that lies in these bytes; raises CkptError where this one is shorter."""
        if start < 0 or nbytes < 0 or start + nbytes > self.size:
            raise truncated(self.path, f"bytes {start} to {start + nbytes} of {self.size}")
        return File(self.path, self._handle, nbytes, self.base + start)

    def range(self, start: int, nbytes: int) -> ByteRange:
        """Bytes of this file as a range of the whole file at `path`."""
        return ByteRange(self.path, self.base + start, nbytes)

    def read(self, start: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `start`; raises CkptError where the file is shorter."""
        if start < 0 or nbytes < 0 or start + nbytes > self.size:
            raise truncated(self.path, f"bytes {start} to {start + nbytes} of {self.size}")
        for at, held in self._held:
            if at <= start and start + nbytes <= at + len(held):
                return held[start - at : start - at + nbytes]
        parts: list[bytes] = []
        while nbytes:
            try:
                part = self._handle.read(self.base + start, nbytes)
            except OSError as error:
                raise CkptError(
                    "read-error",
                    f"reading at byte {self.base + start} failed: {escape(error.strerror)}",
                    where=self.path,
                    why="the disk or the network file system could not deliver the bytes",
                    hint="look at the system's log; copy the file from another place",
                ) from None
            if not part:
                raise truncated(self.path, f"byte {start} is past the end")
            parts.append(part)
            start += len(part)
            nbytes -= len(part)
        return b"".join(parts)

    @property
    def far(self) -> bool:
        """Whether reads should be few and large."""
        return self._handle.far

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """These (start, nbytes) are going to be read: a store that is far away gets them in few requests."""
        if self._handle.far:
            self._handle.prefetch((self.base + start, nbytes) for start, nbytes in ranges)

    def reads(self, ranges: Iterable[tuple[int, int]]) -> int:
        """How many requests of a store these would take."""
        return self._handle.reads((self.base + start, nbytes) for start, nbytes in ranges)

    def hold(self, start: int, nbytes: int) -> None:
        """Read these bytes by one call and keep them: what lies in them is not read again."""
        if not self.holds(start, nbytes):
            self._held.append((start, self.read(start, nbytes)))

    def holds(self, start: int, nbytes: int) -> bool:
        for at, held in self._held:  # noqa: SIM110  asked for every record of an archive
            if at <= start and start + nbytes <= at + len(held):
                return True
        return False

    def pieces(self, wanted: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of ranges (start, nbytes) that come in ascending order; neighbours by one call."""
        wanted = list(wanted)
        if self.far:
            self.prefetch(wanted)
            yield from (self.read(start, nbytes) for start, nbytes in wanted)
            return
        run: list[tuple[int, int]] = []
        for start, nbytes in wanted:
            if run and (start - sum(run[-1]) > GAP or start + nbytes - run[0][0] > MOST):
                yield from self._pieces(run)
                run = []
            run.append((start, nbytes))
        yield from self._pieces(run)

    def _pieces(self, run: list[tuple[int, int]]) -> Iterator[bytes]:
        if run:
            first = run[0][0]
            data = self.read(first, sum(run[-1]) - first)
            yield from (data[start - first : start - first + nbytes] for start, nbytes in run)

    def head(self, nbytes: int) -> bytes:
        """The first bytes, fewer if the file is shorter."""
        return self.read(0, min(nbytes, self.size))


def truncated(path: Location, detail: str) -> CkptError:
    return CkptError(
        "file-truncated",
        f"the file is shorter than its own structure says: {detail}",
        where=path,
        why="an interrupted save, a full disk or a broken copy leaves such files",
        hint="copy the file again from where it was saved, or use an older checkpoint",
    )


@contextmanager
def opened(path: Location, *, known: bool = False) -> Iterator[File]:
    """Open a regular file. Devices, pipes, folders, empty files and git-lfs pointers are refused, and links
    that lead out of the checkpoint, unless the file is `known`: a range of it was made when it was opened.
    """
    handle = _open(path, known)
    try:
        file = File(path, handle, handle.size)
        if file.size == 0:
            raise CkptError(
                "file-empty",
                "the file has 0 bytes",
                where=path,
                why="a save that was killed or ran out of disk leaves such files; it restores nothing",
                hint="copy it again from where it was saved, or use an older checkpoint",
            )
        if file.size < 1024 and file.head(len(LFS_MAGIC)) == LFS_MAGIC:
            raise CkptError(
                "lfs-pointer",
                "a git-lfs pointer, not the file itself",
                where=path,
                why="the repository was cloned without its large files",
                hint="run `git lfs pull` in the repository that it came from",
            )
        yield file
    finally:
        handle.close()


def _open(path: Location, known: bool) -> Handle:
    store, key = _at(path)
    try:
        return store.open(key, known=known)
    except FileNotFoundError:
        raise UsageError("not-found", "there is no such file", where=path, hint="check the path") from None
    except PermissionError:
        raise UsageError(
            "no-permission", "the file may not be read", where=path, hint="ask its owner for read permission"
        ) from None
    except NotAFile:
        raise CkptError(
            "not-a-file",
            "not a regular file",
            where=path,
            why="a checkpoint is made of regular files; devices and pipes are never read",
            hint="name a file or a folder; what comes through a pipe must be saved first",
        ) from None
    except (OSError, ValueError) as error:  # a loop of links, a socket, a name that is too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            "not-readable", f"cannot be opened: {escape(reason)}", where=path, hint="check the path"
        ) from None


def handle(path: Location) -> Handle:
    """A known file, for whoever reads ranges of it. Raises OSError."""
    store, key = _at(path)
    return store.open(key, known=True)


def bytes_of(source: ByteRange) -> bytes:
    """The bytes of a range. Raises CkptError where they cannot be read."""
    with opened(source.path, known=True) as file:
        return file.read(source.start, source.nbytes)


def inflated(
    path: Location, records: Mapping[str, Deflated], damaged: Callable[[str], CkptError]
) -> Inflated:
    """A store of records of an archive that is known."""
    return Inflated(path, records, opening=handle, stat=stat, damaged=damaged)


def entries(folder: Location) -> list[Entry]:
    """The entries of a folder, sorted by name. Raises UsageError where it cannot be listed."""
    return [*_entries(folder)]


@kept
def _entries(folder: Location) -> list[Entry]:
    store, key = _at(folder)
    found: list[Entry] = []
    try:
        for entry in store.list(key):
            found.append(entry)
            if len(found) > MAX_ENTRIES:
                raise UsageError("too-many-files", f"more than {MAX_ENTRIES} entries", where=folder)
    except PermissionError:
        raise UsageError(
            "no-permission", "the folder may not be listed", where=folder, hint="ask its owner for access"
        ) from None
    except NotADirectoryError:
        raise UsageError(
            "not-found",
            "it is a file, or lies below one",
            where=folder,
            why="a folder is needed here: of checkpoints, or of runs",
            hint="name the folder that it lies in; ckpt inspect and ckpt verify take single files",
        ) from None
    except (OSError, ValueError) as error:
        gone = isinstance(error, FileNotFoundError)
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            "not-found" if gone else "not-readable",
            "there is no such folder" if gone else f"cannot be listed: {escape(reason)}",
            where=folder,
            why="nothing can be listed there",
            hint="check the path",
        ) from None
    return sorted(found, key=lambda entry: entry.name)


class Entered:
    """Folders that were entered. Links may lead to one a few times, but not round and round."""

    def __init__(self) -> None:
        self._times: Counter[object] = Counter()

    def enter(self, folder: Location) -> None:
        """Raises CkptError "link-loop"."""
        if isinstance(folder, Stored):
            return  # no links
        tag = stat(folder).tag
        self._times[tag] += 1
        if self._times[tag] > OFTEN:
            raise CkptError(
                "link-loop",
                "links between folders lead back to where they lie",
                where=folder,
                why="the same files would be met again and again",
                hint="remove the links: find DIR -type l -ls names them",
            )


def walk(folder: Location, into: Callable[[str], bool] = bool) -> Iterator[tuple[Location, Entry]]:
    """Everything below a folder, each folder before what is in it; links and folders whose names `into`
    declines are not entered, nor those that cannot be listed.
    """
    todo = [folder]
    while todo:
        here = todo.pop()
        try:
            found = entries(here)
        except CkptError:
            continue
        yield from ((here / entry.name, entry) for entry in found)
        todo += [here / e.name for e in found if is_folder(e) and not e.is_symlink() and into(e.name)]


def stat(path: Location) -> Stat:
    """What is at a place, links followed. Raises OSError, or ValueError for what is no name at all."""
    store, key = _at(path)
    return store.stat(key)


def _kind(path: Location) -> str | None:
    try:
        return stat(path).kind
    except ValueError:
        return None
    except OSError as error:
        if error.errno in (ENOENT, ENOTDIR, EBADF, ELOOP, ENAMETOOLONG):
            return None
        raise


def exists(path: Location) -> bool:
    """Whether something is there, links followed. Raises OSError where nobody can say."""
    return _kind(path) is not None


def is_file(at: Location | Entry) -> bool:
    """Whether there is a regular file or a link to one. Raises OSError where nobody can say; of an entry,
    a link that leads in circles is none.
    """
    if isinstance(at, PurePath | Stored):
        return _kind(at) == "file"
    try:
        return at.is_file()
    except OSError:
        return False


def is_folder(at: Location | Entry) -> bool:
    """The same for folders."""
    if isinstance(at, PurePath | Stored):
        return _kind(at) == "folder"
    try:
        return at.is_dir()
    except OSError:
        return False


def small_text(path: Location, limit: int) -> str:
    """A text file of at most `limit` bytes, such as `latest`."""
    with opened(path) as file:
        if file.size > limit:
            raise CkptError(
                "text-too-long", f"{file.size} bytes where at most {limit} make sense", where=path
            )
        raw = file.head(limit)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CkptError("text-damaged", "the file is not UTF-8 text", where=path) from None


def is_link(at: Location | Entry) -> bool:
    """Whether it is itself a symbolic link, wherever it leads."""
    try:
        return not isinstance(at, Stored) and at.is_symlink()
    except (OSError, ValueError):
        return False


def named(text: str | Location) -> Location:
    """What a user named: a path, or a place in a store. Raises UsageError for a kind of store that is not
    known.
    """
    if isinstance(text, str):
        return _stored(match[1].lower(), text) if (match := _URL.match(text)) else Path(text)
    return text


def _stored(scheme: str, text: str) -> Stored:
    from ckpttools.stores import remote  # of no use to paths

    if scheme in remote.SCHEMES:
        return remote.place(scheme, text)
    raise UsageError(
        "store-unknown",
        f"{scheme}:// is not a kind of place that ckpt reads from",
        where=text,
        why=f"known: {', '.join(remote.SCHEMES)}",
        hint="copy the checkpoint to a disk first; a file of such a name is meant with ./ before it",
    )


def local(path: str | Location) -> Path:
    """The path of a place that is written to or beside. Raises UsageError for one in a store."""
    if isinstance(path, Stored) or (isinstance(path, str) and _URL.match(path)):
        raise UsageError(
            "not-local",
            "what is asked for needs a path of this machine, and this is an address in a store",
            where=f"{path.partition(':')[0]}://..." if isinstance(path, str) else path,  # no secret is shown
            why="it is made or changed in place, by renames, and stores have none",
            hint="name a file or folder of this machine",
        )
    return Path(path)


def size_of(path: Location) -> int:
    """The size of a file that is going to be read or copied. Raises CkptError where it may not be, OSError
    where it cannot.
    """
    store, key = _at(path)
    store.admit(key)
    return store.stat(key).size


def _at(path: Location) -> tuple[Store, str]:
    """The store of a place, and the place in it."""
    return (path.store, str(path.key)) if isinstance(path, Stored) else (DISK, str(path))
