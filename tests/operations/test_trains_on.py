"""DeepSpeed and torch load what we wrote, and train on with the losses of the run that went on.

All that DeepSpeed is to load here is loaded in one launch for each number of ranks.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from msgspec.structs import replace
from support import FIXTURES, truth_of
from train_on import TOLERANCE, Job, apart, in_deepspeed, plain, plain_run, same_tensors, stage

from ckpttools.execute import execute
from ckpttools.formats import open_checkpoint, zero3
from ckpttools.operations.convert import convert

SAMPLES = FIXTURES / "deepspeed-0.19.8"
pytestmark = pytest.mark.distributed


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
]
# DeepSpeed compiles its own Adam for it, for about a minute
COMPILED = Route("z2_cpuadam", ("pt", "zero2"), 3, options={"optimizer_class": "DeepSpeedCPUAdam"})


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


# universal folders of each source, for stages and ranks that it was not saved with
UNIVERSAL = [
    ("z2_bf16", 1, 2),
    ("z2_bf16", 2, 3),
    ("z2_bf16", 3, 3),
    ("z2_groups", 2, 3),
    ("z2_groups", 3, 2),
    ("z3_groups", 1, 3),
    ("z3_groups", 3, 2),
    ("z2_fp32", 3, 3),
    ("z2_sgd", 2, 3),
]
# ZeRO-3 folders planned from a Checkpoint alone: the sample, and the variant that loads them
LOADS_BARE = {"z3_groups": "z3_groups", "z3_sgd": "z3_sgd", "z2_bf16": "z3_bf16"}
BARE = [(name, variant, ranks) for name, variant in LOADS_BARE.items() for ranks in (2, 3)]
LAUNCHED = {"reshard": (3, ("--world-size", 3)), "rebase-schedule": (2, ("--new-bs", 1))}


def universal_jobs(folder: Path) -> Iterator[tuple[object, Job]]:
    made = {
        source: convert(SAMPLES / f"{source}_ws2", folder / source, to="universal")
        for source in dict.fromkeys(source for source, *_ in UNIVERSAL)
    }
    for case in UNIVERSAL:
        source, number, ranks = case
        at, lines = made[source].destination, made[source].next[1:]
        yield case, Job(folder=at, variant=source, ranks=ranks, config=stage(number), lines=lines)


def bare_jobs(folder: Path) -> Iterator[tuple[object, Job]]:
    for case in BARE:
        name, variant, ranks = case
        source, at = SAMPLES / f"{name}_ws2", folder / f"{name}.{ranks}"
        found = replace(open_checkpoint(source), template=None)
        at.mkdir()
        execute(zero3.plan(found, replace(found.layout, dp_degree=ranks)), at / "tag", source=source)
        (at / "latest").write_text("tag")
        yield case, Job(folder=at, variant=variant, ranks=ranks)


def launch_jobs(folder: Path) -> Iterator[tuple[object, Job]]:
    """By the launch line that the command ends with."""
    for command, (ranks, options) in LAUNCHED.items():
        made = run(command, SAMPLES / "z2_bf16_ws2", folder / command, *options, "--json")
        launch, _, load = json.loads(made.out)["next"][-1].partition(": ")
        assert shlex.split(launch)[:3] == ["deepspeed", "--num_gpus", str(ranks)]
        lines = (f"path, client_state = {load}",)
        yield command, Job(folder=folder / command, variant="z2_bf16", ranks=ranks, lines=lines)


def route_jobs(folder: Path, routes: Sequence[Route] = TO_ZERO) -> Iterator[tuple[object, Job]]:
    for route in routes:
        (folder / route.name).mkdir()
        made, lines = through(route, folder / route.name)
        variant = route.variant or route.sample
        yield (
            route.name,
            Job(folder=made, variant=variant, ranks=route.ranks, config=route.config, lines=lines),
        )


# Losses on the saved stage and number of ranks are bit-equal to those of the sample itself, where both are
# computed by one machine: another CPU sums in another order.
AS_SAVED = ("z2_bf16", "z2_fp16", "z2_groups", "z3_groups", "z3_sgd")


def saved_jobs(_: Path) -> Iterator[tuple[object, Job]]:
    for sample in AS_SAVED:
        yield AsSaved(sample), Job(folder=SAMPLES / f"{sample}_ws2", variant=sample)


@dataclass(frozen=True)
class AsSaved:
    """A sample as DeepSpeed saved it."""

    sample: str


@dataclass(frozen=True)
class Plain:
    """A loop in torch, from its third step to ZeRO-3 on three ranks and from there back."""

    expected: list[float]  # its losses as it goes on
    back: Path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def looped(scratch: Path) -> Plain:
    model, optimizer = plain("z2_fp32")
    plain_run(model, optimizer, 0, 3)
    saved = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "global_step": 3,
    }
    torch.save(saved, scratch / "a.pt")
    zero3 = convert(scratch / "a.pt", scratch / "zero3", to="zero3", world_size=3).destination
    back = convert(zero3, scratch / "back.pt", to="pt", optimizer_class="AdamW").destination
    return Plain(plain_run(model, optimizer, 3, 3), back)


@pytest.fixture(scope="module")
def went(scratch: Path, looped: Plain) -> dict[object, dict[str, Any]]:
    jobs: dict[object, Job] = {
        Plain: Job(folder=scratch / "zero3", variant="z2_fp32", ranks=3, config=stage(3))
    }
    for number, made in enumerate((saved_jobs, route_jobs, universal_jobs, bare_jobs, launch_jobs)):
        (scratch / str(number)).mkdir()
        jobs |= made(scratch / str(number))
    assert len(jobs) == len(AS_SAVED) + len(TO_ZERO) + len(UNIVERSAL) + len(BARE) + len(LAUNCHED) + 1
    return dict(zip(jobs, in_deepspeed([*jobs.values()], scratch / "jobs"), strict=True))


Went = dict[object, dict[str, Any]]


@pytest.mark.parametrize("sample", AS_SAVED)
def test_the_sample_itself_trains_on_here_as_where_it_was_saved(sample: str, went: Went) -> None:
    truth = truth_of(SAMPLES / f"{sample}_ws2")
    assert apart(went[AsSaved(sample)]["losses"], truth["losses"]) <= TOLERANCE[truth["dtype"]]


@pytest.mark.parametrize("route", TO_ZERO, ids=lambda route: route.name)
def test_deepspeed_trains_on(route: Route, went: Went) -> None:
    """By the lines that convert prints. Masters and moments are bit-equal, and so are the losses on the same
    stage and number of ranks.
    """
    truth, result = truth_of(SAMPLES / f"{route.sample}_ws2"), went[route.name]
    check(truth, result)
    if route.ranks == 2 and route.variant is None and not route.config:
        assert result["losses"] == went[AsSaved(route.sample)]["losses"]
    elif route.way[-1] == "zero0" and truth["dtype"] == "fp16":
        # DeepSpeed divides by the next step's loss scale (_update_scale before unscale_and_clip_grads)
        assert result["losses"][0] == went[AsSaved(route.sample)]["losses"][0]
    else:
        assert apart(result["losses"], truth["losses"]) <= TOLERANCE[truth["dtype"]]


@pytest.mark.heavy
def test_deepspeed_trains_on_with_its_own_adam(tmp_path: Path) -> None:
    ((_, job),) = route_jobs(tmp_path, [COMPILED])
    (result,), truth = in_deepspeed([job], tmp_path / "jobs"), truth_of(SAMPLES / f"{COMPILED.sample}_ws2")
    check(truth, result)
    assert apart(result["losses"], truth["losses"]) <= TOLERANCE[truth["dtype"]]


def check(truth: dict[str, Any], result: dict[str, Any]) -> None:
    """It was loaded, and masters and state are those of the engine that saved."""
    assert result["ok"], result["error"]
    for key in {"fp32", "state"} & truth.keys():  # the samples of stage 0 were made without them
        assert same_tensors(truth[key], result["loaded"][key]) == []


def test_a_plain_loop_goes_on_in_deepspeed_and_back(went: Went, looped: Plain) -> None:
    """From torch to 3 ranks of ZeRO-3; from there back: bit-equal, as if nothing had happened."""
    assert went[Plain]["ok"], went[Plain]["error"]
    assert apart(went[Plain]["losses"], looped.expected) <= TOLERANCE["fp32"]
    model, optimizer = plain("z2_fp32")
    loaded = torch.load(looped.back, weights_only=True)
    model.load_state_dict(loaded["model_state_dict"])
    optimizer.load_state_dict(loaded["optimizer_state_dict"])
    assert plain_run(model, optimizer, loaded["global_step"], 3) == looped.expected


@pytest.mark.parametrize("case", UNIVERSAL, ids=lambda case: "-".join(map(str, case)))
def test_deepspeed_trains_on_from_universal(case: tuple[str, int, int], went: Went) -> None:
    """By the lines that convert prints: masters, moments, steps, settings, buffers and frozen weights are
    those of the run that saved, and so are the losses of the steps after it.
    """
    truth, result = truth_of(SAMPLES / f"{case[0]}_ws2"), went[case]
    assert result["ok"], result["error"]
    for key in ("fp32", "state"):
        assert same_tensors(truth[key], result["loaded"][key]) == []
    for name in truth["frozen"]:
        assert torch.equal(truth["module"][name], result["loaded"]["module"][name]), name
    assert {scalars["step"] for scalars in result["loaded"]["scalars"] if scalars} <= {3}
    groups = zip(truth["param_groups"], result["loaded"]["param_groups"], strict=False)
    for theirs, ours in groups if case[1] < 3 else ():
        assert {key: ours[key] for key in theirs} == theirs
    assert apart(result["losses"], truth["losses"]) <= TOLERANCE[truth["dtype"]]


@pytest.mark.parametrize("case", BARE, ids=lambda case: "-".join(map(str, case)))
def test_deepspeed_trains_on_from_a_plan_of_the_checkpoint_alone(
    case: tuple[str, str, int], went: Went
) -> None:
    """Masters and state bit-equal always; losses bit-equal on the saved stage and number of ranks.

    Else they are within rounding of 16-bit sums: ZeRO-3 also replaces F.linear, which rounds otherwise.
    """
    name, _, ranks = case
    truth, result = truth_of(SAMPLES / f"{name}_ws2"), went[case]
    assert result["ok"], result["error"]
    for key in ("fp32", "state"):
        assert same_tensors(truth[key], result["loaded"][key]) == []
    if ranks == 2 and name.startswith("z3_"):
        assert result["losses"] == went[AsSaved(name)]["losses"]
    else:
        assert apart(result["losses"], truth["losses"]) < 1e-3


@pytest.mark.parametrize("command", LAUNCHED)
def test_deepspeed_loads_by_the_launch_line(command: str, went: Went) -> None:
    assert went[command]["ok"], went[command]["error"]
