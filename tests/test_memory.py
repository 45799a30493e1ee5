"""Peak memory does not grow with the checkpoint; `inspect` and `explain` import neither torch nor numpy."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from benchmarks.measure import measure
from benchmarks.synthetic import write_random, write_sparse

from ckpttools.operations.digest import compare, digest

MB = 1_000_000
CKPT = (sys.executable, "-m", "ckpttools.cli")
GUARDED = """
import sys
from ckpttools.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "numpy", "ml_dtypes", "deepspeed", "transformers"} & set(sys.modules)
    assert not heavy, heavy
"""

COUNTED = """
import sys
from pathlib import Path
from ckpttools.cli import main
try:
    main(sys.argv[2:])
finally:
    Path(sys.argv[1]).write_bytes(Path("/proc/self/io").read_bytes())
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks of ZeRO-2 with random values, 300 MB."""
    folder = tmp_path_factory.mktemp("memory") / "big"
    write_random(folder, 300 * MB // 14)
    assert sum(path.stat().st_size for path in folder.rglob("*.pt")) > 290 * MB
    return folder


@pytest.fixture(scope="module")
def distributed(big: Path) -> Path:
    """The same as a distributed checkpoint of three ranks."""
    at = big.with_name("distributed")
    measure([*CKPT, "convert", str(big), str(at), "--to", "dcp", "--world-size", "3", "-q"])
    return at


HEAVY = pytest.mark.heavy


@pytest.mark.parametrize(
    ("source", "to"),
    [
        ("big", "dcp --mesh 2x2"),
        pytest.param("big", "pt", marks=HEAVY),
        pytest.param("big", "zero1 --world-size 3", marks=HEAVY),
        pytest.param("big", "hf", marks=HEAVY),
        pytest.param("distributed", "pt", marks=HEAVY),
        ("distributed", "zero2 --world-size 3 --dtype bf16"),
        pytest.param("distributed", "dcp --dcp-layout titan", marks=HEAVY),
        pytest.param("distributed", "hf", marks=HEAVY),
    ],
)
def test_peak_memory_of_convert(source: str, to: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    src = request.getfixturevalue(source)
    words = ["convert", str(src), str(tmp_path / "out"), "--to", *to.split(), "-q", "--workers", "8"]
    assert measure([*CKPT, *words]).rss < 200 * MB


WAY = (
    "dcp --mesh 3x1",
    "zero3 --world-size 3 --dtype bf16",
    "pt",
    "universal --dtype bf16",
    "zero1 --world-size 5",
    "dcp --dcp-layout titan",
    "zero2 --world-size 2 --dtype bf16",
)


@pytest.mark.heavy
@pytest.mark.parametrize("megabytes", [300, 5000])
def test_a_way_through_the_formats(megabytes: int, tmp_path: Path) -> None:
    """The same memory at any size. Source and result are read once, the result is written once; masters are
    read again where they give 16-bit weights too. In the end all is as it was. Needs thrice its size on disk.
    """
    write_random(tmp_path / "big", megabytes * MB // 14)
    at, io = tmp_path / "big", tmp_path / "io"
    found = []
    for number, to in enumerate((*WAY, "hf")):
        out = tmp_path / f"{number}{'.pt' if to == 'pt' else ''}"
        words = ["convert", str(at), str(out), "--to", *to.split(), "-q", "--no-digest"]
        cost = measure([sys.executable, "-c", COUNTED, str(io), *words])
        counts = {key: int(value) for key, value in map(str.split, io.read_text().splitlines())}
        read, written = (counts[key] / MB for key in ("rchar:", "wchar:"))
        source, result = size(at) / MB, size(out) / MB
        again = megabytes / 14 * 4 if "bf16" in to and "zero3" not in to else 0
        found.append((to, round(cost.cpu, 2), cost.rss // MB, *map(round, (source, result, read, written))))
        print(*found[-1], flush=True)
        if number and at.name != str(len(WAY) - 1):
            shutil.rmtree(at) if at.is_dir() else at.unlink()
        at = out if to != "hf" else at
        assert cost.rss < 200 * MB, found
        assert read < 1.02 * (source + result + again) + 20, found  # Python reads its modules, too
        assert 0.98 * result < written < 1.02 * result + 5, found
    assert not compare(digest(tmp_path / "big"), digest(at)).different


def size(path: Path) -> int:
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*.*")))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("extract {big} {out} -q", id="extract"),
        pytest.param("extract {big} {out} -q --dtype bf16", id="extract-bf16"),
        pytest.param("reshard {big} {out} --world-size 4 -q", id="reshard"),
        pytest.param("rebase-schedule {big} {out} --new-bs 1 --counters-only -q", id="rebase"),
        pytest.param("verify {big} -q", id="verify"),
        pytest.param("digest {big} -q", id="digest"),
        pytest.param("diff {big} {big} -q", id="diff"),
    ],
)
def test_peak_memory_is_below_half_of_300_mb(big: Path, tmp_path: Path, command: str) -> None:
    words = command.format(big=big, out=tmp_path / "out").split()
    assert measure([*CKPT, *words, "--workers", "8"]).rss < 150 * MB


def test_inspect_reads_headers_only(big: Path) -> None:
    assert measure([sys.executable, "-c", GUARDED, "inspect", big]).rss < 40 * MB


def test_inspect_of_100_gb_in_64_shards(tmp_path: Path) -> None:
    """The folder is sparse: it needs about 1 MB of disk."""
    write_sparse(tmp_path / "sparse", 100_000 * MB // 14, ranks=64)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.pt")) > 99_000 * MB
    assert measure([sys.executable, "-c", GUARDED, "inspect", tmp_path / "sparse"]).rss < 45 * MB


@pytest.mark.parametrize(
    "words",
    ["--help", "reshard --help", "verify --help", "rebase-schedule --help", "batch --bs 4", "explain"],
)
def test_the_cheap_commands_import_nothing_heavy(words: str) -> None:
    measure([sys.executable, "-c", GUARDED, *words.split()])
