"""Unmodified DeepSpeed resumes from what we resharded, and goes on as if it had been saved so.

DeepSpeed trained and saved (the fixtures; in the heavy sweep everything anew, by
tests/oracles/deepspeed_samples.py), we reshard, and tests/oracles/deepspeed_resume.py loads the result on
that number of ranks, saves it again and trains on. Then

    loaded      what the engine holds equals what the engine that saved had held, bit by bit
    saved again equals our files in everything that DeepSpeed reads, paddings and mappings included
    losses      of the next steps equal those of the run that was never interrupted: exactly on the same
                number of ranks of the same machine, else within TOLERANCE
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    FIXTURES,
    RANK_LOCAL,
    SAMPLES,
    identical,
    resharded,
    torch_folder,
    tree_differences,
    truth_of,
    variant_of,
)

pytestmark = pytest.mark.distributed
ORACLES = Path(__file__).parents[1] / "oracles"

# Another number of ranks sums the same gradients in another order and rounds the partial sums to the model's
# dtype. Measured over all routes below after 3 steps: fp32 5e-7, bf16 5e-4, and 5e-4 with Lion, whose update
# is a sign that a rounding can turn. A wrongly placed parameter costs more than 0.01 at once.
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3, "lion": 3e-3}


@dataclass(frozen=True)
class Route:
    """A variant of deepspeed_samples, and the numbers of ranks that it was saved with and resharded to."""

    variant: str
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.variant}-{'-'.join(map(str, self.ranks))}"

    @property
    def comes_back(self) -> bool:
        return self.ranks[0] == self.ranks[-1]


TELLING = [
    "z2_bf16",
    "z2_fp32",
    "z1_bf16opt",
    "z2_round_robin",
    "z2_rr_frozen_tied_groups",
    "z2_groups",
    "z2_align_rr_groups",
    "z2_sgd",
]
# moments of 32 bits beside masters of 16: torch casts them to the masters' dtype when they are loaded
CAST_ON_LOAD = ("z2_bf16_masters", "z2_fp16_masters")
BITSANDBYTES = ("z2_bnb_adamw",)
EVERY = sorted(
    {variant_of(p) for p in SAMPLES if p.parent.name == "deepspeed-0.19.8"}
    - {"z2_elastic", "z2_elastic_sgd"}  # DeepSpeed cannot load its own
    - {*RANK_LOCAL, *CAST_ON_LOAD, *(BITSANDBYTES if find_spec("bitsandbytes") is None else ())}
)
BY_ONE = ("z2_bf16", "z2_fp32", "z2_round_robin", "z2_align_rr_groups")  # fixtures saved by one rank, too
DEFAULT = [
    Route(variant, ranks)
    for variant in TELLING
    for ranks in ((2, 1), (2, 2), (2, 3), (2, 4), (2, 4, 2), (1, 4) if variant in BY_ONE else (2, 1, 4))
]
# the frozen owner of a tied weight is left out of the file
TIED = ("z2_tied_frozen", "z2_tied_frozen_exclude", "z1_tied_frozen_exclude", "z2_tied_lora_exclude")
DEFAULT += [Route(variant, (2, 3)) for variant in TIED]
# the moments lie in a dict, a list and a tuple
DEFAULT += [Route("z2_nested", (2, 3)), Route("z2_nested", (2, 4, 2))]
HEAVY = [
    *(Route(v, (2, m)) for v in EVERY for m in (1, 2, 3, 4, 5, 8)),
    *(Route(v, (n, m)) for v in TELLING for n in (1, 4) for m in (1, 2, 3, 4, 5, 8)),
    *(Route(v, (2, 5, 1, 3, 2)) for v in EVERY),
]


def torchrun(script: str, ranks: int, arguments: Sequence[object], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--max-restarts=99", str(ORACLES / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@dataclass(frozen=True)
class Travelled:
    """What became of a route."""

    truth: dict[str, Any]  # of the engine that saved
    ours: Path  # as resharded last
    resaved: Path
    result: dict[str, Any]  # of deepspeed_resume
    as_saved: Path  # what deepspeed_resume says of the sample itself


def train(folder: Path, routes: Iterable[Route], environment: dict[str, str]) -> None:
    """Save what the routes begin with: one torchrun for each number of ranks."""
    saved: dict[int, set[str]] = defaultdict(set)
    for route in routes:
        saved[route.ranks[0]].add(route.variant)
    for ranks, variants in saved.items():
        arguments = [folder, "--variants", ",".join(sorted(variants))]
        torchrun("deepspeed_samples.py", ranks, arguments, environment)
        for truth in folder.glob(f"*_ws{ranks}.truth.pt"):
            (folder / "truth").mkdir(exist_ok=True)
            truth.rename(folder / "truth" / truth.name.replace(".truth", ""))


def held(sample: Path) -> dict[str, Any]:
    """The truth about a sample. That of a fixture leaves out what its model file repeats."""
    truth = truth_of(sample)
    if "module" not in truth:
        (file,) = sample.glob("*/mp_rank_00_model_states.pt")
        weights = torch.load(file, weights_only=False)["module"]
        truth["buffers"] = {name: weights.pop(name) for name in truth["persistent_buffers"]}
        truth["module"] = weights
    return truth


def travel(
    folder: Path, saved: Path, routes: Iterable[Route], environment: dict[str, str]
) -> dict[Route, Travelled]:
    """Reshard, resume: one torchrun for each number of ranks at the end. What comes back to its number of
    ranks is held against the sample itself, resumed here: another CPU than its own sums in another order.
    """
    jobs: dict[int, list[dict[str, str]]] = defaultdict(list)
    out: dict[Route, Travelled] = {}
    for route in routes:
        sample = saved / f"{route.variant}_ws{route.ranks[0]}"
        assert sample.is_dir(), Path(f"{sample}.error.txt").read_text()
        ours = sample
        for i, ranks in enumerate(route.ranks[1:], 1):
            (folder / f"{route.name}.{i}").mkdir()
            ours = resharded(ours, ranks, folder / f"{route.name}.{i}" / "save")
        resaved = folder / "resaved" / route.name
        jobs[route.ranks[-1]].append(
            {"load_dir": str(ours), "variant": route.variant, "resave_dir": str(resaved)}
        )
        as_saved = folder / "resaved" / sample.name
        out[route] = Travelled(held(sample), ours, resaved, {}, Path(f"{as_saved}.resume.pt"))
        itself = {"load_dir": str(sample), "variant": route.variant, "resave_dir": str(as_saved)}
        if route.comes_back and itself not in jobs[route.ranks[0]]:
            jobs[route.ranks[0]].append(itself)
    for ranks, of_ranks in jobs.items():
        (folder / f"jobs{ranks}.json").write_text(json.dumps(of_ranks))
        torchrun("deepspeed_resume.py", ranks, [folder / f"jobs{ranks}.json"], environment)
    for there in out.values():
        there.result.update(torch.load(f"{there.resaved}.resume.pt", weights_only=False))
    return out


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ranks compute on the CPU; what DeepSpeed compiles is compiled once."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or str(tmp_path_factory.mktemp("extensions"))
    ours = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, "TORCH_EXTENSIONS_DIR": extensions}


@pytest.fixture(scope="module")
def travelled(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> dict[Route, Travelled]:
    saved = FIXTURES / f"deepspeed-{version('deepspeed')}"
    return travel(tmp_path_factory.mktemp("resume"), saved, DEFAULT, environment)


@pytest.fixture(scope="module")
def travelled_all(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> dict[Route, Travelled]:
    folder = tmp_path_factory.mktemp("resume-all")
    train(folder / "saved", HEAVY, environment)
    return travel(folder, folder / "saved", HEAVY, environment)


@pytest.mark.parametrize("route", DEFAULT, ids=lambda route: route.name)
def test_deepspeed_goes_on(travelled: dict[Route, Travelled], route: Route) -> None:
    check(route, travelled[route])


@pytest.mark.heavy
@pytest.mark.parametrize("route", HEAVY, ids=lambda route: route.name)
def test_deepspeed_goes_on_from_every_variant(travelled_all: dict[Route, Travelled], route: Route) -> None:
    check(route, travelled_all[route])


def check(route: Route, there: Travelled) -> None:
    assert there.result["ok"], there.result["error"]
    assert engine_differences(there.result["loaded"], there.truth) == []
    assert resave_differences(there.resaved, there.ours) == []
    off = [abs(a - b) for a, b in zip(there.result["losses"], there.truth["losses"], strict=True)]
    if route.variant == "z2_fp16_skipped" and not route.comes_back:
        # the loss scale is at its limit: whether the first step overflows depends on each rank's batch
        off = off[:1]
    kind = "lion" if "lion" in route.variant else there.truth["dtype"]
    assert max(off) <= TOLERANCE[kind]
    if route.comes_back:
        itself = torch.load(there.as_saved, weights_only=False)
        assert there.result["losses"] == itself["losses"]
        for name, tensor in (itself["fp32_after"] or {}).items():
            assert identical(there.result["fp32_after"][name], tensor), name


def engine_differences(loaded: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """What the engine holds after the load, against the one that saved."""
    exact = ("module", "buffers", "fp32", "state", "lr", "lr_scheduler")
    counters = ("global_steps", "global_samples", "skipped_steps", "frozen", "shared", "scalars")
    out: list[str] = []
    for key in (*exact, *counters):
        a, b = loaded[key], saved[key]
        if key in (
            "module",
            "buffers",
        ):  # frozen weights may be left out of the file, and come from the model
            a, b = {name: a[name] for name in b}, dict(b)
        if key in ("fp32", "state"):  # round-robin: another rank count, another order of names
            a, b = by_name(a), by_name(b)
        if key == "scalars":
            a, b = [*map(by_name, a)], [*map(by_name, b)]
        out += tree_differences(a, b, key)
    return [d for d in out if not any(re.search(pattern, d) for pattern in NOT_SAVED)]


# non-persistent buffers are not in a checkpoint, and are the same in every fresh model
NOT_SAVED = (r"^buffers\.cache",)


def by_name(value: Any) -> Any:
    return {key: by_name(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


def resave_differences(theirs: Path, ours: Path) -> list[str]:
    """DeepSpeed's own files after the load, against the ones that we wrote."""
    (tag,) = (p for p in ours.iterdir() if p.is_dir())
    new, old = torch_folder(theirs / tag.name), torch_folder(tag)
    if list(new) != list(old):
        return [f"files {list(new)} != {list(old)}"]
    return [
        d
        for d in tree_differences(new, old, storages=True)
        # ds_config is the new run's. The module's tensors are views into whole flat groups, whose padding
        # we do not write.
        if ".ds_config" not in d and not (".module" in d and "storage of" in d)
    ]
