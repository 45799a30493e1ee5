"""Peak memory does not grow with the checkpoint; `inspect` and `explain` import neither torch nor numpy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmarks.measure import measure
from benchmarks.synthetic import write_random, write_sparse

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


@pytest.mark.heavy
@pytest.mark.parametrize("to", ["pt", "zero1 --world-size 3", "dcp --world-size 3", "hf"])
def test_peak_memory_of_convert_at_5_gb(to: str, tmp_path: Path) -> None:
    """The same memory at any size. Needs 12 GB of disk."""
    write_random(tmp_path / "big", 5000 * MB // 14)
    words = ["convert", str(tmp_path / "big"), str(tmp_path / "out"), "--to", *to.split(), "-q"]
    assert measure([*CKPT, *words]).rss < 200 * MB


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
