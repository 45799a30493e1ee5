"""Many processes write one plan: the bytes of one process, whatever dies in between."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from benchmarks.synthetic import write_random
from plans.plan_text import CASES, DRY
from support import FIXTURES

from ckpttools import convert
from ckpttools.errors import UsageError
from ckpttools.execute import Finish, execute, others, shelves, staging
from ckpttools.execute import spread as spreading
from ckpttools.execute.others import Job, Others
from ckpttools.execute.spread import spread
from ckpttools.launch import Worker, worker
from ckpttools.manifest import is_result
from ckpttools.plan import Literal, OutputFile, Plan
from ckpttools.siblings import MANIFEST, SPREAD
from ckpttools.tensors import ByteRange

CKPT = (sys.executable, "-m", "ckpttools.cli")
ZERO2 = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"
COMMANDS = {
    "reshard": ("reshard", ZERO2, "--world-size", "4"),
    "extract folder": ("extract", ZERO2, "--weights-only", "--max-shard-size", "200B"),
    "convert": ("convert", ZERO2, "--to", "dcp", "--world-size", "2"),
    "rebase": (
        "rebase-schedule",
        FIXTURES / "mmengine-deepspeed/iter_50.pth",
        "--old-bs",
        "8",
        "--new-bs",
        "4",
    ),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MB in two ranks: enough for 64 pieces of 300 kB."""
    folder = tmp_path_factory.mktemp("large") / "run"
    write_random(folder, 20_000_000 // 14)
    return folder


def start(
    arguments: Sequence[object], rank: int, world: int, *, limit: int = 0, **environment: str
) -> subprocess.Popen[str]:
    """One worker, as torchrun would start it; `limit`: the size of a file that it may write."""
    variables = environment or {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen(
        [*CKPT, *map(str, arguments), "--spread"],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
    )


def ended(workers: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    outputs = [worker.communicate(timeout=300) for worker in workers]
    return [(worker.returncode, out, err) for worker, (out, err) in zip(workers, outputs, strict=True)]


def files_of(folder: Path) -> dict[str, bytes]:
    """All but manifests, which also name the plan of many writers."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def one_process(arguments: Sequence[object], dst: Path) -> dict[str, bytes]:
    done = subprocess.run([*CKPT, *map(str, with_dst(arguments, dst))], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    return files_of(dst)


def with_dst(arguments: Sequence[object], dst: Path) -> list[object]:
    command, src, *rest = arguments
    return [command, src, dst, *rest]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_bytes_of_one_process(name: str, tmp_path: Path) -> None:
    want = one_process(COMMANDS[name], tmp_path / "one")
    arguments = with_dst(COMMANDS[name], tmp_path / "many")
    found = ended([start(arguments, rank, 3) for rank in (2, 0, 1)])
    assert [code for code, _, _ in found] == [0, 0, 0], found
    assert files_of(tmp_path / "many") == want
    assert [out for _, out, _ in found] == ["", f"{tmp_path / 'many'}\n", ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]


# of each target a plan from another format, where there is one
PLANS = {name: CASES[name] for name in CASES if re.search("to-|reshard", name)} | {
    "zero2-to-universal": ("deepspeed-0.19.8/z2_groups_ws2", convert, {"to": "universal"}),
    "zero2-to-zero3": ("deepspeed-0.19.8/z2_groups_ws2", convert, {"to": "zero3", "world_size": 2}),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_bytes_of_one_process_in_every_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelves._OnDisk, "pause", 0.01)
    source, make, options = PLANS[name]
    plan = make(FIXTURES / source, tmp_path / "x", how=DRY, **options).plan  # type: ignore[operator]
    execute(plan, tmp_path / "one")

    def run(rank: int) -> int:
        job = Job(worker=Worker(rank, 3), is_result=lambda path, _: path.exists())
        return spread(plan, tmp_path / "many", job).pieces

    with ThreadPoolExecutor(3) as pool:
        pieces = list(pool.map(run, (2, 0, 1)))
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one") and sum(pieces)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]


def test_under_torchrun(large: Path, tmp_path: Path) -> None:
    arguments = ["reshard", large, tmp_path / "many", "--world-size", "3", "--spread"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ckpttools.cli"]
    done = subprocess.run([sys.executable, *launch, *map(str, arguments)], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == [str(tmp_path / "many")]
    assert files_of(tmp_path / "many") == one_process(
        ("reshard", large, "--world-size", "3"), tmp_path / "one"
    )


def test_an_array_whose_tasks_do_not_meet(large: Path, tmp_path: Path) -> None:
    arguments = ["reshard", large, tmp_path / "many", "--world-size", "3"]
    for rank in (2, 0, 1):
        array = {"SLURM_ARRAY_TASK_ID": str(rank), "SLURM_ARRAY_TASK_COUNT": "3"}
        assert not (tmp_path / "many").exists()
        ((code, _, err),) = ended([start(arguments, rank, 3, **array)])
        assert code == 0 and ("left to other workers" in err) == (rank != 1), err
    want = one_process(("reshard", large, "--world-size", "3"), tmp_path / "one")
    assert files_of(tmp_path / "many") == want


def kill_and_go_on(large: Path, tmp_path: Path, rng: random.Random, want: dict[str, bytes]) -> int:
    """Kill one worker or all at a random moment, then run again with another number: how many were killed."""
    dst = tmp_path / "many"
    arguments = ["reshard", large, dst, "--world-size", "3"]
    world = rng.randint(2, 3)
    workers = [start(arguments, rank, world) for rank in range(world)]
    ledger = tmp_path / f"many{SPREAD}" / "ledger"
    enough = rng.randint(0, 66)  # files in the ledger: 64 pieces and the plan, then it is committed
    while any(each.poll() is None for each in workers) and not dst.exists():
        if len(list(ledger.glob("*.json"))) >= min(enough, 65) or (tmp_path / f"many{SPREAD}/done").exists():
            break
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.8 if enough > 60 else 0.05))
    victims = workers if rng.random() < 0.5 else [rng.choice(workers)]
    kills = sum(each.poll() is None for each in victims)
    for each in victims:
        each.kill()
    for each in workers:  # as a launcher ends the rest
        if each not in victims:
            each.send_signal(signal.SIGTERM)
    ended(workers)
    assert not dst.exists() or files_of(dst) == want
    before = {path.name: path.stat().st_ino for path in ledger.glob("[pg]*.json")} if ledger.exists() else {}
    (tmp_path / "kept").mkdir()
    for name in before:
        os.link(ledger / name, tmp_path / "kept" / name)  # the inode stays taken
    world = rng.randint(1, 3)
    again = [start(arguments, rank, world) for rank in range(world)]
    while before and not dst.exists() and any(each.poll() is None for each in again):
        for path in ledger.glob("[pg]*.json"):
            if path.name in before and path.name != "plan.json":
                try:
                    if (ledger / "plan.json").stat().st_ino != before["plan.json"]:
                        break  # the killed commit had taken the ledger: this is another one
                    assert path.stat().st_ino == before[path.name], "a finished piece was written again"
                except FileNotFoundError:
                    break
        time.sleep(0.05)
    found = ended(again)
    assert [code for code, _, _ in found] == [0] * world, found
    assert files_of(dst) == want
    assert not (tmp_path / f"many{SPREAD}").exists()
    for path in (dst, tmp_path / "kept"):
        shutil.rmtree(path)
    return kills


def test_killed_and_run_again(large: Path, tmp_path: Path) -> None:
    want = one_process(("reshard", large, "--world-size", "3"), tmp_path / "one")
    rng = random.Random(7)
    for _ in range(4):
        kill_and_go_on(large, tmp_path, rng, want)


@pytest.mark.heavy
def test_200_kills(large: Path, tmp_path: Path) -> None:
    want = one_process(("reshard", large, "--world-size", "3"), tmp_path / "one")
    kills = 0
    while kills < 200:
        seed = random.randrange(2**32)
        print(f"{kills} killed so far; next seed {seed}", flush=True)
        kills += kill_and_go_on(large, tmp_path, random.Random(seed), want)


def test_one_worker_cannot_write(large: Path, tmp_path: Path) -> None:
    arguments = ["reshard", large, tmp_path / "many", "--world-size", "3"]
    job = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "this job"}
    workers = [
        start(arguments, 0, 2, **job, RANK="0"),
        start(arguments, 1, 2, **job, RANK="1", limit=100_000),
    ]
    (code, out, err), (code1, _, err1) = ended(workers)
    assert (code, out, code1) == (2, "", 2)
    assert "error[file-too-big]" in err1 and f"many{SPREAD} is kept" in err1 and "removed" not in err1
    assert "error[worker-failed]: worker 1 failed: " in err
    assert not (tmp_path / "many").exists()
    assert [code for code, _, _ in ended([start(arguments, rank, 2) for rank in range(2)])] == [0, 0]


def test_what_is_written_wrong_is_written_again_and_nothing_else(large: Path, tmp_path: Path) -> None:
    arguments = ["reshard", large, tmp_path / "many", "--world-size", "3"]
    array = {"SLURM_ARRAY_TASK_COUNT": "2"}
    assert [c for c, _, _ in ended([start(arguments, 1, 2, **array, SLURM_ARRAY_TASK_ID="1")])] == [0]
    spread = tmp_path / f"many{SPREAD}"
    shard = max(spread.glob("out-*/*/*optim_states.pt"), key=lambda path: path.stat().st_size)
    data = shard.read_bytes()
    at = next(k for k in range(len(data) // 2, len(data)) if data[k])  # of a piece that is written
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    before = {path.name for path in (spread / "ledger").glob("piece-*.json")}
    ((code, _, err),) = ended([start(arguments, 0, 2, **array, SLURM_ARRAY_TASK_ID="0")])
    assert code == 2 and "error[write-failed]: what was read back is not what was written" in err, err
    after = {path.name for path in (spread / "ledger").glob("piece-*.json")}
    assert len(before - after) == 1 and len(after) > len(before)
    assert [code for code, _, _ in ended([start(arguments, rank, 2) for rank in range(2)])] == [0, 0]
    assert files_of(tmp_path / "many") == one_process(
        ("reshard", large, "--world-size", "3"), tmp_path / "one"
    )


def test_who_plans_something_else_is_refused(large: Path, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    first = ["reshard", large, tmp_path / "many", "--world-size", "3"]
    assert [code for code, _, _ in ended([start(first, 1, 2, **array)])] == [0]
    ((code, _, err),) = ended([start([*first[:-1], "4"], 0, 2)])
    assert code == 2 and "error[other-plan]" in err and "is another one" in err
    plan = next((tmp_path / f"many{SPREAD}/ledger").glob("plan.json"))
    plan.write_text(plan.read_text().replace('"ckpttools": "', '"ckpttools": "9.'))
    ((code, _, err),) = ended([start(first, 0, 2)])
    assert code == 2 and "ckpttools 9." in err


def test_a_worker_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves._OnDisk, "pause", 0.01)
    monkeypatch.setattr(others, "_REMIND", 3)
    source = tmp_path / "a"
    source.write_bytes(random.Random(0).randbytes(3_000_000))
    plan = Plan(files=(OutputFile(path="", segments=(ByteRange(source, 0, 3_000_000),)),))
    said: list[str] = []
    told = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        told.set()

    def never(dst: Path, digest: str) -> bool:
        return False

    def run() -> None:
        with pytest.raises(UsageError, match="was removed"):
            spread(plan, tmp_path / "out", Job(worker=Worker(0, 2), is_result=never, say=say))

    waits = threading.Thread(target=run)
    waits.start()
    assert told.wait(300)
    (tmp_path / f"out{SPREAD}").rename(tmp_path / "removed")
    waits.join()
    assert said[0].startswith("worker 0 waits for worker 1 (")


def test_force_replaces_and_a_late_worker_sees_it(tmp_path: Path) -> None:
    dst = tmp_path / "many"
    one_process(("reshard", ZERO2, "--world-size", "3"), dst)
    want = one_process(("reshard", ZERO2, "--world-size", "4"), tmp_path / "one")
    arguments = ["reshard", ZERO2, dst, "--world-size", "4", "--force"]
    assert [code for code, _, _ in ended([start(arguments, rank, 2) for rank in range(2)])] == [0, 0]
    assert files_of(dst) == want
    assert [code for code, _, _ in ended([start(arguments[:-1], 1, 2)])] == [0]  # it is done
    ((code, _, err),) = ended([start([*arguments[:-2], "2"], 1, 2)])
    assert code == 2 and "destination-exists" in err
    assert not any(is_result(path, "0" * 32) for path in (dst, tmp_path / "one"))


def test_a_result_that_others_replace_or_that_lacks_a_file(tmp_path: Path) -> None:
    dst = tmp_path / "x"
    arguments = ["reshard", ZERO2, dst, "--world-size", "3"]
    assert [code for code, _, _ in ended([start(arguments, 0, 1)])] == [0]
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": "1"}
    others = ["reshard", ZERO2, dst, "--world-size", "4", "--force"]
    assert [code for code, _, _ in ended([start(others, 1, 2, **array)])] == [0]  # its half is written
    written = sorted((tmp_path / f"x{SPREAD}").rglob("*"))
    assert [code for code, _, _ in ended([start(arguments, 0, 1)])] == [0]  # it is there
    assert written and sorted((tmp_path / f"x{SPREAD}").rglob("*")) == written
    max(dst.rglob("*optim_states.pt")).unlink()
    ((code, _, err),) = ended([start(arguments, 0, 1)])
    assert code == 2 and "error[destination-exists]" in err, err


SAYS = {
    "torchrun": ({"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, Worker(1, 4)),
    "srun": (
        {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"},
        Worker(2, 3, job="7-1-0"),
    ),
    "torchrun under srun": (
        {"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
        Worker(5, 8),
    ),
    "array of single tasks": (
        {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "1",
            "SLURM_ARRAY_TASK_ID": "12",
            "SLURM_ARRAY_TASK_MIN": "10",
            "SLURM_ARRAY_TASK_STEP": "2",
            "SLURM_ARRAY_TASK_COUNT": "4",
        },
        Worker(1, 4, waits=False),
    ),
    "mpirun": ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, Worker(0, 2)),
    "alone": ({"RANK": "0", "WORLD_SIZE": "1"}, Worker(0, 1)),
}


@pytest.mark.parametrize("name", SAYS)
def test_what_the_launcher_says(name: str) -> None:
    environment, want = SAYS[name]
    assert worker(environment) == want


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "2"},
    ],
)
def test_a_launcher_that_makes_no_sense(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError) as error:
        worker(environment)
    assert error.value.id == "no-launcher" and error.value.hint


@pytest.fixture(autouse=True)
def no_launcher_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in os.environ:
        if name in ("RANK", "WORLD_SIZE") or name.startswith(("SLURM_", "OMPI_", "PMI_")):
            monkeypatch.delenv(name)
    yield


def test_of_two_that_commit_one_does_and_the_other_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of an array do not wait for each other, so both may see every piece finished at once."""
    plan = Plan(
        files=tuple(OutputFile(path=f"{i}", segments=(Literal(bytes([i]) * 5000),)) for i in range(8))
    )
    dst = tmp_path / "out"
    both, slow_made, is_late = threading.Barrier(2), threading.Event(), threading.Event()
    commit = staging.commit

    def slow(*arguments: Any) -> Any:  # the first has made its files and is about to give the name
        slow_made.set()
        assert is_late.wait(300)
        return commit(*arguments)

    def run(rank: int) -> None:
        def finish(digest: str, look: Callable[[], None]) -> Finish:
            def more(staged: Path, crcs: Mapping[Path, int]) -> Mapping[str, bytes]:
                both.wait(300)
                if rank == 1:
                    assert slow_made.wait(300)
                return {"manifest": digest.encode()}

            return more

        job = Job(worker=Worker(rank, 2, waits=False), is_result=lambda path, _: (path / "manifest").exists())
        results[rank] = spread(plan, dst, job, finish=finish)

    results: dict[int, Any] = {}
    gate = threading.Barrier(2)
    ready, waits = Others.leave_to_me, spreading._Share.wait_for_commit
    monkeypatch.setattr(staging, "commit", slow)
    monkeypatch.setattr(
        Others, "leave_to_me", lambda them, needed, read: (gate.wait(300), ready(them, needed))[1]
    )
    monkeypatch.setattr(spreading._Share, "wait_for_commit", lambda share: (is_late.set(), waits(share))[1])
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1] and (results[0].report is None) != (results[1].report is None)
    assert len(files_of(dst)) == 9
