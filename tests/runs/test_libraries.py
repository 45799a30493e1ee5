"""Real runs of trainers under ls, latest, prune, diff and runs: what each library itself goes on from."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import run

import ckpttools

SCRIPT = Path(__file__).with_name("libraries.py")
# MMEngine lives in an environment of its own: tests/oracles/mmengine_env.sh
PYTHONS = {"mmengine": os.environ.get("CKPT_MMENGINE_PYTHON", "")}
# how many checkpoints a run leaves; the newest step; the batch, None where the checkpoints do not say
CASES: dict[str, tuple[int, int, int | None]] = {
    "trainer": (6, 12, 2),
    "lightning": (5, 12, None),
    "mmengine": (4, 12, None),
    "openpcdet": (4, 16, None),
}


@contextmanager
def library(name: str, folder: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """A run of a library. The function gives what it said at the end, called again what going on said."""
    python = PYTHONS.get(name, sys.executable)
    if not python:
        pytest.skip("needs CKPT_MMENGINE_PYTHON")
    # MMEngine loads its own files with torch.load's defaults, which changed in torch 2.6
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    errors = folder.parent.parent / "errors.txt"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [python, SCRIPT, name, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=folder.parent,
            env=environment,
        ) as process,
    ):
        assert process.stdin and process.stdout
        lines, asked = process.stdout, [False]

        def said() -> dict[str, Any]:
            if asked[0]:
                print("go on", file=process.stdin, flush=True)
            asked[0] = True
            for line in lines:
                if line.startswith(('{"latest"', '{"began"')):
                    found: dict[str, Any] = json.loads(line)
                    return found
            raise AssertionError(errors.read_text()[-3000:])

        yield said
        process.stdin.close()
        assert process.wait() == 0, errors.read_text()[-3000:]


@pytest.mark.parametrize("name", CASES)
def test_a_librarys_own_run(name: str, tmp_path: Path) -> None:
    count, newest, batch = CASES[name]
    folder = tmp_path / "work" / "exp"
    folder.mkdir(parents=True)
    with library(name, folder) as said:
        latest = Path(said()["latest"]).resolve()

        # what ckpt takes for the newest is what the library goes on from
        assert Path(run("latest", folder).out.strip()).resolve() == latest
        document = json.loads(run("ls", folder, "--json").out)
        listed = [each for one in document["runs"] for each in one["checkpoints"]]
        assert document["ok"] and len(listed) == count, listed
        (marked,) = [each for each in listed if "latest" in each["marks"]]
        assert Path(marked["path"]).resolve() == latest
        place = latest.parent
        ordered = [each["step"] or each["metrics"].get("iteration") for each in listed]
        assert ordered == sorted(ordered, reverse=True) and ordered[0] == newest

        # the iteration-based loop of MMEngine saves epoch 0 to its end
        assert name != "mmengine" or {each["epoch"] for each in listed} == {None}

        # the log that the library wrote, over samples where the batch is known
        (one,) = ckpttools.experiments(folder).runs
        assert one.batch == batch and one.step == newest
        assert not [words for words in one.schedule if "not followed" in words]
        if name != "openpcdet":
            (loss,) = [each for each in one.losses if each.name in ("loss", "train_loss")]
            assert math.isfinite(loss.last) and loss.least <= loss.last
            assert len(one.log.series[loss.name].points) == 12

        # the newest differs from the oldest, and equals itself
        oldest = listed[-1]["path"]
        assert run("diff", oldest, latest).code == 1 and run("diff", latest, latest).code == 0

        # after a clean-up the library still finds it, and goes on from there
        names = {path.name for path in place.iterdir()}
        ran = run("prune", folder, "--keep-last", 2, "-y")
        assert ran.code == 0, ran.err
        gone = names - {path.name for path in place.iterdir()}
        assert gone == {Path(each["path"]).name for each in listed} - {
            Path(d.entry.path.name).name for d in ckpttools.prune(folder, keep_last=2, dry_run=True).kept
        }
        assert 1 <= len(gone) <= count - 2 and latest.exists()
        assert said()["began"] == newest
