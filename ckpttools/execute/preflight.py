"""What can be known before a byte is written: plans and places that are refused, space, whole sources."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from errno import EACCES
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISLNK, S_ISREG

from ckpttools.errors import UsageError
from ckpttools.execute.system import write_errors
from ckpttools.location import Location, Stat
from ckpttools.passes.read import truncated
from ckpttools.plan import OutputFile, Plan, Sealed, reads
from ckpttools.stores.files import entries, stat
from ckpttools.tensors import spans

Fingerprint = Stat


def validate(plan: Plan) -> None:
    """Raises `ValueError` for paths that leave the destination or meet, and for impossible checksums."""
    paths = [] if plan.is_single_file else [file.path for file in plan.files]
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
        _validate_checksums(file)


def _validate_checksums(file: OutputFile) -> None:
    sealed = [k for k, segment in enumerate(file.segments) if isinstance(segment, Sealed)]
    for segment in file.segments:
        if not isinstance(segment, Sealed):
            continue
        end = 0
        for at, first, last in segment.holes:
            if not end <= at <= at + 4 <= segment.nbytes:
                raise ValueError(f"{file.path}: a checksum at byte {at} of {segment.nbytes}")
            if not 0 <= first <= last <= len(file.segments):
                raise ValueError(f"{file.path}: a checksum of segments {first} to {last}")
            if bisect_left(sealed, first) < bisect_left(sealed, last):
                raise ValueError(f"{file.path}: a checksum of a checksum")
            end = at + 4


def real_parent(dst: Path) -> Path:
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


def refuse_source(dst: Path, sources: Iterable[Location]) -> None:
    """Writing over, into or around what is being read."""
    places = {dst, Path(os.path.realpath(dst))}
    for root in sorted({Path(os.path.realpath(path)) for path in sources if isinstance(path, Path)}):
        for place in places:
            if place == root or place in root.parents or root in place.parents:
                raise in_source(dst, root)


def in_source(dst: Location, root: Location) -> UsageError:
    return UsageError(
        "destination-in-source",
        "the destination is, contains or lies in what is being read",
        where=dst,
        why=f"{root} would be changed or replaced; sources are never modified",
        hint="choose a destination outside of the source",
    )


def exists(dst: Location) -> UsageError:
    return UsageError(
        "destination-exists",
        "the destination exists already",
        where=dst,
        why="what is there would be lost",
        hint="choose another destination, or replace it with --force",
    )


def refuse_special(dst: Path) -> None:
    """Raises "not-replaced" for what is neither a regular file nor a folder: links, devices, pipes."""
    mode = os.lstat(dst).st_mode
    if not (S_ISREG(mode) or S_ISDIR(mode)):
        what = "a symbolic link" if S_ISLNK(mode) else "neither a regular file nor a folder"
        raise UsageError(
            "not-replaced",
            f"--force does not replace this: {what}",
            where=dst,
            why="only an output of ckpt or a whole checkpoint is replaced; what is there would be lost",
            hint="choose another destination, or move away what is there",
        )


def need_space(plan: Plan, dst: Path) -> None:
    disk = os.statvfs(dst.parent)
    if not disk.f_blocks:  # some network file systems do not tell
        return
    block = disk.f_frsize or 1
    needed = sum(-(-file.nbytes // block) for file in plan.files) * block
    free = disk.f_bavail * block
    if needed > free:
        mount = next(path for path in dst.parents if path.is_mount())
        raise UsageError(
            "no-space",
            f"{needed} bytes are needed, {free} are free, {needed - free} are missing",
            where=f"{dst} (file system {mount})",
            why="nothing was written",
            hint="free that much, or choose a destination on another file system",
        )


def may_write(dst: Path) -> None:
    """Raises "no-permission" where the folder of the destination may not be written to."""
    if not os.access(dst.parent, os.W_OK | os.X_OK):
        with write_errors(dst):
            raise PermissionError(EACCES, os.strerror(EACCES))


def source_ends(plan: Plan) -> dict[Location, int]:
    """Every source file, with the byte that the plan reads up to."""
    # by identity, since a path is one object in all ranges of a file: to hash it for each takes longer
    found: dict[int, tuple[Location, int]] = {}
    for file in plan.files:
        for segment in file.segments:
            for chunk in reads(segment):
                for span in spans(chunk) if chunk.nbytes else ():
                    _, end = found.get(id(span.path), (None, -1))
                    if end < span.end:
                        found[id(span.path)] = span.path, span.end
    ends: dict[Location, int] = {}
    for path, end in found.values():
        ends[path] = max(ends.get(path, 0), end)
    return ends


def fingerprints(ends: Mapping[Location, int]) -> dict[Location, Fingerprint]:
    """Identity, size and time of every source. Raises "source-truncated" before hours of copying."""
    prints = {path: _fingerprint(path) for path in ends}
    for path, end in ends.items():
        if prints[path].size < end:
            raise truncated(path, end, prints[path].size)
    return prints


def is_there(plan: Plan, dst: Location) -> bool:
    """Whether every file of a plan is at its destination, by its size."""
    places = {dst / file.path if file.path else dst: file.nbytes for file in plan.files}
    try:
        if not plan.is_single_file:
            for folder in {place.parent for place in places}:
                entries(folder)  # one request of a store, instead of one for each file
        return all(stat(place).size == nbytes for place, nbytes in places.items())
    except OSError:
        return False


def unchanged(before: Mapping[Location, Fingerprint]) -> None:
    """Raises "source-changed" where a fingerprint is another one now."""
    for path, was in before.items():
        if _fingerprint(path) != was:
            raise UsageError(
                "source-changed",
                "the source was written to while it was read",
                where=path,
                why="the result could mix two checkpoints",
                hint="wait until the checkpoint is complete, then run the command again",
            )


def _fingerprint(path: Location) -> Fingerprint:
    try:
        return stat(path)
    except OSError as error:
        raise UsageError(
            "source-unreadable",
            f"cannot read the source: {error.strerror}",
            where=path,
            why="the result would lack its tensors",
            hint="check the path and its permissions",
        ) from error
