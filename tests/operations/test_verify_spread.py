"""`verify --spread`: what many processes find together is what one finds, word for word."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks.synthetic import write_random
from commands import run
from support import FIXTURES

from ckpttools.checks.contents import tasks_of
from ckpttools.formats import locate
from ckpttools.operations.verify_spread import share
from ckpttools.passes.tasks import sources
from ckpttools.siblings import SPREAD

ZERO2 = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 MB in three ranks."""
    folder = tmp_path_factory.mktemp("large") / "run"
    write_random(folder, 500_000, ranks=3)
    return folder


def spread(words: Sequence[object], world: int, folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of worker 0; the others end well and say nothing on stdout."""
    command = [sys.executable, "-m", "ckpttools.cli", *map(str, words), "--spread"]
    workers = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    for worker, (out, err) in zip(workers[1:], outputs[1:], strict=True):
        assert (worker.returncode, out) == (0, ""), err
    assert not list(folder.glob(f"*{SPREAD}"))
    return workers[0].returncode, *outputs[0]


def damaged(source: Path, folder: Path, rng: random.Random) -> Path:
    """A copy with flipped bytes in every file, some in tensors."""
    shutil.copytree(source, folder / "run")
    for path in sorted((folder / "run").rglob("*.pt")):
        data = bytearray(path.read_bytes())
        for _ in range(4):
            data[rng.randrange(len(data) // 3, 2 * len(data) // 3)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return folder / "run"


@pytest.mark.parametrize("kind", ["good", "damaged", "manifest"])
def test_what_one_process_says(kind: str, large: Path, tmp_path: Path) -> None:
    source = large
    if kind == "damaged":
        source = damaged(large, tmp_path, random.Random(1))
    if kind == "manifest":
        shutil.copytree(large, tmp_path / "run")
        source = tmp_path / "run"
        assert run("verify", source, "--write-manifest").code == 0
        model = next(source.rglob("mp_rank_00_model_states.pt"))
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
    one = run("verify", source)
    code, out, err = spread(["verify", source], 3, tmp_path)
    assert (code, out) == (one.code, one.out), err
    assert code == (0 if kind == "good" else 1)


def test_a_manifest_by_many(tmp_path: Path) -> None:
    for name in ("one", "many"):
        shutil.copytree(ZERO2, tmp_path / name)
    assert run("verify", tmp_path / "one", "--write-manifest").code == 0
    assert spread(["verify", tmp_path / "many", "--write-manifest"], 2, tmp_path)[0] == 0
    (one,), (many,) = (list((tmp_path / name).rglob("ckpt-manifest.json")) for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()


def test_a_folder_of_checkpoints_and_a_folder_that_a_dead_job_left(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf-trainer/plain", tmp_path / "run")
    one = run("verify", tmp_path / "run", "--json")
    command = [sys.executable, "-m", "ckpttools.cli", "verify", str(tmp_path / "run"), "--json", "--spread"]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"}, stdout=subprocess.DEVNULL
    ) as dead:
        while not list(tmp_path.glob(f"*{SPREAD}/begin.json")):
            assert dead.poll() is None
        dead.kill()
    code, out, err = spread(["verify", tmp_path / "run", "--json"], 2, tmp_path)
    assert (code, out) == (one.code, one.out), err


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_task_and_each_checksum_has_one_worker(world: int, large: Path) -> None:
    source = locate(large)
    checked = source.format.check(source)
    assert checked.checkpoint is not None
    tasks, checks = tasks_of(checked), list(checked.checkpoint.checks)
    shares = [share(tasks, checks, {}, rank, world) for rank in range(world)]
    assert sorted(str(task) for mine, _, _ in shares for task in mine if task in tasks) == sorted(
        map(str, tasks)
    )
    assert sorted(map(str, checks)) == sorted(str(check) for _, chosen, _ in shares for check in chosen)
    read = [sum(s.nbytes for task in mine for s in sources(task)) for mine, _, _ in shares]
    total = sum(task.nbytes for task in tasks)
    assert sum(read) < 1.6 * total
    assert max(read) < 2 * total / world + 1_000_000


@pytest.mark.parametrize(
    ("words", "variables", "id"),
    [
        (["--quick"], {"RANK": "0", "WORLD_SIZE": "2"}, "bad-usage"),
        (["--subset", "5%"], {"RANK": "0", "WORLD_SIZE": "2"}, "bad-usage"),
        ([], {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}, "no-launcher"),
        ([], {}, "no-launcher"),
    ],
)
def test_what_is_not_shared(
    words: list[str], variables: dict[str, str], id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name in ("RANK", "WORLD_SIZE") or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ran = run("verify", ZERO2, "--spread", *words)
    assert ran.code == 2 and f"error[{id}]" in ran.err, ran
