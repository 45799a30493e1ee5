"""The staging beside the destination: its name, what killed runs left, and the rename at the end.

The name says who made it, `DST.ckpt-tmp-PID-HOST STARTED RANDOM` (hexadecimal, without the spaces), so
that the next run can tell what is stale. Without renameat2, a replaced destination has the same name
with `old` for a moment.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpttools.checksums import crc32
from ckpttools.execute import system
from ckpttools.execute.preflight import exists
from ckpttools.execute.system import write_errors
from ckpttools.siblings import REPLACED, STAGING


@contextmanager
def staging_for(dst: Path) -> Iterator[Path]:
    """A new name beside `dst`; what has it at the end is removed."""
    pid = os.getpid()
    made_by = f"{pid}-{_host()}{_started(pid) or '0000'}"
    path = dst.with_name(f"{dst.name}{STAGING}{made_by}{os.urandom(4).hex()}")
    try:
        yield path
    finally:
        _remove(path)


def _host() -> str:
    return _tag(os.uname().nodename)


def _started(pid: int) -> str | None:
    """When the process started: tells it from a later one with the same number. None if not to be had."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return None
    return _tag(boot + stat.rpartition(")")[2].split()[19])


def _tag(text: str) -> str:
    return f"{crc32(text.encode()) & 0xFFFF:04x}"


def _is_alive(pid: int, started: str) -> bool:
    """Whether the process that made the staging still runs; True where it cannot be told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        pass
    return _started(pid) in (started, None)


def clear_stale(dst: Path) -> list[str]:
    """Remove what killed runs of this machine left beside `dst`; returns what was done."""
    notes = []
    name = re.compile(re.escape(dst.name) + r"\.ckpt-(tmp|old)-(\d+)-([0-9a-f]{4})([0-9a-f]{4})[0-9a-f]{8}")
    for path in sorted(dst.parent.iterdir()):
        match = name.fullmatch(path.name)
        if not match:
            continue
        kind, pid, host, started = match.groups()
        if host != _host():
            notes.append(f"left {path}: another machine made it; remove it if nothing runs there")
        elif _is_alive(int(pid), started):
            notes.append(f"left {path}: process {pid} is writing it")
        elif kind == "old" and not os.path.lexists(dst):
            path.rename(dst)
            notes.append(f"restored {dst}: an interrupted run had moved it to {path.name}")
        else:
            _remove(path)
            notes.append(f"removed {path}, left by an interrupted run")
    return notes


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def add_file(path: Path, data: bytes) -> None:
    """Write and flush one small new file of the staging."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        system.fsync(file.fileno())


def commit(staging: Path, dst: Path, force: bool) -> None:
    """Give the staging the destination's name; with `force` the old destination gets the staging's."""
    with write_errors(dst):
        for folder, _, _ in os.walk(staging, topdown=False):
            system.fsync_folder(Path(folder))
        swap = force and os.path.lexists(dst)
        if swap:
            _swap(staging, dst)
        else:
            _rename_new(staging, dst)
        try:
            system.fsync_folder(dst.parent)
        except OSError:
            if swap:
                _swap(staging, dst)
            else:
                dst.rename(staging)
            raise


def _rename_new(staging: Path, dst: Path) -> None:
    try:
        if not system.renameat2(staging, dst, system.RENAME_NOREPLACE):
            if os.path.lexists(dst):  # two system calls, where one is not to be had
                raise FileExistsError
            staging.rename(dst)
    except FileExistsError as error:
        raise exists(dst) from error


def _swap(staging: Path, dst: Path) -> None:
    """Exchange two names. Without the system call, a kill in between leaves `dst` to `clear_stale`."""
    if system.renameat2(staging, dst, system.RENAME_EXCHANGE):
        return
    old = dst.with_name(staging.name.replace(STAGING, REPLACED))
    dst.rename(old)
    try:
        staging.rename(dst)
    except BaseException:
        old.rename(dst)
        raise
    old.rename(staging)
