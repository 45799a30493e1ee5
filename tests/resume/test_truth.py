"""`ckpt resume-check` against DeepSpeed itself: engines are saved, resumed with something changed, and
watched.

combos.py names the checkpoints and the changes, launch.py carries them out under torchrun, compare.py
says where a forecast was wrong: whether it loads, the class and text of the error, the step, the learning
rates of the first two updates; and what was called safe must give the losses of the run that was never
interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run as ckpt
from resume.combos import BASES, Base, Combo, combos, native, pairs
from resume.compare import Verdict, compare, foretold, outcome, run_of
from resume.net import Net

HERE = Path(__file__).parent
TELLING = (
    "z2fp32_w2--same",
    "z2fp32_w1--ranks2",
    "z2fp32_w2--wider",
    "z2fp32_w2--stage0",
    "z2fp32_w2--rr-True",
    "z2fp32_w2--to-WarmupCosineLR",
    "z2fp32_w2--groups2",
    "z2bf16_w2--fp32",
    "z2bf16_w2--half",
    "cosine_w2--lr",
    "nosched_w2--SGD",
    "opt-Adam_w2--AdamW",
)


def launch(jobs: list[dict[str, Any]], ranks: int, folder: Path) -> None:
    """Carry jobs out on a number of ranks; outcomes go to folder/out."""
    if not jobs:
        return
    listed = folder / f"jobs-{ranks}-{len(list(folder.glob('jobs-*')))}.json"
    listed.write_text(json.dumps(jobs))
    # fmt: off
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
        "--max-restarts=99", str(HERE / "launch.py"), str(listed), str(folder / "out"),
    ]
    # fmt: on
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent / "oracles", HERE))),
        # where ninja is, for what DeepSpeed compiles
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
    }
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]


def launch_all(wanted: Sequence[Combo], folder: Path) -> None:
    """Save every checkpoint that is needed, then resume each combination."""
    (folder / "saved").mkdir(parents=True)
    bases = {combo.base.name: combo.base for combo in wanted}
    ranks = sorted({b.ranks for b in bases.values()} | {c.ranks for c in wanted})
    loads = {w: [_load(c, folder) for c in wanted if c.ranks == w] for w in ranks}
    saves = {w: [_save(b, folder) for b in bases.values() if b.ranks == w] for w in ranks}
    last = ranks[-1]
    for w in ranks:
        # what the last number of ranks resumes is saved by then
        launch(saves[w] + (loads[w] if w == last else []), w, folder)
    for w in ranks[:-1]:
        launch(loads[w], w, folder)


def _save(base: Base, folder: Path) -> dict[str, Any]:
    return {"id": base.name, "run": base.run, "save": str(folder / "saved" / base.name)}


def _load(combo: Combo, folder: Path) -> dict[str, Any]:
    return {"id": combo.id, "run": combo.run, "load": str(folder / "saved" / combo.base.name)}


def judge(combo: Combo, folder: Path) -> Verdict:
    real, unchanged = outcome(folder / "out", combo.id), outcome(folder / "out", combo.base.name)
    assert "error" not in unchanged, unchanged.get("traceback")
    return compare(combo, foretold(combo, folder / "saved" / combo.base.name), real, unchanged)


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    launch_all([combo for combo in combos() if combo.id in TELLING], folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", TELLING)
def test_the_forecast_is_what_happens(launched: Path, name: str) -> None:
    combo = next(c for c in combos() if c.id == name)
    verdict = judge(combo, launched)
    assert verdict.wrong == ()
    _same_on_the_command_line(combo, verdict, launched)


def _same_on_the_command_line(combo: Combo, verdict: Verdict, folder: Path) -> None:
    config = folder / f"{combo.id}.json"
    config.write_text(json.dumps(combo.run["config"]))
    words: list[object] = ["--config", config, "--world-size", combo.ranks, "--groups", combo.run["groups"]]
    if run_of(combo, folder).model is not None:
        model = folder / f"{combo.id}.pt"
        torch.save(Net(**combo.run["model"]).state_dict(), model)
        words += ["--model", model]
    ran = ckpt("resume-check", folder / "saved" / combo.base.name, *words, "--json")
    said, forecast = json.loads(ran.out), verdict.forecast
    assert ran.code == (0 if forecast.resumes else 1), ran.err
    assert said["verdict"] == forecast.verdict
    assert (said["error"] or {}).get("class") == (forecast.refusal.error if forecast.refusal else None)
    assert said["step"] == forecast.step
    assert said["lr"]["first"] == forecast.rates.first[0]
    assert said["lr"]["next"] == (forecast.rates.next[0] if forecast.rates.next else None)
    assert all(check["ok"] for check in said["checks"] if check["name"] in ("complete", "intact"))


@pytest.mark.heavy
@pytest.mark.distributed
def test_the_forecast_is_what_happens_in_every_combination(tmp_path: Path) -> None:
    """At least 99 in 100 are foretold in every point, and nothing that was called safe fails."""
    single, double = combos(), pairs(300, seed=11)
    assert len(single) >= 150
    launch_all([*single, *double], tmp_path)
    verdicts = [judge(combo, tmp_path) for combo in (*single, *double)]
    print(table(verdicts, tmp_path / "out"))
    wrong = [v for v in verdicts if v.wrong]
    for v in wrong:
        print(v.combo.id, v.forecast.verdict, *v.wrong, sep="\n    ")
    assert not [v.combo.id for v in wrong if v.forecast.verdict == "safe"]
    for part in (verdicts[: len(single)], verdicts[len(single) :]):
        assert sum(not v.wrong for v in part) >= 0.99 * len(part)


@pytest.mark.heavy
@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its own Adam with c++")
def test_the_forecast_is_what_happens_with_deepspeeds_own_adam(tmp_path: Path) -> None:
    wanted = native()
    launch_all(wanted, tmp_path)
    verdicts = [judge(combo, tmp_path) for combo in wanted]
    print(table(verdicts, tmp_path / "out"))
    assert {v.combo.id: v.wrong for v in verdicts if v.wrong} == {}


def table(verdicts: Iterable[Verdict], out: Path) -> str:
    """Per kind of change: how many agree, what was said, how many loaded, how often the next rate was not
    told."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for v in verdicts:
        row = rows[v.combo.kind]
        row["all"] += 1
        row["agree"] += not v.wrong
        row[v.forecast.verdict] += 1
        loaded = "error" not in outcome(out, v.combo.id)
        row["loads"] += loaded
        row["no next"] += loaded and v.forecast.rates.next is None
    columns = ("all", "agree", "safe", "careful", "impossible", "loads", "no next")
    rows["together"] = sum(rows.values(), Counter())
    lines = [f"{'change':<20}" + "".join(f"{c:>12}" for c in columns)]
    lines += [f"{kind:<20}" + "".join(f"{row[c]:>12}" for c in columns) for kind, row in rows.items()]
    return "\n".join(lines)


def test_every_telling_combination_exists() -> None:
    assert {c.id for c in combos()} >= set(TELLING)
    assert {c.base.name for c in combos()} == set(BASES)
