"""Writing: the bytes of a plan, its checksums, and what stays behind when something goes wrong."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FIXTURES

from ckpttools.checksums import RangeCrcs, crc32, crc32_combine
from ckpttools.errors import CkptError, UsageError
from ckpttools.execute import Report, commit, execute, prepare, system, units, write
from ckpttools.formats import locate, zero
from ckpttools.formats import read as read_checkpoint
from ckpttools.plan import Cast, Literal, OutputFile, Plan, Sealed, Segment, SourceCheck, copy_file
from ckpttools.progress import progress_bar
from ckpttools.tensors import BFLOAT16, FLOAT16, FLOAT32, ByteRange, Chunk, Strided, Zeros
from ckpttools.transforms.reshard import reshard
from ckpttools.values import cast

SOURCE_NBYTES = 6000


# --- a plain reference ---


def read(chunk: Chunk) -> bytes:
    match chunk:
        case Zeros(nbytes):
            return bytes(nbytes)
        case ByteRange(path, start, nbytes):
            return path.read_bytes()[start : start + nbytes]
        case Strided():
            view = np.ndarray(
                chunk.shape,
                f"V{chunk.itemsize}",
                chunk.path.read_bytes(),
                chunk.start,
                [stride * chunk.itemsize for stride in chunk.strides],
            )
            return view.reshape(-1)[chunk.first : chunk.first + chunk.numel].tobytes()


def reference(file: OutputFile) -> bytes:
    parts: list[bytes] = []
    for segment in file.segments:
        match segment:
            case Literal(data) | Sealed(data):
                parts.append(data)
            case Cast(chunks, source, target):
                block = np.frombuffer(b"".join(map(read, chunks)), source.name)
                parts.append(cast(block, source, target).tobytes())
            case chunk:
                parts.append(read(chunk))
    whole = parts[:]
    for k, segment in enumerate(file.segments):
        for at, first, last in segment.holes if isinstance(segment, Sealed) else ():
            crc = zlib.crc32(b"".join(parts[first:last])).to_bytes(4, "little")
            whole[k] = whole[k][:at] + crc + whole[k][at + 4 :]
    return b"".join(whole)


# --- random plans ---


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).write_bytes(rng.standard_normal(SOURCE_NBYTES // 4, np.float32).tobytes())
    return folder / "a", folder / "b"


@st.composite
def byte_ranges(draw: st.DrawFn, paths: tuple[Path, ...], align: int = 1) -> ByteRange:
    start = draw(st.integers(0, SOURCE_NBYTES // align)) * align
    nbytes = draw(st.integers(0, min(SOURCE_NBYTES - start, 900) // align)) * align
    return ByteRange(draw(st.sampled_from(paths)), start, nbytes)


@st.composite
def strided(draw: st.DrawFn, paths: tuple[Path, ...], itemsize: int) -> Strided:
    rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 12))
    first = draw(st.integers(0, rows * columns))
    return Strided(
        path=draw(st.sampled_from(paths)),
        start=draw(st.integers(0, 20)) * 4,
        itemsize=itemsize,
        shape=(rows, columns),
        strides=draw(st.sampled_from([(1, rows), (columns + 2, 2), (0, 1)])),
        first=first,
        numel=draw(st.integers(0, rows * columns - first)),
    )


@st.composite
def casts(draw: st.DrawFn, paths: tuple[Path, ...]) -> Cast:
    floats = byte_ranges(paths, 4) | strided(paths, 4) | st.builds(Zeros, st.just(12))
    return Cast(
        tuple(draw(st.lists(floats, max_size=3))), FLOAT32, draw(st.sampled_from([BFLOAT16, FLOAT16]))
    )


@st.composite
def output_files(draw: st.DrawFn, paths: tuple[Path, ...], name: str) -> OutputFile:
    data: st.SearchStrategy[Segment] = st.one_of(
        st.builds(Literal, st.binary(max_size=80)),
        byte_ranges(paths),
        st.builds(Zeros, st.integers(0, 300)),
        strided(paths, draw(st.sampled_from([1, 2, 4]))),
        casts(paths),
    )
    segments: list[Segment] = list(draw(st.lists(data, max_size=8)))
    plain = len(segments)
    for _ in range(draw(st.integers(0, 3))):  # in front of, after and between what they sum up
        data, holes = draw(st.binary(max_size=70)), []
        for _ in range(draw(st.integers(1, 4))):
            first = draw(st.integers(0, plain))
            holes.append((len(data), first, draw(st.integers(first, plain))))
            data += bytes(4) + draw(st.binary(max_size=70))
        segments.append(Sealed(data, tuple(holes)))
    order = draw(st.permutations(range(len(segments)))) if len(segments) > plain else range(plain)
    return OutputFile(path=name, segments=_reordered(segments, plain, list(order)))


def _reordered(segments: list[Segment], plain: int, order: list[int]) -> tuple[Segment, ...]:
    """Put the checksums at other places, keeping the data in order and what each one covers apart."""
    data = iter(segments[:plain])
    out: list[Segment] = []
    for k in order:
        out.append(next(data) if k < plain else segments[k])
    runs = [(i, j) for i in range(len(out) + 1) for j in range(i, len(out) + 1)]
    legal = [(i, j) for i, j in runs if not any(isinstance(s, Sealed) for s in out[i:j])]

    def near(first: int, last: int) -> tuple[int, int]:
        return min(legal, key=lambda run: abs(run[0] - first) + abs(run[1] - last))

    return tuple(
        Sealed(s.data, tuple((at, *near(i, j)) for at, i, j in s.holes)) if isinstance(s, Sealed) else s
        for s in out
    )


@st.composite
def plans(draw: st.DrawFn, paths: tuple[Path, ...]) -> Plan:
    names = draw(st.sampled_from([("",), ("x",), ("x", "sub/y"), ("x", "sub/y", "sub/deep/z"), ()]))
    checked = draw(st.lists(byte_ranges(paths), max_size=6))
    return Plan(
        files=tuple(draw(output_files(paths, name)) for name in names),
        checks=tuple(SourceCheck(r, zlib.crc32(read(r)), f"record {k}") for k, r in enumerate(checked)),
    )


def is_used(plan: Plan, check: SourceCheck) -> bool:
    """Whether a byte of the checked range is copied; for views, whether it lies in the view's extent."""
    for file in plan.files:
        for segment in file.segments:
            for chunk in segment.chunks if isinstance(segment, Cast) else (segment,):
                if isinstance(chunk, ByteRange | Strided) and chunk.nbytes:
                    same = chunk.path == check.source.path
                    if same and chunk.start < check.source.end and check.source.start < chunk.end:
                        return check.source.nbytes > 0
    return False


@pytest.fixture(params=[64, 1000, units.UNIT], ids=lambda unit: f"unit{unit}")
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(units, "UNIT", request.param)
    yield request.param


@settings(deadline=None, max_examples=60)
@given(data=st.data(), workers=st.integers(1, 3))
def check_random_plan(noise: tuple[Path, ...], data: st.DataObject, workers: int) -> None:
    plan = data.draw(plans(noise))
    with tempfile.TemporaryDirectory() as folder:
        dst = Path(folder) / "out"
        report = execute(plan, dst, workers=workers)
        for file, written in zip(plan.files, report.files, strict=True):
            want = reference(file)
            assert (dst / file.path if file.path else dst).read_bytes() == want
            assert (written.path, written.nbytes, written.crc32) == (file.path, len(want), zlib.crc32(want))
        assert report.checked == sum(is_used(plan, check) for check in plan.checks)
        assert os.listdir(folder) == ["out"]  # noqa: PTH208


def test_random_plans_give_the_bytes_of_the_reference(noise, unit):
    check_random_plan(noise)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def check_damaged_plan(noise: tuple[Path, ...], data: st.DataObject) -> None:
    plan = data.draw(plans(noise))
    k = data.draw(st.integers(0, max(len(plan.checks) - 1, 0)))
    if not plan.checks:
        return
    wrong = SourceCheck(plan.checks[k].source, plan.checks[k].crc32 ^ 1, "record X")
    plan = Plan(files=plan.files, checks=(*plan.checks[:k], wrong, *plan.checks[k + 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        if not is_used(plan, wrong):
            execute(plan, Path(folder) / "out")
            return
        with pytest.raises(CkptError, match="record X: CRC-32 is") as error:
            execute(plan, Path(folder) / "out")
        assert error.value.id == "checksum" and error.value.exit_code == 1
        assert error.value.where == str(wrong.source.path)
        assert os.listdir(folder) == []  # noqa: PTH208


def test_a_wrong_checksum_of_used_bytes_stops(noise, unit):
    check_damaged_plan(noise)


@given(st.data())
def test_range_crcs_in_any_order(data):
    raw = data.draw(st.binary(min_size=1, max_size=60))
    points = st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw))).map(sorted).map(tuple)
    ranges = data.draw(st.lists(points, max_size=4))
    crcs = RangeCrcs(ranges)
    pieces = [(low, high) for low, high, owners in crcs.spans(0, len(raw)) if owners]
    for low, high in data.draw(st.permutations(pieces)):
        crcs.add(low, high, crc32(raw[low:high]))
    assert crcs.values == [zlib.crc32(raw[start:end]) for start, end in ranges]
    assert not any(crcs.left)
    assert crc32_combine(crc32(raw), crc32(b"xyz"), 3) == zlib.crc32(raw + b"xyz")


def test_many_tiny_segments_are_joined_to_few_writes(noise, tmp_path, monkeypatch):
    calls = []
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: calls.append(1) or real(*args))
    segments = tuple(ByteRange(noise[k % 2], k % 5000, 11) for k in range(100_000))
    file = OutputFile(path="", segments=segments)
    execute(Plan(files=(file,)), tmp_path / "out")
    contents = [path.read_bytes() for path in noise]
    assert (tmp_path / "out").read_bytes() == b"".join(
        contents[k % 2][k % 5000 : k % 5000 + 11] for k in range(100_000)
    )
    assert len(calls) <= 3


# --- where it may write ---


def small_plan(noise: tuple[Path, ...]) -> Plan:
    return Plan(files=(copy_file(noise[0], "x", SOURCE_NBYTES), copy_file(noise[1], "sub/y", SOURCE_NBYTES)))


def error_id(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as error:
        call()
    assert error.value.message and error.value.where and error.value.why and error.value.hint
    return error.value.id


def test_an_existing_destination_is_refused(noise, tmp_path):
    dst = tmp_path / "out"
    for make in (dst.mkdir, dst.touch, lambda: dst.symlink_to(tmp_path / "nowhere")):
        make()
        assert error_id(lambda: execute(small_plan(noise), dst)) == "destination-exists"
        dst.rmdir() if dst.is_dir() else dst.unlink()
    assert error_id(lambda: execute(small_plan(noise), tmp_path / "no" / "out")) == "destination-parent"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["renameat2", "rename"])
def test_a_destination_that_appears_meanwhile_is_kept(noise, tmp_path, monkeypatch, call):
    without_renameat2(monkeypatch, call)

    class Rival:
        def update(self, nbytes: int, /) -> None:
            (tmp_path / "out").write_text("rival")

    plan = Plan(files=(copy_file(noise[0], "", SOURCE_NBYTES),))
    assert error_id(lambda: execute(plan, tmp_path / "out", progress=Rival())) == "destination-exists"
    assert (tmp_path / "out").read_text() == "rival"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("force", [False, True])
def test_sources_are_never_written_to(tmp_path, force):
    source = tmp_path / "run" / "step"
    source.mkdir(parents=True)
    (source / "w").write_bytes(b"weights")
    (tmp_path / "link").symlink_to(source)
    plan = Plan(files=(copy_file(source / "w", "x", 7),))
    places = [source / "w", source, source.parent, tmp_path / "link", source / "out", source / "w" / "out"]
    for dst in places:
        run = lambda dst=dst: execute(plan, dst, source=source, force=force)  # noqa: E731
        assert error_id(run) in ("destination-in-source", "destination-parent")
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "step", "w", "link"}
    execute(plan, source / "beside", source=source / "w")  # a file's folder is not the source


@pytest.mark.parametrize(
    "paths",
    [
        ("/x",),
        ("../x",),
        ("a/../../x",),
        ("a\0",),
        ("x", "x"),
        ("x", "x/y"),
        ("", "x"),
        ("a//b",),
        ("a/",),
        (".",),
    ],
)
def test_paths_that_leave_the_destination_or_meet(tmp_path, paths):
    with pytest.raises(ValueError, match="path"):
        execute(Plan(files=tuple(OutputFile(path=p, segments=()) for p in paths)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "holes",
    [
        [(0, 0, 3)],
        [(0, -1, 1)],
        [(0, 1, 0)],
        [(0, 0, 2)],
        [(5, 0, 1)],
        [(-1, 0, 1)],
        [(0, 0, 1), (3, 0, 1)],
        [(4, 0, 1), (0, 0, 1)],
    ],
)
def test_impossible_checksums(tmp_path, holes):
    sealed = Sealed(bytes(8), tuple(holes))
    with pytest.raises(ValueError, match="checksum"):
        execute(Plan(files=(OutputFile(path="x", segments=(Literal(b"a"), sealed)),)), tmp_path / "out")


def test_too_little_space_is_said_before_anything_is_written(noise, tmp_path):
    plan = Plan(files=(OutputFile(path="x", segments=(Zeros(1 << 60),)),))
    with pytest.raises(UsageError, match=f"{1 << 60} bytes are needed, .* are free, .* are missing") as error:
        execute(plan, tmp_path / "out")
    assert error.value.id == "no-space" and "file system /" in error.value.where
    assert list(tmp_path.iterdir()) == []


def test_modes_follow_the_umask(noise, tmp_path):
    old = os.umask(0o027)
    try:
        execute(small_plan(noise), tmp_path / "out")
    finally:
        os.umask(old)
    modes = {
        p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out", *(tmp_path / "out").rglob("*"))
    }
    assert modes == {"out": 0o750, "x": 0o640, "sub": 0o750, "y": 0o640}


# --- replacing ---


def without_renameat2(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Older kernels and some network file systems have no renameat2."""
    if call == "rename":
        monkeypatch.setattr(system, "renameat2", lambda *_: False)


@pytest.mark.parametrize("call", ["renameat2", "rename"])
@pytest.mark.parametrize("old", ["file", "folder"])
@pytest.mark.parametrize("single", [False, True])
def test_force_replaces(noise, tmp_path, monkeypatch, call, old, single):
    without_renameat2(monkeypatch, call)
    dst = tmp_path / "out"
    match old:
        case "file":
            dst.write_text("old")
        case "folder":
            (dst / "sub").mkdir(parents=True)
            (dst / "sub" / "old").touch()
    plan = Plan(files=(copy_file(noise[0], "", SOURCE_NBYTES),)) if single else small_plan(noise)
    execute(plan, dst, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert dst.read_bytes() == noise[0].read_bytes() if single else (dst / "sub/y").is_file()
    assert not (dst / "sub" / "old").exists()


def test_what_is_replaced_is_judged_again_at_the_end(noise, tmp_path):
    """Copying may take hours, in which something else can take the place: a pinned one, say."""
    dst = tmp_path / "out"
    plan = Plan(files=(copy_file(noise[0], "", SOURCE_NBYTES),))

    class Rival:
        def update(self, nbytes: int, /) -> None:
            dst.write_text("pinned")

    def replaces() -> str:
        if dst.read_text() == "pinned":
            raise UsageError("not-replaced", "pinned", where=dst, why="it is kept", hint="another place")
        return "a file"

    dst.write_text("old")
    refused = error_id(lambda: execute(plan, dst, force=True, replaces=replaces, progress=Rival()))
    assert refused == "not-replaced"
    assert dst.read_text() == "pinned" and [p.name for p in tmp_path.iterdir()] == ["out"]
    dst.write_text("old")
    assert execute(plan, dst, force=True, replaces=replaces).notes == ("replaced a file",)


@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "socket", "device"])
def test_force_replaces_no_link_and_no_device(noise, tmp_path, kind):
    dst = tmp_path / "out"
    match kind:
        case "link":
            (tmp_path / "target").mkdir()
            (tmp_path / "target" / "kept").touch()
            dst.symlink_to(tmp_path / "target")
        case "broken link":
            dst.symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(dst)
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(dst))
        case "device":
            try:
                os.mknod(dst, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
            except PermissionError:
                pytest.skip("only root makes devices")
    before = dst.lstat()
    for plan in (small_plan(noise), Plan(files=(copy_file(noise[0], "", SOURCE_NBYTES),))):
        assert error_id(lambda plan=plan: execute(plan, dst, force=True)) == "not-replaced"
    assert (dst.lstat().st_ino, dst.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert kind != "link" or (tmp_path / "target" / "kept").exists()


# --- damaged sources and failing systems ---


def test_a_short_source_is_found_before_copying(noise, tmp_path):
    chunk = Strided(path=noise[0], start=0, itemsize=4, shape=(2, 2), strides=(9999, 1), first=0, numel=1)
    for segment in (ByteRange(noise[0], 1, SOURCE_NBYTES), chunk, Cast((chunk,), FLOAT32, BFLOAT16)):
        with pytest.raises(CkptError) as error:
            execute(Plan(files=(OutputFile(path="x", segments=(segment,)),)), tmp_path / "out")
        assert error.value.id == "source-truncated" and error.value.where == str(noise[0])
    missing = Plan(files=(copy_file(tmp_path / "none", "x", 5),))
    assert error_id(lambda: execute(missing, tmp_path / "out")) == "source-unreadable"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [lambda f: f.truncate(9), lambda f: f.write(b"!")])
def test_a_source_that_changes_meanwhile(tmp_path, change):
    source = tmp_path / "source"
    source.write_bytes(bytes(3 * units.UNIT))

    class Trainer:
        def update(self, nbytes: int, /) -> None:
            with source.open("r+b") as file:
                change(file)

    plan = Plan(files=(copy_file(source, "", 3 * units.UNIT),))
    with pytest.raises(CkptError) as error:
        execute(plan, tmp_path / "out", progress=Trainer(), workers=1)
    assert error.value.id in ("source-truncated", "source-changed")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES], ids=errno.errorcode.get
)
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("call", ["pwrite", "preadv", "fsync", "open", "mkdir", "close"])
def test_every_system_call_fails_once(noise, tmp_path, monkeypatch, call, force, code):
    """The 1st, 2nd, 3rd ... call fails, until a run ends well: nothing half-made is ever left."""
    dst = tmp_path / "out"
    real = getattr(os, call)
    for nth in range(1, 100):
        if force:
            dst.mkdir(exist_ok=True)
            (dst / "old").touch()
        count = 0

        def fail(*args: object, nth: int = nth, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == nth:
                if call == "close":
                    real(*args)
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                execute(small_plan(noise), dst, force=force, workers=1)
            except UsageError as error:
                assert error.message and error.where and error.hint
                failed = True
            else:
                failed = False
        if not failed:
            break
        assert [path.name for path in tmp_path.iterdir()] == (["out"] if force else [])
        assert not force or [path.name for path in dst.iterdir()] == ["old"]
    assert nth > 1 and (dst / "sub/y").read_bytes() == noise[1].read_bytes()


def test_short_writes_and_reads_are_carried_on(noise, tmp_path, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:700], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:900]], at))
    execute(small_plan(noise), tmp_path / "out")
    assert (tmp_path / "out/x").read_bytes() == noise[0].read_bytes()


def test_a_file_size_limit(noise, tmp_path):
    limited = "\nimport resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    code = RUN.replace("\nexecute(", f"{limited}\nexecute(")
    run = start(code, tmp_path)
    assert b"file-too-big" in run.communicate()[1]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- signals and kills ---

RUN = """
import os, signal, sys
from pathlib import Path
from ckpttools.execute import execute
from ckpttools.plan import OutputFile, Plan
from ckpttools.tensors import ByteRange
# whoever started the tests may have had these ignored, as nohup and shells without a terminal do
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
folder, number, moment = Path(sys.argv[1]), *map(int, sys.argv[2:4])
source = folder / "source"
part = source.stat().st_size // 8
file = lambda k: OutputFile(path=f"f{k}", segments=(ByteRange(source, k * part, part),))

class Moments:  # a signal after a given number of blocks
    left = moment
    def update(self, nbytes):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), number)

execute(Plan(files=tuple(map(file, range(8)))), folder / "out", force="force" in sys.argv, progress=Moments())
"""
KILL_NBYTES = 64 << 20


def start(code: str, folder: Path, number: int = 0, moment: int = 0, *args: str) -> subprocess.Popen[bytes]:
    if not (folder / "source").exists():
        (folder / "source").write_bytes(random.Random(0).randbytes(1 << 20) * (KILL_NBYTES >> 20))
    command = [sys.executable, "-c", code, str(folder), str(int(number)), str(moment), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def is_whole(dst: Path, source: Path) -> bool:
    return b"".join((dst / f"f{k}").read_bytes() for k in range(8)) == source.read_bytes()


def interrupted(folder: Path, number: int, moment: int, *args: str) -> subprocess.Popen[bytes]:
    run = start(RUN, folder, number, moment, *args)
    run.communicate()
    return run


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_a_signal_cleans_up(tmp_path, number, force):
    for moment in (1, 20, 62):
        if force:
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "old").touch()
        run = interrupted(tmp_path, number, moment, *["force"] * force)
        source, dst = tmp_path / "source", tmp_path / "out"
        assert source.stat().st_size == KILL_NBYTES
        left = {path.name for path in tmp_path.iterdir()} - {"source"}
        if moment == 1 or run.returncode:  # at the last blocks it may be too late to end
            assert run.returncode in (-number, 128 + number)
        if dst.exists() and not (dst / "old").exists():
            assert is_whole(dst, source)
            left.remove("out")
            for path in dst.iterdir():
                path.unlink()
            dst.rmdir()
        assert left <= ({"out"} if force else set())


@pytest.mark.parametrize("force", [False, True])
def test_sigkill_at_random_moments(tmp_path, force):
    rng = random.Random(5)
    stale = 0
    for _ in range(7):
        if force:
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "old").touch()
        interrupted(tmp_path, signal.SIGKILL, rng.randint(1, 64), *["force"] * force)
        source, dst = tmp_path / "source", tmp_path / "out"
        assert source.stat().st_size == KILL_NBYTES
        left = [path for path in tmp_path.iterdir() if ".ckpt-" in path.name]
        stale += len(left)
        assert len(left) <= 1, "the next run removes what the last one left"
        if dst.exists() and not (dst / "old").exists():
            assert is_whole(dst, source)
            for path in dst.iterdir():
                path.unlink()
            dst.rmdir()
    assert stale
    source.write_bytes(b"12345678" * 100)
    report = execute(Plan(files=(copy_file(source, "x", 800),)), dst, force=True)
    assert len(report.notes) == len(left)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@dataclass(frozen=True)
class StagingName:
    """`out.ckpt-tmp-PID-HOST STARTED RANDOM`, which the next run reads."""

    pid: int
    host: str
    started: str
    kind: str = "tmp"

    def __str__(self) -> str:
        return f"out.ckpt-{self.kind}-{self.pid}-{self.host}{self.started}00000000"


@pytest.fixture
def ours(noise: tuple[Path, ...], tmp_path: Path) -> StagingName:
    """What a run in this process calls its staging."""
    folder = tmp_path / "ours"
    folder.mkdir()
    names = []

    class Spy:
        def update(self, nbytes: int, /) -> None:
            names.extend(path.name for path in folder.iterdir())

    execute(small_plan(noise), folder / "out", progress=Spy())
    shutil.rmtree(folder)
    match = re.fullmatch(r"out\.ckpt-tmp-(\d+)-(\w{4})(\w{4})\w{8}", names[0])
    assert match and int(match[1]) == os.getpid()
    return StagingName(os.getpid(), match[2], match[3])


def another(tag: str) -> str:
    return "ffff" if tag != "ffff" else "0000"


def test_only_what_dead_processes_of_this_machine_left_is_removed(noise, tmp_path, ours):
    dead = replace(ours, pid=dead_pid())
    recycled = replace(ours, started=another(ours.started))
    elsewhere = replace(dead, host=another(ours.host))
    other = str(dead).replace("out.", "output.")
    for name in (ours, dead, recycled, elsewhere, other):
        (tmp_path / str(name)).mkdir()
    report = execute(small_plan(noise), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", str(ours), str(elsewhere), other}
    assert sorted(note.split()[0] for note in report.notes) == ["left", "left", "removed", "removed"]


def test_a_destination_that_was_moved_away_comes_back(noise, tmp_path, ours):
    """Without renameat2, --force has a moment in which the old folder has another name."""
    dead = replace(ours, pid=dead_pid())
    (tmp_path / str(replace(dead, kind="old"))).write_text("old")
    (tmp_path / str(dead)).mkdir()
    assert error_id(lambda: execute(small_plan(noise), tmp_path / "out")) == "destination-exists"
    assert (tmp_path / "out").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


# --- progress and memory ---


def test_progress_adds_up_and_is_silent_without_a_terminal(noise, tmp_path, capsys):
    class Sum:
        nbytes = 0

        def update(self, nbytes: int, /) -> None:
            self.nbytes += nbytes

    progress = Sum()
    report: Report = execute(small_plan(noise), tmp_path / "out", progress=progress)
    assert progress.nbytes == report.nbytes_read == 2 * SOURCE_NBYTES
    with progress_bar(10, "copy") as bar:
        assert bar is None
    assert capsys.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(2_000_000, "copy") as bar:
        assert bar is not None
        bar.update(1_000_000)
    assert "copy" in capsys.readouterr().err
    with progress_bar(10, "copy", enabled=False) as bar:
        assert bar is None


def test_memory_does_not_grow_with_the_plan(tmp_path):
    with (tmp_path / "source").open("wb") as file:
        file.truncate(600 << 20)  # sparse
    # Not ru_maxrss, which a child inherits from its parent.
    code = RUN + "\nprint(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    out, error = start(code, tmp_path).communicate()
    assert not error
    assert int(out.split()[-1]) < 120 * 1024  # KiB, numpy included


# --- several writers ---


@settings(deadline=None, max_examples=60)
@given(data=st.data(), world=st.integers(1, 4))
def check_parts(noise: tuple[Path, ...], data: st.DataObject, world: int) -> None:
    plan = data.draw(plans(noise))
    with tempfile.TemporaryDirectory() as folder:
        dst = Path(folder) / "out"
        with prepare(plan, dst) as staged:
            order = data.draw(st.permutations(range(world)))
            written = [write(staged, plan.part(rank, world), workers=2) for rank in order]
            report = commit(staged, written)
        for file, done in zip(plan.files, report.files, strict=True):
            want = reference(file)
            assert (dst / file.path if file.path else dst).read_bytes() == want
            assert (done.path, done.nbytes, done.crc32) == (file.path, len(want), zlib.crc32(want))
        assert report.checked == sum(is_used(plan, check) for check in plan.checks)


def test_parts_give_the_bytes_of_the_whole(noise, unit):
    check_parts(noise)


def test_two_processes_write_one_plan(tmp_path):
    """A checkpoint of two ranks resharded to three, with checksums over what both processes write."""
    found = locate(FIXTURES / "deepspeed-0.19.8/z2_groups_ws2")
    checkpoint = read_checkpoint(found)
    plan = zero.plan(checkpoint, reshard(checkpoint, 3))
    assert any(isinstance(segment, Sealed) for file in plan.files for segment in file.segments)
    execute(plan, tmp_path / "one")
    with prepare(plan, tmp_path / "two") as staged, get_context("spawn").Pool(2) as pool:
        written = pool.starmap(write, [(staged, plan.part(rank, 2)) for rank in range(2)])
        assert all(0 < sum(shares[0][1] for shares in w.files) < plan.nbytes for w in written)
        report = commit(staged, written)
    assert report.checked
    whole = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()} == whole


@pytest.mark.parametrize("ranks", [[0], [1], [0, 0], [0, 1, 1], []])
def test_a_part_that_is_missing_or_comes_twice(noise, tmp_path, ranks):
    plan = small_plan(noise)
    with pytest.raises(ValueError, match="parts"), prepare(plan, tmp_path / "out") as staged:
        commit(staged, [write(staged, plan.part(rank, 2)) for rank in ranks])
    assert list(tmp_path.iterdir()) == []
