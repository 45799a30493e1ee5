"""Many processes write one plan to a store: the bytes of one process, whatever dies in between."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import run
from stores.servers import upload
from stores.test_writing import Objects, here, large, local
from support import FIXTURES

from ckpttools.siblings import SPREAD, UNFINISHED

__all__ = ["here", "large"]
CKPT = (sys.executable, "-m", "ckpttools.cli")
ZERO = FIXTURES / "deepspeed-0.19.8/z2_bf16_ws2"


def start(words: Sequence[object], rank: int, world: int, **variables: str) -> subprocess.Popen[str]:
    """One worker, as torchrun would start it."""
    environment = variables or {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen(
        [*CKPT, *map(str, words), "--spread"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(workers: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    outputs = [worker.communicate(timeout=300) for worker in workers]
    return [(worker.returncode, out, err) for worker, (out, err) in zip(workers, outputs, strict=True)]


def together(words: Sequence[object], world: int) -> list[tuple[int, str, str]]:
    return ended([start(words, rank, world) for rank in range(world)])


@pytest.mark.parametrize("kind", ["folder", "one file"])
def test_the_bytes_of_one_process(kind: str, large: Path, here: Objects, tmp_path: Path) -> None:
    words: tuple[object, ...] = ("reshard", large, "--world-size", 3)
    dst = here / "x"
    if kind == "one file":
        words, dst = ("convert", large, "--to", "pt"), here / "x.pt"
    command, src, *options = words
    found = together([command, src, dst, *options, "--stats"], 3)
    assert [code for code, _, _ in found] == [0, 0, 0], found
    if kind == "folder":  # all bytes are read back, by each worker its share of them
        read = [int(re.findall(r"\((\d+) bytes\)", err)[0]) for _, _, err in found]
        total = sum(meta["size"] for meta in here.meta().values())
        assert total < sum(read) and max(read) < 0.6 * total, read
    assert [out for _, out, _ in found] == [f"{dst}\n", "", ""]
    want = {
        f"{Path(dst).name}/{path}".rstrip("/"): data for path, data in local(words, tmp_path / "x").items()
    }
    assert here.files() == want  # and no ledger, no marker
    assert run("verify", dst).code == 0
    assert [code for code, _, _ in together([command, src, dst, *options], 2)] == [0, 0]  # it is there
    other = together(["reshard", src, dst, "--world-size", 5], 1)
    assert other[0][0] == 2 and "error[destination-exists]" in other[0][2], other


def kill_and_go_on(large: Path, here: Objects, rng: random.Random, want: dict[str, bytes], n: int) -> str:
    """Kill some workers, run again with another number; what was there after the kill."""
    dst = here / f"run{n}/x"
    words: list[object] = ["reshard", large, dst, "--world-size", 5, "-q"]
    ledger = f"run{n}/x{SPREAD}/ledger/"
    workers = [start(words, rank, 3) for rank in range(3)]
    while all(each.poll() is None for each in workers) and not any(
        name.startswith(f"run{n}/") for name in here.meta()
    ):
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 4.0))
    victims = workers if rng.random() < 0.5 else [rng.choice(workers)]
    for each in victims:
        each.kill()
    for each in workers:  # as a launcher ends the rest
        each.terminate()
    ended(workers)
    found = {name for name in here.meta() if name.startswith(f"run{n}/")}
    ran = run("inspect", dst)
    if f"run{n}/x/{UNFINISHED}" in found:
        state = "unfinished"
        assert ran.code == 2 and "error[upload-unfinished]" in ran.err, ran
        assert run("latest", here / f"run{n}").code == 2
    else:
        state = "whole" if f"run{n}/x/latest" in found else "nothing"
        assert ran.code == (0 if state == "whole" else 2), ran
    finished = here.meta()
    plan = json.loads(bytes(here.get(f"{ledger}plan.json"))) if f"{ledger}plan.json" in finished else {}
    there = {
        f"run{n}/x/{name}": finished[f"run{n}/x/{name}"]["last_modified"]
        for k, (name, *_) in enumerate(plan.get("files", ()))
        if f"{ledger}file-{k}.json" in finished
    }
    found = together(words, rng.randint(1, 3))
    assert {code for code, _, _ in found} == {0}, found
    assert here.files(f"run{n}/x/") == want
    assert not any(SPREAD in name or UNFINISHED in name for name in here.meta())
    now = {name: meta["last_modified"] for name, meta in here.meta().items()}
    assert there.items() <= now.items(), "a finished file was sent again"
    return state


def test_killed_and_run_again(large: Path, here: Objects, tmp_path: Path) -> None:
    want = local(("reshard", large, "--world-size", 5), tmp_path / "x")
    assert kill_and_go_on(large, here, random.Random(5), want, 0) in ("unfinished", "whole", "nothing")


@pytest.mark.heavy
def test_30_kills(large: Path, here: Objects, tmp_path: Path) -> None:
    want = local(("reshard", large, "--world-size", 5), tmp_path / "x")
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    kills = int(os.environ.get("CKPT_KILLS", "30"))
    states = [kill_and_go_on(large, here, rng, want, n) for n in range(kills)]
    print({state: states.count(state) for state in set(states)})
    assert states.count("unfinished") > kills // 5


def test_from_store_to_store(bucket: Any, here: Objects, tmp_path: Path) -> None:
    """Workers name what lies in a store alike; tasks of an array need not meet; others are refused."""
    source = upload(bucket, ZERO, f"{here.name}/source")
    words = ["reshard", source, here / "x", "--world-size", 3]
    array = {"SLURM_ARRAY_TASK_COUNT": "2"}
    (first,) = ended([start(words, 1, 2, **array, SLURM_ARRAY_TASK_ID="1")])
    assert first[0] == 0 and "left to other workers" in first[2], first
    assert run("inspect", here / "x").code == 2
    (other,) = ended([start([*words[:-1], 4], 0, 2)])
    assert other[0] == 2 and "error[destination-exists]" in other[2], other
    alone = run(*words)
    assert alone.code == 2 and "error[destination-exists]" in alone.err, alone
    plan = here.get(f"x{SPREAD}/ledger/plan.json")
    here.put(f"x{SPREAD}/ledger/plan.json", bytes(plan).replace(b'"ckpttools": "', b'"ckpttools": "9.'))
    (newer,) = ended([start(words, 0, 2)])
    assert newer[0] == 2 and "error[other-plan]" in newer[2] and "ckpttools 9." in newer[2], newer
    here.put(f"x{SPREAD}/ledger/plan.json", bytes(plan))
    here.put(f"x{SPREAD}/ckpt-verify-0{SPREAD}/begin.json", b"{}")  # of a job that was killed as it read back
    (last,) = ended([start(words, 0, 2, **array, SLURM_ARRAY_TASK_ID="0")])
    assert last[0] == 0 and last[1] == f"{here / 'x'}\n", last
    assert here.files("x/") == local(("reshard", ZERO, "--world-size", 3), tmp_path / "x")
    assert not any(name.startswith(f"x{SPREAD}") for name in here.meta())
    verified = ended([start(["verify", here / "x"], rank, 2) for rank in range(2)])
    assert [code for code, _, _ in verified] == [0, 0] and "good" in verified[0][1], verified
