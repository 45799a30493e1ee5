"""DeepSpeed and torch load what ckpt convert wrote, and train on with the losses of the run that went on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FIXTURES, truth_of
from train_on import TOLERANCE, Job, apart, in_deepspeed, plain, plain_run, same_tensors, stage

from ckpttools.operations.convert import convert

SAMPLES = FIXTURES / "deepspeed-0.19.8"
pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("train-on")]


@dataclass(frozen=True)
class Route:
    """A sample, the formats that it goes through, and the engine that loads the last of them."""

    sample: str  # of deepspeed-0.19.8, saved by 2 ranks
    way: tuple[str, ...]
    ranks: int = 2
    variant: str | None = None  # where another one than the sample's loads it
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.sample}-{'-'.join(self.way)}-{self.ranks}"


TO_ZERO = [
    Route("z2_bf16", ("pt", "zero2"), 2),
    Route("z2_bf16", ("zero3",), 3, "z3_bf16"),
    Route("z2_fp32", ("dcp", "zero1"), 3, config=stage(1)),
    Route("z3_groups", ("zero2",), 2, config=stage(2)),
    Route("z3_groups", ("zero2",), 3, config=stage(2)),
    Route("z3_groups", ("zero3",), 3),
    Route("z3_groups", ("pt", "zero3"), 2),
    Route("z3_groups", ("dcp", "zero3"), 2),
    Route("z2_groups", ("zero3", "zero2"), 2),
    Route("z2_fp16", ("zero3",), 2, "z3_fp16"),
    Route("z2_sgd", ("pt", "zero3"), 2, "z3_sgd"),
    Route("z2_bf16", ("zero0",), 2, config=stage(0)),
    Route("z2_fp16", ("zero0",), 2, config=stage(0)),
    Route("z3_groups", ("pt", "zero0"), 2, config=stage(0)),
    Route("z2_fp32", ("zero0",), 3, config=stage(0)),
    # DeepSpeed itself, from its own folder of that run, differs from the uninterrupted one as much
    Route("z0_bf16", ("zero3", "zero0"), 2, config=stage(0)),
    Route("z2_cpuadam", ("pt", "zero2"), 3, options={"optimizer_class": "DeepSpeedCPUAdam"}),
]


def through(route: Route, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The sample in the last of the formats, and the lines of Python that load it."""
    at, lines = SAMPLES / f"{route.sample}_ws2", tuple[str, ...]()
    for i, to in enumerate(route.way):
        last = i == len(route.way) - 1
        name = f"{i}.pt" if to == "pt" else str(i)
        ranks = route.ranks if last and to.startswith("zero") and to != "zero0" else None
        dtype = truth_of(SAMPLES / f"{route.sample}_ws2")["dtype"] if to.startswith("zero") else None
        made = convert(
            at,
            folder / name,
            to=to,  # type: ignore[arg-type]
            world_size=ranks,
            dtype=None if dtype == "fp32" else dtype,
            **(route.options if last else {}),
        )
        at, lines = made.destination, made.next[1:]
    return at, lines


@pytest.fixture(scope="module")
def went(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Route], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained")
    jobs = []
    for route in TO_ZERO:
        (folder / route.name).mkdir()
        made, lines = through(route, folder / route.name)
        variant = route.variant or route.sample
        job = Job(folder=made, variant=variant, ranks=route.ranks, config=route.config, lines=lines)
        jobs.append(job)
    results = dict(zip((route.name for route in TO_ZERO), in_deepspeed(jobs, folder), strict=True))
    return lambda route: results[route.name]


@pytest.mark.parametrize("route", TO_ZERO, ids=lambda route: route.name)
def test_deepspeed_trains_on(route: Route, went: Callable[[Route], dict[str, Any]]) -> None:
    """By the lines that convert prints. Masters and moments are bit-equal, and so are the losses on the same
    stage and number of ranks.
    """
    truth, result = truth_of(SAMPLES / f"{route.sample}_ws2"), went(route)
    assert result["ok"], result["error"]
    for key in {"fp32", "state"} & truth.keys():  # the samples of stage 0 were made without them
        assert same_tensors(truth[key], result["loaded"][key]) == []
    steps = 1 if route.way[-1] == "zero0" and truth["dtype"] == "fp16" else None
    # there DeepSpeed divides by the next step's loss scale (_update_scale before unscale_and_clip_grads)
    off = apart(result["losses"][:steps], truth["losses"][:steps])
    same = steps or (route.ranks == 2 and route.variant is None and not route.config)
    assert off <= (0 if same else TOLERANCE[truth["dtype"]])


def test_a_plain_loop_goes_on_in_deepspeed_and_back(tmp_path: Path) -> None:
    """From torch to 3 ranks of ZeRO-3; from there back: bit-equal, as if nothing had happened."""
    model, optimizer = plain("z2_fp32")
    plain_run(model, optimizer, 0, 3)
    saved = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "global_step": 3,
    }
    torch.save(saved, tmp_path / "a.pt")
    expected = plain_run(model, optimizer, 3, 3)
    zero3 = convert(tmp_path / "a.pt", tmp_path / "zero3", to="zero3", world_size=3).destination
    back = convert(zero3, tmp_path / "back.pt", to="pt", optimizer_class="AdamW").destination
    job = Job(folder=zero3, variant="z2_fp32", ranks=3, config=stage(3))
    (result,) = in_deepspeed([job], tmp_path / "jobs")
    assert result["ok"], result["error"]
    assert apart(result["losses"], expected) <= TOLERANCE["fp32"]
    model, optimizer = plain("z2_fp32")
    loaded = torch.load(back, weights_only=True)
    model.load_state_dict(loaded["model_state_dict"])
    optimizer.load_state_dict(loaded["optimizer_state_dict"])
    assert plain_run(model, optimizer, loaded["global_step"], 3) == expected
