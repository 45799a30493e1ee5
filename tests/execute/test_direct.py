"""Past the page cache or through it: the same bytes, and the cache of the machine is left alone."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ckpttools.errors import CkptError, UsageError
from ckpttools.execute import execute
from ckpttools.passes.read import Reader
from ckpttools.plan import Cast, Literal, OutputFile, Plan, Sealed, Segment, SourceCheck
from ckpttools.stores import direct
from ckpttools.tensors import BFLOAT16, FLOAT32, ByteRange, Strided

SIZE = 17 * 1024 * 1024 + 123  # not a whole block, over the smallest file
O_DIRECT = getattr(os, "O_DIRECT", 0)


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "a"
    data = np.random.default_rng(0).standard_normal(SIZE // 4 + 1, np.float32).tobytes()[:SIZE]
    path.write_bytes(data)
    return path


@pytest.fixture
def needs_direct(tmp_path: Path) -> None:
    path = tmp_path / "probe"
    path.write_bytes(bytes(direct.BLOCK))
    try:
        fd = os.open(path, os.O_RDONLY | O_DIRECT)
        os.preadv(fd, [direct.aligned(direct.BLOCK)], 0, os.RWF_NOWAIT)
        os.close(fd)
    except BlockingIOError:
        os.close(fd)
    except OSError as error:
        pytest.skip(f"this file system does not do direct I/O: {error}")
    finally:
        path.unlink()


def forget(path: Path) -> None:
    """Drop the file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def plan_of(source: Path, seed: int) -> tuple[Plan, bytes]:
    """Two files of odd segments, so that units begin anywhere; with the bytes that they must have."""
    rng, data = random.Random(seed), source.read_bytes()
    segments: list[Segment] = []
    parts: list[bytes] = []
    while sum(map(len, parts)) < direct.SMALLEST_FILE:
        start = rng.randrange(0, SIZE // 2)
        nbytes = rng.choice([1, 300, 4096, 70_000, 1_500_001, 5_000_003])
        match rng.randrange(4):
            case 0:
                segments.append(Literal(data[:nbytes]))
                parts.append(data[:nbytes])
            case 1:
                start, nbytes = start // 4 * 4, nbytes // 4 * 4
                segments.append(Cast((ByteRange(source, start, nbytes),), FLOAT32, BFLOAT16))
                wide = np.frombuffer(data[start : start + nbytes], "<u4").astype(np.uint64)
                near = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
                parts.append(near.astype("<u2").tobytes())
            case 2:
                rows, columns = 1 + nbytes // 8, 3
                shape, strides = (columns, rows), (1, columns)
                view = Strided(
                    path=source, start=0, itemsize=1, shape=shape, strides=strides, first=0, numel=3 * rows
                )
                segments.append(view)
                parts.append(np.frombuffer(data[: 3 * rows], "u1").reshape(rows, 3).T.tobytes())
            case _:
                segments.append(ByteRange(source, start, nbytes))
                parts.append(data[start : start + nbytes])
    body = b"".join(parts)
    crc = zlib.crc32(body).to_bytes(4, "little")
    file = OutputFile(path="x", segments=(*segments, Sealed(bytes(4), ((0, 0, len(segments)),))))
    check = SourceCheck(ByteRange(source, 0, SIZE), zlib.crc32(data), "all")
    return Plan(files=(file,), checks=(check,)), body + crc


def _open_refuses(patch: pytest.MonkeyPatch) -> None:
    opening = os.open

    def refuse(path: Path, flags: int, *args: object, **kwargs: object) -> int:
        if flags & O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return opening(path, flags, *args, **kwargs)  # type: ignore[arg-type]

    patch.setattr(os, "open", refuse)


def _calls_refuse(patch: pytest.MonkeyPatch) -> None:
    for name in ("pwrite", "preadv"):
        real = getattr(os, name)

        def refuse(fd: int, *args: object, real: Callable[..., int] = real) -> int:
            if is_direct(fd):
                raise OSError(errno.EINVAL, "no")
            return real(fd, *args)

        patch.setattr(os, name, refuse)


def _half_is_written(patch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def half(fd: int, data: memoryview, at: int) -> int:
        if is_direct(fd):
            data = data[: len(data) // 2 // direct.BLOCK * direct.BLOCK] or data
        return real(fd, data, at)

    patch.setattr(os, "pwrite", half)


SYSTEMS = {
    "as it is": lambda patch: None,
    "open refuses": _open_refuses,
    "calls refuse": _calls_refuse,
    "half is written": _half_is_written,
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_bytes_are_the_same(system: str, source: Path, tmp_path: Path) -> None:
    plan, want = plan_of(source, list(SYSTEMS).index(system))
    forget(source)
    with pytest.MonkeyPatch.context() as patch:
        SYSTEMS[system](patch)
        report = execute(plan, tmp_path / "out", workers=2)
    assert (tmp_path / "out" / "x").read_bytes() == want
    assert report.files[0].crc32 == zlib.crc32(want) and report.checked == 1


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[bool, int]]:
    """Bytes written, by whether past the cache."""
    seen = {True: 0, False: 0}
    real = os.pwrite

    def counted(fd: int, data: memoryview, at: int) -> int:
        n = real(fd, data, at)
        seen[is_direct(fd)] += n
        return n

    monkeypatch.setattr(os, "pwrite", counted)
    yield seen


@pytest.mark.usefixtures("needs_direct")
def test_large_files_go_past_the_cache(source: Path, tmp_path: Path, traffic: dict[bool, int]) -> None:
    segments = (ByteRange(source, 0, SIZE),)
    forget(source)
    execute(Plan(files=(OutputFile(path="", segments=segments),), checks=()), tmp_path / "out")
    assert traffic[True] >= SIZE - direct.BLOCK and traffic[False] < direct.BLOCK
    for path in (source, tmp_path / "out"):
        fd = os.open(path, os.O_RDONLY)
        assert not direct.is_cached(fd, SIZE)
        os.close(fd)
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


@pytest.mark.usefixtures("needs_direct")
def test_what_is_in_the_cache_is_read_from_it(source: Path) -> None:
    forget(source)
    fd = direct.open_cold(source)
    assert fd >= 0
    os.close(fd)
    source.read_bytes()
    assert direct.open_cold(source) == -1


@pytest.mark.usefixtures("needs_direct")
def test_the_end_of_a_cold_file(source: Path) -> None:
    data = source.read_bytes()
    buffer = memoryview(bytearray(direct.SMALLEST_READ + 777))
    with Reader() as reader:
        for start in (0, 1, 4095, 4096, SIZE - len(buffer)):
            forget(source)
            reader.read(buffer, source, start)
            assert buffer == data[start : start + len(buffer)]
        room = direct.aligned(len(buffer) + 2 * direct.BLOCK)
        for start in (0, 1, 4095, 4096, 12345, SIZE - len(buffer)):  # as it lies on disk, and as it does not
            for at in (start % direct.BLOCK, (start + 64) % direct.BLOCK):
                forget(source)
                view = room[at : at + len(buffer)]
                reader.read(view, source, start)
                assert view == data[start : start + len(buffer)]
        forget(source)
        with pytest.raises(CkptError, match="ends at byte"):
            reader.read(buffer, source, SIZE - len(buffer) + 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_past_the_cache_leaves_nothing(
    code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def fail(fd: int, data: memoryview, at: int) -> int:
        if is_direct(fd) and at >= SIZE // 2:
            raise OSError(code, os.strerror(code))
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", fail)
    plan = Plan(files=(OutputFile(path="", segments=(ByteRange(source, 0, SIZE),)),), checks=())
    with pytest.raises(UsageError):
        execute(plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())
