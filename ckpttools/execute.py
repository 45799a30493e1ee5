"""Carries out a plan: the only module that writes.

The files are built under a staging name beside the destination, flushed, and appear by one rename:

1. refuse: destination exists or lies in the sources, parent missing, too little space, short source;
2. remove what a killed run left behind;
3. reserve the space of every file, copy in units of `UNIT` bytes by a few threads, a CRC-32 of every
   byte as it passes; the last unit of a file writes its `Crc32` segments and flushes it;
4. compare the checksums that the sources state; flush the folders; rename; flush the parent folder.

Whatever happens before the rename leaves the destination as it was and removes the staging.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import signal
import socket
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import NamedTuple

from ckpttools import plan as planning
from ckpttools.checksums import RangeCrcs, crc32
from ckpttools.errors import CkptError, UsageError
from ckpttools.plan import Cast, Crc32, Literal, OutputFile, Plan, Segment, SourceCheck
from ckpttools.progress import Progress
from ckpttools.tensors import ByteRange, Chunk, Strided, Zeros
from ckpttools.values import BLOCK_NBYTES, Cutter, Handles, Reader, cast, numpy_array, truncated

UNIT = 1024 * 1024  # the fastest of 256 KiB to 4 MiB: a buffer that is still in the cache for its CRC
_GATHER = 4 * UNIT  # views are copied in larger parts: the runs that they read get longer with the part
_SLACK = 64  # bytes: an element or a checksum may reach over the end of a unit
_PAGE = 4096
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """`path` as in the plan; `crc32` of the whole file, taken from the bytes as they were written."""

    path: str
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was done. `nbytes_read` counts source bytes, also those read only for a checksum."""

    dst: Path
    files: tuple[WrittenFile, ...]
    nbytes_written: int
    nbytes_read: int
    checked: int  # source checksums that were compared and found right
    notes: tuple[str, ...]


def execute(
    plan: Plan,
    dst: Path,
    *,
    source: Path | None = None,
    force: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Write the plan's files at `dst`; afterwards they are whole and on disk, or `dst` is as it was.

    `source` is the file or folder that the command reads; nothing is ever written inside it. `force`
    replaces an existing `dst` atomically. `workers` threads copy, 0 chooses. Called from the main
    thread, SIGTERM and SIGHUP raise `SystemExit` while it runs, so that they clean up as SIGINT does.

    Raises `UsageError` where it cannot start or write, `CkptError` where the sources are damaged or
    differ from a checksum, `ValueError` for a plan that makes no sense.
    """
    validate(plan)
    dst = _real_parent(dst)
    _refuse_source(dst, planning.sources(plan), source)
    with _write_errors(dst):
        notes = _clear_stale(dst)
        if os.path.lexists(dst) and not force:
            raise _exists(dst)
        _need_space(plan, dst)
    before = _fingerprints(plan)
    staging = dst.with_name(f"{dst.name}.ckpt-tmp-{os.getpid()}-{_our_tag()}{secrets.token_hex(4)}")
    with _terminating_signals(), _removed_at_the_end(staging):
        copy = _Copy(plan, staging, dst)
        workers = workers or min(os.cpu_count() or 1, 8)
        copy.run(min(workers, 1 + plan.nbytes // UNIT), progress)
        _unchanged(before)
        _commit(staging, dst, force)
    if os.path.lexists(staging):
        notes.append(f"could not remove {staging}, which held what {dst.name} was before")
    return Report(
        dst=dst,
        files=copy.written(),
        nbytes_written=plan.nbytes,
        nbytes_read=copy.nbytes_read,
        checked=copy.sources.verified,
        notes=tuple(notes),
    )


# --- before anything is written ---


def validate(plan: Plan) -> None:
    """Raises `ValueError` for paths that leave the destination or meet, and for impossible checksums."""
    paths = [file.path for file in plan.files]
    if paths == [""]:
        paths = []
    for path in paths:
        if not path or "\0" in path or path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"not a path inside the destination: {path!r}")
        if path == "." or str(PurePosixPath(path)) != path:
            raise ValueError(f"not a normal path: {path!r}")
    seen = set(paths)
    folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
    if len(seen) < len(paths) or seen & folders:
        raise ValueError("two files of the plan have the same path, or one is the folder of another")
    for file in plan.files:
        for segment in file.segments:
            if isinstance(segment, Crc32):
                _validate_crc(file, segment)


def _validate_crc(file: OutputFile, crc: Crc32) -> None:
    if not 0 <= crc.first <= crc.last <= len(file.segments):
        raise ValueError(f"{file.path}: a checksum of segments {crc.first} to {crc.last}")
    if any(isinstance(segment, Crc32) for segment in file.segments[crc.first : crc.last]):
        raise ValueError(f"{file.path}: a checksum of a checksum")


def _real_parent(dst: Path) -> Path:
    """`dst` below its real parent folder; a link at `dst` itself is not followed."""
    if dst.name in ("", ".."):
        dst = Path(os.path.realpath(dst))
    parent = Path(os.path.realpath(dst.parent))
    if not os.path.isdir(parent):  # noqa: PTH112  Path.is_dir raises where a parent may not be searched
        raise UsageError(
            "destination-parent",
            "the folder of the destination does not exist",
            where=parent,
            why=f"{dst.name} cannot be written there",
            hint=f"mkdir -p {parent}",
        )
    return parent / dst.name


def _refuse_source(dst: Path, sources: Iterable[Path], source: Path | None) -> None:
    """Writing over, into or around what is being read."""
    places = {dst, Path(os.path.realpath(dst))}
    for path in (*sources, *([source] if source is not None else [])):
        root = Path(os.path.realpath(path))
        for place in places:
            if place == root or place in root.parents or root in place.parents:
                raise UsageError(
                    "destination-in-source",
                    "the destination is, contains or lies in what is being read",
                    where=dst,
                    why=f"{root} would be changed or replaced; sources are never modified",
                    hint="choose a destination outside of the source",
                )


def _exists(dst: Path) -> UsageError:
    return UsageError(
        "destination-exists",
        "the destination exists already",
        where=dst,
        why="what is there would be lost",
        hint="choose another destination, or replace it with --force",
    )


def _need_space(plan: Plan, dst: Path) -> None:
    disk = os.statvfs(dst.parent)
    if not disk.f_blocks:  # some network file systems do not tell
        return
    block = disk.f_frsize or 1
    needed = sum(-(-file.nbytes // block) for file in plan.files) * block
    free = disk.f_bavail * block
    if needed > free:
        raise UsageError(
            "no-space",
            f"{needed} bytes are needed, {free} are free, {needed - free} are missing",
            where=f"{dst} (file system {_mount_point(dst.parent)})",
            why="nothing was written",
            hint="free that much, or choose a destination on another file system",
        )


def _mount_point(path: Path) -> Path:
    while path != path.parent and not path.is_mount():
        path = path.parent
    return path


Fingerprint = tuple[int, int, int, int]


def _fingerprint(path: Path) -> Fingerprint:
    try:
        stat = path.stat()
    except OSError as error:
        raise UsageError(
            "source-unreadable",
            f"cannot read the source: {error.strerror}",
            where=path,
            why="the result would lack its tensors",
            hint="check the path and its permissions",
        ) from error
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _fingerprints(plan: Plan) -> dict[Path, Fingerprint]:
    """Identity, size and time of every source. Raises "source-truncated" before hours of copying."""
    ends: dict[Path, int] = {}
    for chunk in _chunks(plan):
        ends[chunk.path] = max(ends.get(chunk.path, 0), _extent(chunk)[1])
    prints = {path: _fingerprint(path) for path in ends}
    for path, end in ends.items():
        if prints[path][2] < end:
            raise truncated(path, end, prints[path][2])
    return prints


def _unchanged(before: Mapping[Path, Fingerprint]) -> None:
    for path, was in before.items():
        if _fingerprint(path) != was:
            raise UsageError(
                "source-changed",
                "the source was written to while it was read",
                where=path,
                why="the result could mix two checkpoints",
                hint="wait until the checkpoint is complete, then run the command again",
            )


def _chunks(plan: Plan) -> Iterator[ByteRange | Strided]:
    for file in plan.files:
        for segment in file.segments:
            for chunk in segment.chunks if isinstance(segment, Cast) else (segment,):
                if isinstance(chunk, ByteRange | Strided) and chunk.nbytes:
                    yield chunk


def _extent(chunk: ByteRange | Strided) -> tuple[int, int]:
    """First and last byte (exclusive) in the file; for a view, of the whole view."""
    if isinstance(chunk, ByteRange):
        return chunk.start, chunk.start + chunk.nbytes
    last = sum((n - 1) * stride for n, stride in zip(chunk.shape, chunk.strides, strict=True))
    return chunk.start, chunk.start + (last + 1) * chunk.itemsize


# --- what the sources say about themselves ---


class _Checked:
    """The checked ranges of one source file: which are used, and which bytes are accounted for."""

    def __init__(self, checks: Sequence[SourceCheck]) -> None:
        self.checks = checks
        self.crcs = RangeCrcs([(c.source.start, c.source.start + c.source.nbytes) for c in checks])
        self.used: set[int] = set()
        self._starts: list[int] = []  # disjoint intervals that a piece has claimed, sorted
        self._ends: list[int] = []

    def use(self, start: int, end: int) -> None:
        """Bytes `start` to `end` are needed: the ranges that hold them will be verified."""
        for _, _, owners in self.crcs.spans(start, end):
            self.used.update(owners)

    def claim(self, start: int, end: int) -> list[tuple[int, int]]:
        """The checked parts of `start` to `end` that nobody else will add; the caller must add them."""
        return [
            (low, high)
            for free_start, free_end in self._claim(start, end)
            for low, high, owners in self.crcs.spans(free_start, free_end)
            if owners
        ]

    def _claim(self, start: int, end: int) -> list[tuple[int, int]]:
        i, j = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if i == j:  # nothing near: the common case
            self._starts.insert(i, start)
            self._ends.insert(i, end)
            return [(start, end)]
        taken = list(zip(self._starts[i:j], self._ends[i:j], strict=True))
        points = [start, *(at for span in taken for at in span), end]
        free = [(low, high) for low, high in zip(points[::2], points[1::2], strict=True) if low < high]
        self._starts[i:j] = [min(start, taken[0][0])]
        self._ends[i:j] = [max(end, taken[-1][1])]
        return free

    def add(self, start: int, end: int, crc: int) -> int:
        """Account for a claimed piece; returns how many used ranges it completed. Raises on a mismatch."""
        done = [k for k in self.crcs.add(start, end, crc) if not self.crcs.left[k] and k in self.used]
        for k in done:
            if self.crcs.values[k] != self.checks[k].crc32:
                raise _mismatch(self.checks[k], self.crcs.values[k])
        return len(done)


def _mismatch(check: SourceCheck, crc: int) -> CkptError:
    return CkptError(
        "checksum",
        f"{check.what}: CRC-32 is {crc:08x}, the file says {check.crc32:08x}",
        where=check.source.path,
        why=f"bytes {check.source.start} to {check.source.start + check.source.nbytes} have changed "
        "since they were saved; nothing was written",
        hint="copy the file again from where it was written, or fall back to an earlier checkpoint",
    )


class _Sources:
    """The checks of all source files."""

    def __init__(self, plan: Plan) -> None:
        by_path: dict[Path, list[SourceCheck]] = {}
        for check in plan.checks:
            if check.source.nbytes:
                by_path.setdefault(check.source.path, []).append(check)
        self._checked = {path: _Checked(checks) for path, checks in by_path.items()}
        self.verified = 0

    def claims(self, chunks: Iterable[Chunk]) -> tuple[_Claim, ...]:
        """What a reader of these chunks must add, at which offset in the bytes it reads."""
        out: list[_Claim] = []
        at = 0
        for chunk in chunks:
            checked = None if isinstance(chunk, Zeros) else self._checked.get(chunk.path)
            if checked and not isinstance(chunk, Zeros):
                start, end = _extent(chunk)
                checked.use(start, end)
                # A view's bytes come in another order: its ranges are read once more, in order.
                if isinstance(chunk, ByteRange):
                    out.extend(_Claim(at + s - start, s, e, checked) for s, e in checked.claim(start, end))
            at += chunk.nbytes
        return tuple(out)

    def gaps(self) -> Iterator[_Gap]:
        """The bytes of used ranges that no piece has claimed; to be asked for after all `claims`."""
        for path, checked in self._checked.items():
            for k in sorted(checked.used):
                span = checked.checks[k].source
                for start in range(span.start, span.start + span.nbytes, UNIT):
                    end = min(start + UNIT, span.start + span.nbytes)
                    for low, high in checked.claim(start, end):
                        yield _Gap(ByteRange(path, low, high - low), checked)

    def assert_complete(self) -> None:
        """Every checksum that was to be compared has been; anything else is a mistake in this module."""
        used = sum(len(checked.used) for checked in self._checked.values())
        if used != self.verified:
            raise RuntimeError(f"{used} source checksums were due, {self.verified} were compared")

    def add(self, claim: _Claim, crc: int) -> None:
        self.verified += claim.checked.add(claim.start, claim.end, crc)


# --- jobs: what one worker does at a time ---


class _Claim(NamedTuple):
    """Bytes `start` to `end` of a source, `at` in the bytes that a piece reads."""

    at: int
    start: int
    end: int
    checked: _Checked


class _Gap(NamedTuple):
    """Source bytes that are read only for a checksum."""

    source: ByteRange
    checked: _Checked


class _Reserve(NamedTuple):
    """Allocate the space of a file before anything is copied."""

    file: _File


class _Piece(NamedTuple):
    """`nbytes` of output, `at` in the unit."""

    at: int
    nbytes: int
    segment: Segment
    claims: tuple[_Claim, ...]


class _Unit(NamedTuple):
    """Consecutive bytes of one output file from `start`, written by one call."""

    file: _File
    start: int
    nbytes: int
    pieces: tuple[_Piece, ...]


_Job = _Gap | _Reserve | _Unit


class _File:
    """An output file while it is written. Range 0 of `crcs` is the whole file."""

    def __init__(self, file: OutputFile, path: Path) -> None:
        self.plan = file
        self.path = path
        self.nbytes = file.nbytes
        self.left = file.nbytes
        self.crc32 = 0
        starts = [0]
        for segment in file.segments:
            starts.append(starts[-1] + segment.nbytes)
        numbers: dict[tuple[int, int], int] = {(0, self.nbytes): 0}
        self.patches: list[tuple[int, int]] = []  # (offset, range) of each Crc32 segment
        for at, segment in zip(starts, file.segments, strict=False):
            if isinstance(segment, Crc32):
                span = starts[segment.first], starts[segment.last]
                self.patches.append((at, numbers.setdefault(span, len(numbers))))
        self.crcs = RangeCrcs(list(numbers))

    def units(self, sources: _Sources) -> Iterator[_Unit]:
        """The whole file in order, cut at multiples of `UNIT` (an element is never cut)."""
        pieces: list[_Piece] = []
        start = at = 0
        for segment in self.plan.segments:
            for part, nbytes in _parts(segment, at):
                if at // UNIT > start // UNIT:
                    yield _Unit(self, start, at - start, tuple(pieces))
                    pieces, start = [], at
                pieces.append(_Piece(at - start, nbytes, part, sources.claims(_read_by(part))))
                at += nbytes
        yield _Unit(self, start, at - start, tuple(pieces))


def _parts(segment: Segment, at: int) -> Iterator[tuple[Segment, int]]:
    """The segment, which begins at byte `at` of its file, in parts with their sizes.

    Cut at multiples of `UNIT`, but for views.
    """
    end = at + segment.nbytes
    cutter = Cutter(segment.chunks) if isinstance(segment, Cast) else None
    done = 0
    while at < end:
        room = min(UNIT - at % UNIT, end - at)
        match segment:
            case Literal(data):
                part: Segment = Literal(data[done : done + room])
            case ByteRange() | Zeros():
                part = segment.cut(done, room)
            case Strided():
                room = max(min(_GATHER, end - at) // segment.itemsize, 1) * segment.itemsize
                part = segment.cut(done, room)
            case Cast(_, source, target):
                assert cutter is not None
                numel = max(min(room // target.itemsize, BLOCK_NBYTES // source.itemsize), 1)
                room = numel * target.itemsize
                part = Cast(cutter.take(numel * source.itemsize), source, target)
            case Crc32():
                room = 4
                part = segment
        yield part, room
        at += room
        done += room


def _read_by(part: Segment) -> tuple[Chunk, ...]:
    match part:
        case Cast():
            return part.chunks
        case ByteRange() | Strided() | Zeros():
            return (part,)
        case _:
            return ()


def _interleaved(files: Iterable[_File], sources: _Sources, width: int) -> Iterator[_Unit]:
    """Units of `width` files by turns: the kernel lets one thread at a time write to a file."""
    waiting = (file.units(sources) for file in files)
    active = list(islice(waiting, width))
    while active:
        for units in list(active):
            unit = next(units, None)
            if unit is None:
                active.remove(units)
                active.extend(islice(waiting, 1))
            else:
                yield unit


# --- copying ---


class _Copy:
    """One run: the jobs, handed out one at a time, and the accounts, kept under the same lock."""

    def __init__(self, plan: Plan, staging: Path, dst: Path) -> None:
        self.sources = _Sources(plan)
        self.nbytes_read = 0
        self._staging, self._dst = staging, dst
        self._plan = plan
        self._files: list[_File] = []
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._stop = False

    def run(self, workers: int, progress: Progress | None) -> None:
        """Write and flush every file and folder of the staging."""
        self._progress = progress
        self._create()
        self._jobs = self._all_jobs(workers)
        # An event stays set: no interrupt, wherever it falls, can lose it, as it can with Thread.join
        # (bpo-45274) or a count.
        ended = [threading.Event() for _ in range(workers)]
        threads = [threading.Thread(target=self._work, args=(event,)) for event in ended]
        try:
            for thread in threads:
                thread.start()
            for event in ended:
                event.wait()
        finally:
            self._stop = True
            for thread, event in zip(threads, ended, strict=True):
                if thread.ident is not None:
                    event.wait()
        if self._errors:
            raise self._errors[0]
        self.sources.assert_complete()
        with _write_errors(self._dst):
            for folder, _, _ in os.walk(self._staging, topdown=False):
                _fsync_folder(Path(folder))

    def written(self) -> tuple[WrittenFile, ...]:
        return tuple(
            WrittenFile(path=file.plan.path, nbytes=file.nbytes, crc32=file.crc32) for file in self._files
        )

    def _create(self) -> None:
        """Every file, empty: a name that cannot be written shows before hours of copying."""
        with _write_errors(self._dst):
            if not self._plan.is_single_file:
                self._staging.mkdir()
            for file in self._plan.files:
                path = self._staging / file.path
                if file.path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
                self._files.append(_File(file, path))

    def _all_jobs(self, width: int) -> Iterator[_Job]:
        yield from (_Reserve(file) for file in self._files)
        yield from _interleaved(self._files, self.sources, width)
        yield from self.sources.gaps()

    def _work(self, ended: threading.Event) -> None:
        try:
            with Reader() as reader, _Writer(self._dst) as writer:
                buffer = memoryview(bytearray(UNIT + _SLACK))
                scratch = memoryview(bytearray(BLOCK_NBYTES))
                while (job := self._next()) is not None:
                    match job:
                        case _Reserve():
                            writer.reserve(job.file)
                        case _Gap():
                            self._gap(job, reader, buffer)
                        case _Unit():
                            if job.nbytes > len(buffer):
                                buffer = memoryview(bytearray(UNIT + _GATHER + _SLACK))
                            self._unit(job, reader, writer, buffer, scratch)
        except BaseException as error:
            self._stop = True
            self._errors.append(error)
        finally:
            ended.set()

    def _next(self) -> _Job | None:
        with self._lock:
            return None if self._stop else next(self._jobs, None)

    def _gap(self, job: _Gap, reader: Reader, buffer: memoryview) -> None:
        view = buffer[: job.source.nbytes]
        reader.read(view, job.source.path, job.source.start)
        claim = _Claim(0, job.source.start, job.source.start + job.source.nbytes, job.checked)
        crc = crc32(view)
        with self._lock:
            self.nbytes_read += len(view)
            self.sources.add(claim, crc)

    def _unit(
        self, unit: _Unit, reader: Reader, writer: _Writer, buffer: memoryview, scratch: memoryview
    ) -> None:
        view = buffer[: unit.nbytes]
        sums: list[tuple[_Claim, int]] = []
        nbytes_read = 0
        for piece in unit.pieces:
            nbytes_read += _produce(piece, view[piece.at : piece.at + piece.nbytes], reader, scratch, sums)
        parts = _sum(unit, view, sums)
        writer.write(unit.file, view, unit.start)
        with self._lock:
            self.nbytes_read += nbytes_read
            for start, end, crc in parts:
                unit.file.crcs.add(start, end, crc)
            for claim, crc in sums:
                self.sources.add(claim, crc)
            unit.file.left -= unit.nbytes
            last = not unit.file.left
            if self._progress is not None:
                self._progress.update(unit.nbytes)
        if last:
            writer.finish(unit.file)


def _produce(
    piece: _Piece, view: memoryview, reader: Reader, scratch: memoryview, sums: list[tuple[_Claim, int]]
) -> int:
    """Fill `view` with the piece; returns the number of source bytes read."""
    match piece.segment:
        case Literal(data):
            view[:] = data
            return 0
        case Crc32():
            view[:] = bytes(4)  # known when the file is complete: `_Writer.finish`
            return 0
        case Cast(chunks, source, target):
            block = scratch[: sum(chunk.nbytes for chunk in chunks)]
            reader.fill(block, chunks)
            for claim in piece.claims:
                sums.append((claim, crc32(block[claim.at : claim.at + claim.end - claim.start])))
            view[:] = cast(numpy_array(block, source), source, target).view("u1").data
        case chunk:
            chunks = (chunk,)
            reader.fill(view, chunks)
    return sum(chunk.nbytes for chunk in chunks if not isinstance(chunk, Zeros))


def _sum(unit: _Unit, view: memoryview, sums: list[tuple[_Claim, int]]) -> list[tuple[int, int, int]]:
    """(start, end, CRC-32) of the unit's parts in the file, cut where a checksum begins or ends.

    A plain copy's bytes are also those of the source: one pass serves both checksums.
    """
    claims = [
        _Claim(piece.at + claim.at, claim.start, claim.end, claim.checked)
        for piece in unit.pieces
        if isinstance(piece.segment, ByteRange)
        for claim in piece.claims
    ]
    patches = {piece.at for piece in unit.pieces if isinstance(piece.segment, Crc32)}
    points = {0, unit.nbytes, *patches, *(at + 4 for at in patches)}
    points.update(at - unit.start for at in unit.file.crcs.cuts(unit.start, unit.start + unit.nbytes))
    points.update(at for claim in claims for at in (claim.at, claim.at + claim.end - claim.start))
    parts = []
    following = iter(claims)
    claim = next(following, None)
    for low, high in pairwise(sorted(points)):
        if low in patches:
            continue
        crc = crc32(view[low:high])
        parts.append((unit.start + low, unit.start + high, crc))
        while claim and claim.at + claim.end - claim.start <= low:
            claim = next(following, None)
        if claim and claim.at <= low:
            start = claim.start + low - claim.at
            sums.append((_Claim(low, start, start + high - low, claim.checked), crc))
    return parts


class _Writer:
    """Writes to staged files for one thread. `dst` is where an error says that it happened."""

    def __init__(self, dst: Path) -> None:
        self._dst = dst
        self._files = Handles(os.O_WRONLY | os.O_NOFOLLOW)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        with _write_errors(self._dst):
            self._files.close()

    def reserve(self, file: _File) -> None:
        """Allocate the file's blocks, where the file system can."""
        with _write_errors(self._dst / file.plan.path):
            if file.nbytes and not _fallocate(self._files[file.path], file.nbytes):
                os.ftruncate(self._files[file.path], file.nbytes)

    def write(self, file: _File, view: memoryview, start: int) -> None:
        with _write_errors(self._dst / file.plan.path):
            fd = self._files[file.path]
            _pwrite(fd, view, start)
            _start_writeback(fd, start, len(view))

    def finish(self, file: _File) -> None:
        """All other bytes are written: fill in the checksums and flush."""
        with _write_errors(self._dst / file.plan.path):
            fd = self._files[file.path]
            for at, k in file.patches:
                data = file.crcs.values[k].to_bytes(4, "little")
                _pwrite(fd, memoryview(data), at)
                file.crcs.add(at, at + 4, crc32(data))
            file.crc32 = file.crcs.values[0]
            _fsync(fd)


def _pwrite(fd: int, view: memoryview, start: int) -> None:
    done = 0
    while done < len(view):
        n = os.pwrite(fd, view[done:], start + done)
        if not n:
            raise OSError(errno.EIO, "a write wrote nothing")
        done += n


def _fsync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """An `OSError` of the destination as an error for people; it happened at `path`."""
    try:
        yield
    except OSError as error:
        id, hint = {
            errno.ENOSPC: ("no-space", "free some space, or choose a destination on another file system"),
            errno.EDQUOT: ("no-space", "free some of your quota, or choose another file system"),
            errno.EFBIG: ("file-too-big", "raise the limit (ulimit -f), or write smaller files"),
            errno.EACCES: ("no-permission", "choose a folder that you may write to"),
            errno.EPERM: ("no-permission", "choose a folder that you may write to"),
            errno.EROFS: ("no-permission", "choose a destination on a writable file system"),
        }.get(error.errno or 0, ("write-failed", "check the disk, or choose another file system"))
        raise UsageError(
            id,
            f"cannot write: {error.strerror or error}",
            where=path,
            why="the destination is as it was; what had been written was removed",
            hint=hint,
        ) from error


# --- staging and the final rename ---


@contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _terminating_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `SystemExit`, where they would end the process without any cleaning up."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    default = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    try:
        for number in default:
            signal.signal(number, leave)
        yield
    finally:
        for number in default:
            signal.signal(number, signal.SIG_DFL)


def _host_tag() -> str:
    return f"{crc32(socket.gethostname().encode()) & 0xFFFF:04x}"


def _start_tag(pid: int) -> str | None:
    """When the process started: tells it from a later one with the same number. None if not to be had."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return None
    return f"{crc32((boot + stat.rpartition(')')[2].split()[19]).encode()) & 0xFFFF:04x}"


def _our_tag() -> str:
    return _host_tag() + (_start_tag(os.getpid()) or "0000")


def _is_alive(pid: int, start_tag: str) -> bool:
    """Whether the process that made the staging still runs; True where it cannot be told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        pass
    return _start_tag(pid) in (start_tag, None)


def _clear_stale(dst: Path) -> list[str]:
    """Remove what killed runs of this machine left beside `dst`; returns what was done."""
    notes = []
    name = re.compile(re.escape(dst.name) + r"\.ckpt-(tmp|old)-(\d+)-([0-9a-f]{4})([0-9a-f]{4})[0-9a-f]{8}")
    for path in sorted(dst.parent.iterdir()):
        match = name.fullmatch(path.name)
        if not match:
            continue
        kind, pid = match[1], int(match[2])
        if match[3] != _host_tag():
            notes.append(f"left {path}: another machine made it; remove it if nothing runs there")
        elif _is_alive(pid, match[4]):
            notes.append(f"left {path}: process {pid} is writing it")
        elif kind == "old" and not os.path.lexists(dst):
            path.rename(dst)
            notes.append(f"restored {dst}: an interrupted run had moved it to {path.name}")
        else:
            _remove(path)
            notes.append(f"removed {path}, left by an interrupted run")
    return notes


def _commit(staging: Path, dst: Path, force: bool) -> None:
    """Give the staging the destination's name; with `force` the old destination gets the staging's."""
    swap = force and os.path.lexists(dst)
    with _write_errors(dst):
        if swap:
            _swap(staging, dst)
        else:
            _rename_new(staging, dst)
        try:
            _fsync_folder(dst.parent)
        except OSError:
            if swap:
                _swap(staging, dst)
            else:
                dst.rename(staging)
            raise


def _rename_new(staging: Path, dst: Path) -> None:
    try:
        if not _renameat2(staging, dst, _RENAME_NOREPLACE):
            if os.path.lexists(dst):  # two system calls, where one is not to be had
                raise FileExistsError
            staging.rename(dst)
    except FileExistsError as error:
        raise _exists(dst) from error


def _swap(staging: Path, dst: Path) -> None:
    """Exchange two names. Without the system call, a kill in between leaves `dst` to `_clear_stale`."""
    if _renameat2(staging, dst, _RENAME_EXCHANGE):
        return
    old = dst.with_name(staging.name.replace(".ckpt-tmp-", ".ckpt-old-"))
    dst.rename(old)
    try:
        staging.rename(dst)
    except BaseException:
        old.rename(dst)
        raise
    old.rename(staging)


# --- system calls that `os` lacks ---

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: object) -> bool:
    """False where this system or file system does not have the call; raises `OSError` as `os` does."""
    function = getattr(_libc, name, None)
    if function is None:
        return False
    while function(*args):
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    at_fdcwd = -100
    return _call("renameat2", at_fdcwd, os.fsencode(old), at_fdcwd, os.fsencode(new), ctypes.c_uint(flags))


def _fallocate(fd: int, nbytes: int) -> bool:
    """Not `os.posix_fallocate`: where the file system cannot, glibc writes to every block."""
    return _call("fallocate", fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))


def _start_writeback(fd: int, start: int, nbytes: int) -> None:
    """Begin to write whole pages to disk now, so that the fsync at the end finds little to do."""
    low, high = -(-start // _PAGE) * _PAGE, (start + nbytes) // _PAGE * _PAGE
    if low < high:
        _call("sync_file_range", fd, ctypes.c_int64(low), ctypes.c_int64(high - low), _SYNC_FILE_RANGE_WRITE)
